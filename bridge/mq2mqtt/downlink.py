"""From a RocketMQ topic to devices: each message is settled exactly once, with the best outcome of its receivers."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from loguru import logger

from mq2mqtt import expiry
from mq2mqtt.errors import BridgeError, LaneError, LinkError, UnmappableMessageError
from mq2mqtt.host import DELIVERY_TIMEOUT, Delivery, DropReason, MqttHost, Outcome, Settled
from mq2mqtt.link import ConsumeFrom, RocketLink, Subscription
from mq2mqtt.mapping import Inbound, is_own, to_mqtt
from mq2mqtt.message import MqttMessage, MqttProperties, ReceivedMessage
from mq2mqtt.receipts import Receipt, ReceiptBook
from mq2mqtt.replay import DownlinkReplay, Source, key_of
from mq2mqtt.rules import InboundRule
from mq2mqtt.settings import Limits
from mq2mqtt.spool.frame import Frame, FrameKind
from mq2mqtt.spool.parked import ParkedStore
from mq2mqtt.telemetry import RuleTelemetry, Trouble

__all__ = ["Downlink", "Keeper"]

_RETRY_SECONDS = 1.0
_SETTLING_SECONDS = DELIVERY_TIMEOUT + 5.0
"""Hosts have their outcome by then, and a database that is there has what is to be kept."""
_REACHED_NOBODY = frozenset((Outcome.NO_SUBSCRIBER, Outcome.DROPPED))
# A batch for a device takes less.
_TURN_SECONDS = 0.005
_LATEST_MS = (2**64 - 1) // 1000
"""A frame holds microseconds in 64 bits."""


def _frame(message: ReceivedMessage) -> Frame:
    """Return `message` as a parked record holds it."""
    text = "".join(f"{name}\x01{value}\x02" for name, value in message.properties.items())
    properties = text.encode("utf-8", "surrogateescape")
    # Its producer says when it was born: any number.
    born_us = min(max(message.born_ms, 0), _LATEST_MS) * 1000
    return Frame(FrameKind.ROCKETMQ, 0, born_us, "", message.topic, properties, message.body)


class Keeper(Protocol):
    """Who delivers P2P messages, or keeps them, and keeps what sessions miss: `mq2mqtt.offline.OfflineQueue`."""

    def hand(  # noqa: PLR0913 - a message and its circumstances
        self,
        client_id: str,
        message: MqttMessage,
        settled: Settled,
        *,
        rule_id: str,
        handed: Callable[[], None],
        expires_ms: int | None = None,
        receipt: str | None = None,
    ) -> None:
        """Deliver a P2P message, or keep it."""

    def missed(  # noqa: PLR0913 - a message and its circumstances
        self,
        client_id: str,
        message: MqttMessage,
        settled: Settled,
        *,
        rule_id: str,
        expires_ms: int | None = None,
        receipt: str | None = None,
    ) -> None:
        """Keep for a client's persistent session what it missed."""

    async def available(self) -> None:
        """Return when it can keep messages; what is given to it meanwhile waits in memory."""


class Downlink:
    """Carries one inbound rule's RocketMQ topic to the host."""

    def __init__(  # noqa: PLR0913 - the composition root names each
        self,
        *,
        rule: InboundRule,
        group: str,
        host: MqttHost,
        link: RocketLink,
        limits: Limits,
        parked: ParkedStore,
        queue: Keeper,
        receipts: ReceiptBook,
        telemetry: RuleTelemetry,
    ) -> None:
        self.rule = rule
        self.group = group
        self._host = host
        self._link = link
        self._limits = limits
        self._parked = parked
        self._queue = queue
        self._receipts = receipts
        self._telemetry = telemetry
        self._subscription: Subscription | None = None
        self._unreadable = 0
        """Of this subscription, counted."""
        self._outcome = asyncio.Event()
        self._replay = DownlinkReplay(parked, host, self._take_again, rule_id=rule.id)

    async def run(self) -> None:
        """Receive until cancelled; then `close`."""
        while True:
            try:
                await self._receive()
            except BridgeError as error:
                self._telemetry.rule_down(Trouble.LINK, str(error))
            except Exception:  # noqa: BLE001 - a task's top edge: one rule's bug must not stop the others
                logger.exception("rule {}: unexpected error, subscribing again", self.rule.id)
                self._telemetry.rule_down(Trouble.LINK, "internal error, see the log")
            if self._subscription is not None:
                await self._subscription.close()
                self._count_unreadable()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _receive(self) -> None:
        subscription = await self._link.subscribe(
            self.rule.source, self.group, tags=self.rule.tags, start=ConsumeFrom(self.rule.start)
        )
        self._subscription, self._unreadable = subscription, 0
        await self._host.available()
        async for batch in subscription:
            turn_ends = time.monotonic() + _TURN_SECONDS
            for message in batch:
                # The one before may be for thousands of sessions.
                await self._host.available()
                await self._queue.available()
                if time.monotonic() > turn_ends:
                    await asyncio.sleep(0)
                    turn_ends = time.monotonic() + _TURN_SECONDS
                self._telemetry.outcomes["received"] += 1
                self._telemetry.in_flight += 1
                self._take(subscription, message)
            # A batch is written in one go; other connections get their turn before the next.
            await asyncio.sleep(0)

    def _take_again(self, source: Source, message: ReceivedMessage) -> None:
        self._take(source, message)
        # One that has to stay where it is was not taken, and is not counted.
        self._telemetry.outcomes["received"] += 1
        self._telemetry.in_flight += 1

    def _take(self, source: Source, message: ReceivedMessage) -> None:
        """Settle `message` one way or another, whatever it holds.

        Raises:
            LaneError: see `_park`.
            ValueError: likewise.
        """
        try:
            self._hand_over(source, message)
        except UnmappableMessageError as error:
            self._park(source, message, error.reason)
        except Exception:  # noqa: BLE001 - input from outside: one message must not stop those behind it
            logger.exception("rule {}: unexpected error with a message", self.rule.id)
            self._park(source, message, "internal error, see the log")

    def _hand_over(self, source: Source, message: ReceivedMessage) -> None:
        if is_own(message.properties):
            self._telemetry.skipped()
            source.settle(message)
            return
        inbound = to_mqtt(message, parent=self.rule.target, limits=self._limits)
        for name in inbound.invalid:
            self._telemetry.invalid_properties[name] += 1
        if inbound.lifetime == 0:
            inbound = replace(inbound, message=self._now_or_never(inbound.message))
        settled = partial(self._settled, source, message)
        handed = partial(self._telemetry.handed, message.born_ms)
        expires_ms = expiry.deadline(message.born_ms, inbound.lifetime or None)
        receipt = None
        if inbound.wants_receipt and self.rule.receipts is not None:
            receipt = Receipt.of(message).text()
        if inbound.p2p_target is None:
            self._publish(inbound, settled, handed, expires_ms=expires_ms, receipt=receipt)
            return
        self._queue.hand(
            inbound.p2p_target,
            inbound.message,
            settled,
            rule_id=self.rule.id,
            handed=handed,
            expires_ms=expires_ms,
            receipt=receipt,
        )

    def _now_or_never(self, message: MqttMessage) -> MqttMessage:
        """Return a message with a lifetime of zero as the host gets it: to be delivered at once, or not at all."""
        message = replace(message, clean_session=True)
        if not self._host.sees_acknowledgements:
            # The broker keeps messages by itself, and takes an expiry of 0 for none.
            message = replace(message, properties=replace(message.properties or MqttProperties(), expiry_seconds=1))
        return message

    def _publish(
        self,
        inbound: Inbound,
        settled: Settled,
        handed: Callable[[], None],
        *,
        expires_ms: int | None,
        receipt: str | None,
    ) -> None:
        """Hand a message to the subscribers of its topic."""
        message, shown_topic = inbound.message, inbound.shown_topic
        if shown_topic is not None and not self._host.shows_topics:
            self._telemetry.invalid_properties["mqttRealTopic"] += 1
            shown_topic = None
        as_seen = message if shown_topic is None else replace(message, topic=shown_topic)
        if receipt is not None:
            settled = partial(self._answer, settled, receipt, as_seen.topic)
        missed = None
        if inbound.lifetime != 0:
            missed = partial(self._missed, as_seen, expires_ms, receipt)
        if expires_ms is not None:
            now_ms = time.time_ns() // 1_000_000
            if expiry.is_over(expires_ms, now_ms):
                settled(Delivery(Outcome.EXPIRED))
                return
            message = expiry.aged(message, expires_ms, now_ms)
        self._host.publish(message, settled, shown_topic=shown_topic, handed=handed, missed=missed)

    def _missed(  # noqa: PLR0913, PLR0917 - the first three are of the message, the rest of one receiver
        self,
        message: MqttMessage,
        expires_ms: int | None,
        receipt: str | None,
        client_id: str,
        qos: int,
        settled: Settled,
    ) -> None:
        self._queue.missed(
            client_id,
            replace(message, qos=qos),
            settled,
            rule_id=self.rule.id,
            expires_ms=expires_ms,
            receipt=receipt,
        )

    def _answer(self, settled: Settled, receipt: str, topic: str, delivery: Delivery) -> None:
        self._receipts.tell(self.rule.id, delivery.outcome, receipt, client_id="", topic=topic)
        settled(delivery)

    def _settled(self, source: Source, message: ReceivedMessage, delivery: Delivery) -> None:
        self._telemetry.settled(delivery)
        self._outcome.set()
        if source is self._replay and delivery.outcome in _REACHED_NOBODY:
            self._replay.park_again(message, f"replayed to nobody: {delivery.reason or delivery.outcome}")
        else:
            source.settle(message)

    def _park(self, source: Source, message: ReceivedMessage, reason: str) -> None:
        """Put `message` aside for an operator.

        Where the disk refuses, or a record cannot hold it, it is dropped: RocketMQ still has it, and bad input must not
        hold up what is behind it.

        Raises:
            LaneError: the disk refuses one that is replayed, which nobody else may have any more; it is not settled.
            ValueError: a record cannot hold it as it is now, likewise.
        """
        try:
            key = key_of(message)
            evicted = self._parked.append(_frame(message), key=key, reason=reason)
        except (LaneError, ValueError) as error:
            if source is self._replay:
                raise
            place = f"{message.broker}/{message.queue_id}/{message.offset}"
            logger.error(
                "rule {}: RocketMQ message {} dropped ({}), not parked: {}", self.rule.id, place, reason, error
            )
            self._telemetry.settled(Delivery(Outcome.DROPPED, DropReason.PARKING_FULL))
        else:
            self._telemetry.parked(key, reason, evicted=evicted)
        source.settle(message)

    def refresh_gauges(self) -> None:
        """Bring the gauges up to date; called before each scrape."""
        if self._subscription is not None:
            self._telemetry.lag = self._subscription.lag
        self._count_unreadable()

    def _count_unreadable(self) -> None:
        if self._subscription is not None:
            self._telemetry.unreadable(self._subscription.unreadable - self._unreadable)
            self._unreadable = self._subscription.unreadable

    def watch(self) -> None:
        """Bring the rule's state up to date, and look for what is to be replayed; called about once a second."""
        self._replay.look()
        subscription = self._subscription
        if subscription is None:
            return
        if subscription.problem is None:
            self._telemetry.rule_up(Trouble.LINK)
        else:
            self._telemetry.rule_down(Trouble.LINK, subscription.problem)

    async def check_group(self, node: str) -> None:
        """Look for another bridge in this rule's own group: it would take a share of the messages away."""
        if self._subscription is None or self.rule.group is not None:
            return
        try:
            members = await self._subscription.members()
        except LinkError:
            return  # `watch` tells what is wrong with the link
        strangers = [member.client_id for member in members if not member.ours]
        if strangers:
            reason = f"another bridge uses node {node} ({', '.join(strangers)}): give each bridge its own `node`"
            self._telemetry.rule_down(Trouble.GROUP, reason)
        else:
            self._telemetry.rule_up(Trouble.GROUP)

    async def close(self) -> None:
        """Wait for the outcome of what is in flight, commit it, and leave the group. `run` has been cancelled.

        What has none by then, as while the database is away, is not committed: it goes on to its outcome all the same,
        and comes again to whoever goes on at the group's place.
        """
        self._replay.stop()
        try:
            async with asyncio.timeout(_SETTLING_SECONDS):
                while self._telemetry.in_flight:
                    self._outcome.clear()
                    await self._outcome.wait()
        except TimeoutError:
            late = self._telemetry.in_flight
            logger.warning("rule {}: leaves its group, not waiting for {} messages any more", self.rule.id, late)
        finally:
            if self._subscription is not None:
                await self._subscription.close()
