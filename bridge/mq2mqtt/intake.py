"""From a host adapter into the lanes: what the rules say about a publish, and its durable acceptance before PUBACK."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Mapping
from functools import partial

from loguru import logger

from mq2mqtt import topics
from mq2mqtt.errors import FrameTooLargeError, LaneError
from mq2mqtt.host import Delivery, DropReason, MqttHost, Outcome, TopicRoute
from mq2mqtt.message import ClientEvent, MqttMessage
from mq2mqtt.rules import RuleSet
from mq2mqtt.settings import Limits
from mq2mqtt.spool.frame import encode_publish
from mq2mqtt.spool.lane import Lane
from mq2mqtt.telemetry import RuleTelemetry, Telemetry, Trouble

__all__ = ["BridgeIntake", "LaneIntake"]

_ROUTE_CACHE = 50_000
# A full disk gives no sign when space is back: a lane with waiting publishes is tried again at this pace.
_RETRY_SECONDS = 0.25


class LaneIntake:
    """The writing end of one outbound rule's lane.

    What does not fit waits in order, bounded by the adapters: 256 publishes of a connection (design section 9).
    """

    def __init__(self, *, lane: Lane, telemetry: RuleTelemetry) -> None:
        self._lane = lane
        self._telemetry = telemetry
        # Bounded as the class says: devices come back, so what a connection gave up must leave at once.
        self._waiting: OrderedDict[asyncio.Future[None], bytes] = OrderedDict()
        self._refused = False
        self._retry: asyncio.TimerHandle | None = None
        lane.on_space = self.space

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
            self._telemetry.dropped(DropReason.LANE_FULL)
            return None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = frame
        future.add_done_callback(self._forget)
        self._try_later()
        return future

    def _append(self, frame: bytes) -> Awaitable[None] | None:
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
        self._up()

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


class BridgeIntake:
    """Implements `mq2mqtt.host.Intake` over a rule set and its lanes."""

    def __init__(
        self, *, rules: RuleSet, lanes: Mapping[str, LaneIntake], limits: Limits, host: MqttHost, telemetry: Telemetry
    ) -> None:
        self._rules = rules
        self._lanes = lanes
        self._limits = limits
        self._host = host
        self._telemetry = telemetry
        self._routes: dict[str, TopicRoute | None] = {}

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
        if route.outbound is None:
            return None
        frame = encode_publish(message, accepted_us=time.time_ns() // 1000, will=will)
        return self._lanes[route.outbound].accept(frame, qos=message.qos)

    def deliver_p2p(self, route: TopicRoute, message: MqttMessage) -> None:
        """See `mq2mqtt.host.Intake.deliver_p2p`. Nobody waits for the outcome; a drop is counted for `p2p_rule`."""
        if route.p2p_target is None or route.p2p_rule is None:
            return
        telemetry = self._telemetry.rules[route.p2p_rule]
        self._host.deliver(route.p2p_target, message, partial(_count_drop, telemetry), handed=_nothing)

    def on_client_event(self, event: ClientEvent) -> None:
        """See `mq2mqtt.host.Intake.on_client_event`."""
        logger.debug("client {} {} on {} from {}", event.client_id, event.type, event.channel_id, event.client_ip)

    def close(self) -> None:
        """Take nothing more into any lane. Idempotent."""
        for lane in self._lanes.values():
            lane.close()


def _count_drop(telemetry: RuleTelemetry, delivery: Delivery) -> None:
    if delivery.outcome is Outcome.DROPPED:
        telemetry.dropped(delivery.reason or DropReason.DISCONNECTED)


def _nothing() -> None:
    """Latency is measured from RocketMQ to devices, not between devices."""
