"""From a host adapter into the lanes: what the rules say about a publish, and its durable acceptance before PUBACK."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Mapping
from functools import partial
from typing import Protocol

from loguru import logger

from mq2mqtt import topics
from mq2mqtt.errors import FrameTooLargeError, LaneError
from mq2mqtt.host import Delivery, DropReason, MqttHost, Outcome, TopicRoute
from mq2mqtt.message import ClientEvent, MqttMessage
from mq2mqtt.presence import Presence
from mq2mqtt.rules import RuleSet
from mq2mqtt.settings import Limits
from mq2mqtt.spool.frame import decode_frames, encode_publish
from mq2mqtt.spool.lane import Lane
from mq2mqtt.telemetry import RuleTelemetry, Telemetry, Trouble

__all__ = ["BridgeIntake", "LaneIntake", "Relay"]

_ROUTE_CACHE = 50_000
# A full disk gives no sign when space is back: a lane with waiting publishes is tried again at this pace.
_RETRY_SECONDS = 0.25


class LaneIntake:
    """The writing end of one outbound rule's lane.

    What does not fit waits in order, bounded by the adapters: 256 publishes of a connection (design section 9).
    So does everything while there is no lane, because it cannot be opened yet.
    """

    def __init__(self, *, telemetry: RuleTelemetry, lane: Lane | None = None) -> None:
        self._lane: Lane | None = None
        self._problem = "the lane is not open"
        self._telemetry = telemetry
        # Bounded as the class says: devices come back, so what a connection gave up must leave at once.
        self._waiting: OrderedDict[asyncio.Future[None], bytes] = OrderedDict()
        self._refused = False
        self._retry: asyncio.TimerHandle | None = None
        if lane is not None:
            self.attach(lane)

    def attach(self, lane: Lane) -> None:
        """Append to `lane` from now on, what waits first."""
        self._lane = lane
        lane.on_space = self.space
        self.space()

    def refuse(self, problem: str) -> None:
        """There is no lane, for this reason."""
        self._problem = problem
        self._telemetry.rule_down(Trouble.LANE, problem)

    def accept(self, frame: bytes, *, qos: int) -> Awaitable[None] | None:
        """Append `frame`; see `mq2mqtt.host.Intake.accept`."""
        if not self._waiting:
            try:
                durable = self._append(frame)
            except FrameTooLargeError:
                self._telemetry.dropped(DropReason.TOO_LARGE)
                return None
            except LaneError as error:
                self._down(error)
            else:
                if self._refused:
                    self._up()
                return durable
        if qos == 0:
            self._telemetry.dropped(DropReason.LANE_NOT_OPEN if self._lane is None else DropReason.LANE_FULL)
            return None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = frame
        future.add_done_callback(self._forget)
        self._try_later()
        return future

    def _append(self, frame: bytes) -> Awaitable[None] | None:
        if self._lane is None:
            raise LaneError(self._problem)
        self._lane.append(frame)
        self._telemetry.outcomes["accepted"] += 1
        return self._lane.durable()

    def _forget(self, future: asyncio.Future[None]) -> None:
        self._waiting.pop(future, None)

    def _down(self, error: LaneError) -> None:
        self._refused = True
        self._telemetry.rule_down(Trouble.LANE, str(error))

    def _up(self) -> None:
        self._refused = False
        self._telemetry.rule_up(Trouble.LANE)

    def space(self) -> None:
        """The lane may have space again: take what waits, in order."""
        while self._waiting:
            future, frame = next(iter(self._waiting.items()))
            if not future.done():
                try:
                    durable = self._append(frame)
                except FrameTooLargeError:
                    self._telemetry.dropped(DropReason.TOO_LARGE)
                    durable = None
                except LaneError as error:
                    self._down(error)
                    self._try_later()
                    return
                _complete(future, durable)
            self._forget(future)
        if self._lane is not None:
            self._up()

    def give_up_waiting(self) -> list[tuple[asyncio.Future[None], bytes]]:
        """Return what waits, in order, and forget it."""
        waiting = [(future, frame) for future, frame in self._waiting.items() if not future.done()]
        self._waiting.clear()
        return waiting

    def take_over(self, future: asyncio.Future[None], frame: bytes) -> None:
        """Let what another lane gave up wait here; `space` takes it in."""
        self._waiting[future] = frame
        future.add_done_callback(self._forget)

    def _try_later(self) -> None:
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._retry_now)

    def _retry_now(self) -> None:
        self._retry = None
        # Without anybody who waits nothing would be proven.
        if self._waiting:
            self.space()

    def close(self) -> None:
        """Take nothing more; who still waits is never acknowledged."""
        if self._retry is not None:
            self._retry.cancel()
        for future in tuple(self._waiting):
            future.cancel()
        self._waiting.clear()


def _complete(future: asyncio.Future[None], durable: Awaitable[None] | None) -> None:
    if durable is None:
        future.set_result(None)
        return

    def copy(done: asyncio.Future[None]) -> None:
        if future.done():
            return
        if done.cancelled():
            future.cancel()
        elif error := done.exception():
            future.set_exception(error)
        else:
            future.set_result(None)

    asyncio.ensure_future(durable).add_done_callback(copy)


class Relay(Protocol):
    """Who takes P2P publishes that are to be kept: `mq2mqtt.relay.P2PRelay`."""

    def accept(self, message: MqttMessage) -> Awaitable[None] | None:
        """Put a P2P publish where it is kept until its outcome is known; see `mq2mqtt.host.Intake.accept`."""


class BridgeIntake:
    """Implements `mq2mqtt.host.Intake` over a rule set and its lanes. Without a `relay` no P2P publish is kept."""

    def __init__(  # noqa: PLR0913 - the composition root names each
        self,
        *,
        rules: RuleSet,
        lanes: Mapping[str, LaneIntake],
        limits: Limits,
        host: MqttHost,
        presence: Presence,
        telemetry: Telemetry,
        relay: Relay | None = None,
    ) -> None:
        self._rules = rules
        self._lanes = lanes
        self._limits = limits
        self._host = host
        self._presence = presence
        self._relay = relay
        self._telemetry = telemetry
        self._routes: dict[str, TopicRoute | None] = {}

    def apply(self, rules: RuleSet, lanes: Mapping[str, LaneIntake]) -> None:
        """Go by other rules from now on; `lanes` are those of the enabled outbound ones, by rule id.

        A publish that waits for space is not accepted yet, so it goes where the new rules send its topic. Where that
        is nowhere it is let through as if it came now: the devices of a deleted rule must not wait for its lane.
        """
        waiting = [item for lane in self._lanes.values() for item in lane.give_up_waiting()]
        self._rules = rules
        self._lanes = lanes
        self._routes.clear()
        for future, frame in waiting:
            (decoded,), _ = decode_frames(frame, 0, max_frames=1)
            owner = rules.outbound(decoded.topic)
            if owner is None:
                future.set_result(None)
            else:
                lanes[owner.id].take_over(future, frame)
        if waiting:
            for lane in lanes.values():
                lane.space()

    def route(self, topic: str) -> TopicRoute | None:
        """See `mq2mqtt.host.Intake.route`; remembers the last topics asked for."""
        try:
            return self._routes[topic]
        except KeyError:
            if len(self._routes) >= _ROUTE_CACHE:
                self._routes.clear()
            route = self._routes[topic] = self._find(topic)
            return route

    def _find(self, topic: str) -> TopicRoute | None:
        # MQTT-4.7.2-1: `$` topics are the broker's own; a topic that is none closes its connection.
        if topic.startswith("$") or topics.topic_problem(topic) is not None:
            return None
        parent = self._rules.parent_rule(topics.parent_of(topic))
        if parent is None:
            return None
        outbound = self._rules.outbound(topic)
        address = topics.p2p_address(topic)
        if outbound is None and address is None:
            return None
        return TopicRoute(
            outbound=None if outbound is None else outbound.id,
            p2p_target=None if address is None else address.client_id,
            p2p_rule=None if address is None else parent.id,
        )

    def over_limit(self, topic: str, payload_bytes: int) -> bool:
        """See `mq2mqtt.host.Intake.over_limit`."""
        limits = self._limits
        return (limits.payload_bytes is not None and payload_bytes > limits.payload_bytes) or (
            limits.topic_chars is not None and len(topic) > limits.topic_chars
        )

    def accept(self, route: TopicRoute, message: MqttMessage, *, will: bool = False) -> Awaitable[None] | None:
        """See `mq2mqtt.host.Intake.accept`."""
        lane = self._lanes.get(route.outbound) if route.outbound is not None else None
        if lane is None:
            return None
        frame = encode_publish(message, accepted_us=time.time_ns() // 1000, will=will)
        return lane.accept(frame, qos=message.qos)

    def deliver_p2p(self, route: TopicRoute, message: MqttMessage) -> Awaitable[None] | None:
        """See `mq2mqtt.host.Intake.deliver_p2p`. Nobody waits for the outcome; a drop is counted for `p2p_rule`."""
        if route.p2p_target is None or route.p2p_rule is None:
            return None
        if self._relay is not None and message.qos and not message.clean_session and self._host.sees_clients:
            return self._relay.accept(message)
        settled = partial(self._p2p_settled, route.p2p_rule)
        self._host.deliver(route.p2p_target, message, settled, handed=_nothing)
        return None

    def _p2p_settled(self, rule_id: str, delivery: Delivery) -> None:
        telemetry = self._telemetry.rules.get(rule_id)
        # The rule may be gone by now, and its counters with it.
        if telemetry is not None and delivery.outcome is Outcome.DROPPED:
            telemetry.dropped(delivery.reason or DropReason.DISCONNECTED)

    def on_client_event(self, event: ClientEvent) -> None:
        """See `mq2mqtt.host.Intake.on_client_event`."""
        logger.debug("client {} {} on {} from {}", event.client_id, event.type, event.channel_id, event.client_ip)
        self._presence.take(event)

    def close(self) -> None:
        """Take nothing more into any lane. Idempotent."""
        for lane in self._lanes.values():
            lane.close()


def _nothing() -> None:
    """Latency is measured from RocketMQ to devices, not between devices."""
