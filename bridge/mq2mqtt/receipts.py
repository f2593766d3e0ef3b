"""Receipts: the sender of a RocketMQ message learns what became of it in MQTT, through a lane of the rule's own."""

import json
import time
from typing import Final, NamedTuple

from mq2mqtt.errors import LaneError
from mq2mqtt.host import DropReason, Outcome
from mq2mqtt.mapping import NODE_PROPERTY
from mq2mqtt.message import ReceivedMessage
from mq2mqtt.presence.syncing import Syncing
from mq2mqtt.spool.frame import Frame, FrameKind, encode
from mq2mqtt.spool.lane import Lane
from mq2mqtt.telemetry import RuleTelemetry

__all__ = ["RECEIPTS_SUFFIX", "Receipt", "ReceiptBook"]

RECEIPTS_SUFFIX: Final = ".receipts"
"""Of the lane that carries the receipts of the inbound rule named before it."""

_SEPARATORS: Final = frozenset("\x01\x02")
_TOLD: Final = frozenset((Outcome.DELIVERED, Outcome.QUEUED, Outcome.EXPIRED))


class Receipt(NamedTuple):
    """What a receipt says of the message that it is about: RocketMQ's id of it, and its keys."""

    message_id: str
    keys: str

    @classmethod
    def of(cls, message: ReceivedMessage) -> "Receipt":
        """Return what a receipt for `message` says of it."""
        return cls(message.properties.get("UNIQ_KEY", ""), message.properties.get("KEYS", ""))

    def text(self) -> str:
        """Return it as it is kept with the message."""
        return json.dumps(self)

    @classmethod
    def read(cls, text: str) -> "Receipt":
        """Read what `text` made."""
        message_id, keys = json.loads(text)
        return cls(message_id, keys)


class ReceiptBook:
    """Writes receipts into the lanes of the rules that have one."""

    def __init__(self, *, node: str) -> None:
        self._node = node
        self._lanes: dict[str, tuple[Lane, RuleTelemetry, Syncing]] = {}
        self._expected: dict[str, RuleTelemetry] = {}

    def expect(self, rule_id: str, telemetry: RuleTelemetry) -> None:
        """This inbound rule will have a lane: until it is attached, its receipts are dropped and counted."""
        self._expected[rule_id] = telemetry

    def attach(self, rule_id: str, lane: Lane, telemetry: RuleTelemetry) -> None:
        """Have the receipts of this inbound rule written to `lane`, and counted in `telemetry`."""
        self._expected.pop(rule_id, None)
        self._lanes[rule_id] = lane, telemetry, Syncing(lane.durable)

    def detach(self, rule_id: str) -> None:
        """Write none any more; unknown rules are nothing."""
        self._expected.pop(rule_id, None)
        self._lanes.pop(rule_id, None)

    def tell(self, rule_id: str, outcome: Outcome, receipt: str, *, client_id: str, topic: str) -> None:
        """Write a receipt, `Receipt.text`, unless the outcome is none to tell, or the rule has no receipts any more.

        `client_id` is empty where a message is not for one client. What the lane cannot take is dropped and counted:
        messages do not wait for their receipts.
        """
        if outcome not in _TOLD:
            return
        if rule_id not in self._lanes:
            if (expected := self._expected.get(rule_id)) is not None:
                expected.dropped(DropReason.LANE_NOT_OPEN)
            return
        lane, telemetry, syncing = self._lanes[rule_id]
        frame = _frame(self._node, outcome, Receipt.read(receipt), client_id=client_id, topic=topic)
        try:
            lane.append(frame)
        except LaneError:
            telemetry.dropped(DropReason.LANE_FULL)
        else:
            telemetry.outcomes["accepted"] += 1
            if lane.durability == "power":
                syncing.soon()


def _frame(node: str, outcome: Outcome, receipt: Receipt, *, client_id: str, topic: str) -> bytes:
    said = {"clientId": client_id, "mqttTopic": topic, "origMsgId": receipt.message_id}
    said = {name: value for name, value in said.items() if value}
    properties = {"TAGS": str(outcome), "KEYS": receipt.keys, NODE_PROPERTY: node, **said}
    # A device chooses its client id: one with RocketMQ's separators would make properties of its own.
    texts = {name: value for name, value in properties.items() if value and not _SEPARATORS.intersection(value)}
    text = "".join(f"{name}\x01{value}\x02" for name, value in texts.items())
    body = json.dumps({"outcome": str(outcome), "keys": receipt.keys, **said}, ensure_ascii=False)
    return encode(
        Frame(
            FrameKind.ROCKETMQ,
            0,
            time.time_ns() // 1000,
            client_id,
            topic,
            text.encode("utf-8", "surrogateescape"),
            body.encode("utf-8", "surrogateescape"),
        )
    )
