"""P2P from device to device that is to be kept: through the lane `.p2p`, so that PUBACK may go out at once."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable
from dataclasses import replace
from functools import partial
from typing import Final

from loguru import logger

from mq2mqtt import expiry, topics
from mq2mqtt.errors import LaneError, UnmappableMessageError
from mq2mqtt.host import Delivery, DropReason, LaneWriter, MqttHost, Outcome
from mq2mqtt.intake import LaneIntake
from mq2mqtt.lane_gauges import oldest_seconds, refresh_lane_gauges
from mq2mqtt.message import MqttMessage
from mq2mqtt.offline import OfflineQueue
from mq2mqtt.rules import RuleSet
from mq2mqtt.settings import SpoolSettings
from mq2mqtt.spool.follower import FollowedLane
from mq2mqtt.spool.frame import Frame, encode_publish
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.reader import Entry, LaneReader
from mq2mqtt.telemetry import Direction, RuleState, RuleTelemetry, Telemetry, Trouble

__all__ = ["RELAY_LANE", "P2PRelay"]

RELAY_LANE: Final = ".p2p"
"""No rule's name. The Mosquitto hook writes it itself."""

_AHEAD_BYTES = 32 * 1024 * 1024
_STEP_MESSAGES = 256
_RETRY_SECONDS = 1.0
# What a message needs besides its payload.
_OVERHEAD_BYTES = 400


class P2PRelay:
    """The lane `.p2p` at work: what is in it is handed to the offline queue, and settled at its outcome.

    The lane is opened when there is something in it, or there may be: not for the first message, whose connection and
    all others would wait for the disk. `run` works until `finish`.
    """

    def __init__(
        self,
        *,
        spool: SpoolSettings,
        host: MqttHost,
        queue: OfflineQueue,
        telemetry: Telemetry,
        writer: LaneWriter | None,
    ) -> None:
        self._spool = spool
        self._path = spool.path / RELAY_LANE
        self._host = host
        self._queue = queue
        self._rules = RuleSet()
        self._all_telemetry = telemetry
        self._writer = writer
        self.telemetry = RuleTelemetry(RELAY_LANE, direction=Direction.UPLINK, state=RuleState.UP)
        self.telemetry.rule_up(Trouble.LINK)
        self._intake = LaneIntake(telemetry=self.telemetry)
        self._lane: Lane | FollowedLane | None = None
        self._reader: LaneReader | None = None
        self._opened = asyncio.Event()
        self._news = asyncio.Event()
        self._ahead_bytes = 0
        self._finishing = False
        self._read_problem: str | None = None
        self._accepted_before = 0

    def go_by(self, rules: RuleSet) -> None:
        """Count what is dropped for these rules from now on."""
        self._rules = rules

    def accept(self, message: MqttMessage) -> Awaitable[None] | None:
        """Put a P2P publish into the lane; see `mq2mqtt.host.Intake.accept`."""
        if self._lane is None:
            with contextlib.suppress(LaneError):
                self.open()
        frame = encode_publish(message, accepted_us=time.time_ns() // 1000)
        return self._intake.accept(frame, qos=message.qos)

    # -- its files --

    def open(self) -> None:
        """Open the lane if there is one, or devices have P2P topics. Idempotent.

        Raises:
            LaneError: it cannot be used.
        """
        is_wanted = self._writer is None and self._rules.parents
        if self._lane is not None or not (is_wanted or self._path.is_dir()):
            return
        max_bytes = self._spool.max_bytes
        lane: Lane | FollowedLane | None
        try:
            if self._writer is not None:
                lane = FollowedLane.open(self._path, max_bytes=max_bytes, target="", watcher=self._writer.watcher)
            else:
                lane = Lane.open(self._path, max_bytes=max_bytes, target="", durability=self._spool.durability)
            if lane is None:
                return
            try:
                self._reader = LaneReader(lane)
            except BaseException:
                lane.close()
                raise
        except LaneError as error:
            self._intake.refuse(str(error))
            raise
        self._lane = lane
        self._accepted_before = self.telemetry.outcomes["accepted"]
        self.telemetry.outcomes["accepted"] += lane.messages
        lane.watch(self._news.set)
        if isinstance(lane, Lane):
            self._intake.attach(lane)
        self.telemetry.rule_up(Trouble.LANE)
        self._opened.set()

    def watch(self) -> None:
        """Look after what has no event; called about once a second."""
        with contextlib.suppress(LaneError):
            self.open()
        self.telemetry.rule_has(Trouble.STORE, self._queue.problem if self.telemetry.in_flight else None)
        if self._writer is not None:
            self.telemetry.rule_has(Trouble.LANE, self._read_problem or self._writer.problem_of(RELAY_LANE))

    def refresh_gauges(self) -> None:
        """Bring the lane's gauges up to date; called before each scrape."""
        lane = self._lane
        if lane is None:
            return
        refresh_lane_gauges(self.telemetry, lane, accepted_before=self._accepted_before)
        with contextlib.suppress(LaneError):
            self.telemetry.lane_oldest_seconds = oldest_seconds(lane)

    def close(self) -> None:
        """Let files and locks go. Idempotent."""
        self._intake.close()
        if self._reader is not None and self._lane is not None:
            self._lane.watch(None)
            self._reader.close()
            self._lane.close()

    # -- its work --

    async def run(self) -> None:
        """Hand on what is in the lane until `finish`."""
        await self._opened.wait()
        while not self._finishing:
            self._news.clear()
            try:
                more = self._step()
            except LaneError as error:
                self._read_problem = str(error)
                self.telemetry.rule_down(Trouble.LANE, self._read_problem)
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception:  # noqa: BLE001 - a task's top edge: what is behind it waits
                logger.exception("unexpected error with P2P messages between devices, trying again")
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                if self._read_problem is not None:
                    self._read_problem = None
                    self.telemetry.rule_up(Trouble.LANE)
                await (asyncio.sleep(0) if more else self._news.wait())
                await self._host.available()

    def _step(self) -> bool:
        """Hand on what can be read now; return whether there may be more."""
        assert self._reader is not None  # noqa: S101 - `_opened`
        entries = self._reader.read(max_messages=_STEP_MESSAGES, max_bytes=_AHEAD_BYTES - self._ahead_bytes)
        self.telemetry.in_flight += len(entries)
        for entry in entries:
            self._ahead_bytes += len(entry.frame.payload) + _OVERHEAD_BYTES
            try:
                self._hand(entry)
            except Exception:  # noqa: BLE001 - input from outside: one message must not stop those behind it
                logger.exception("{} offset {}: unexpected error, dropped", self._path, entry.offset)
                self._settled(entry, "", Delivery(Outcome.DROPPED, DropReason.UNREADABLE))
        return bool(entries)

    def _hand(self, entry: Entry) -> None:
        frame = entry.frame
        address = topics.p2p_address(frame.topic)
        if address is None:
            logger.error("{} offset {}: not a P2P topic, dropped: {}", self._path, entry.offset, frame.topic)
            self._settled(entry, "", Delivery(Outcome.DROPPED, DropReason.UNREADABLE))
            return
        rule = self._rules.parent_rule(topics.parent_of(frame.topic))
        rule_id = "" if rule is None else rule.id
        message = _message(frame)
        seconds = None if message.properties is None else message.properties.expiry_seconds
        if seconds == 0:
            # Deliver at once or never.
            message = replace(message, clean_session=True)
        self._queue.hand(
            address.client_id,
            message,
            partial(self._settled, entry, rule_id),
            rule_id=rule_id,
            handed=_nothing,
            expires_ms=expiry.deadline(frame.accepted_us // 1000, seconds or None),
        )

    def _settled(self, entry: Entry, rule_id: str, delivery: Delivery) -> None:
        assert self._reader is not None  # noqa: S101 - it was read from there
        rule = self._all_telemetry.rules.get(rule_id)
        # The rule may be gone by now, and its counters with it.
        if rule is not None and delivery.outcome is Outcome.DROPPED:
            rule.dropped(delivery.reason or DropReason.DISCONNECTED)
        self.telemetry.outcomes["sent"] += 1
        self.telemetry.in_flight -= 1
        self._ahead_bytes -= len(entry.frame.payload) + _OVERHEAD_BYTES
        self._reader.settle([entry.offset])
        self._news.set()

    def finish(self) -> None:
        """Hand nothing more on. Idempotent."""
        self._finishing = True
        self._opened.set()
        self._news.set()

    async def settled(self) -> None:
        """Return when it is known what became of all that was handed on."""
        while self.telemetry.in_flight:
            self._news.clear()
            await self._news.wait()


def _message(frame: Frame) -> MqttMessage:
    try:
        properties = frame.mqtt_properties
    except UnmappableMessageError:
        # A faulty writer's: the payload is still what the device sent.
        properties = None
    return MqttMessage(
        frame.topic,
        frame.payload,
        frame.qos,
        client_id=frame.client_id,
        clean_session=frame.clean_session,
        properties=properties,
    )


def _nothing() -> None:
    """Latency is measured from RocketMQ to devices, not between devices."""
