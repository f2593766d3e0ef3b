"""What one connection publishes, on its way to the lanes, to a P2P receiver, and into amqtt's own routing.

Order: the broker's ACL, the lane, the acknowledgement. With no ACL plugin and space in the lane all of it happens in
the call that reads the packet.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Protocol

from loguru import logger

from mq2mqtt import topics
from mq2mqtt.host import Intake, TopicRoute
from mq2mqtt.message import MqttMessage
from mq2mqtt_amqtt.packets import (
    PUBACK,
    PUBCOMP,
    PUBREC,
    MalformedPacketError,
    Publish,
    acknowledgement,
)
from mq2mqtt_amqtt.wire import Wire

__all__ = ["PAUSE_AT", "RESUME_AT", "Publishes", "Routing"]

PAUSE_AT: Final = 256
RESUME_AT: Final = 128
"""Waiting publishes of a connection at which reading from it pauses and resumes (design section 9)."""

MAX_UNRELEASED: Final = 10_000
"""QoS 2 publishes of a session between PUBREC and PUBREL; MQTT 3.1.1 lets a client send 65 535 of any size."""

MAX_UNRELEASED_BYTES: Final = 32 * 1024 * 1024
"""Of their topics and payloads; one publish may always be held. More than the usual windows of 10 or 20 need."""

_SETTLE_SECONDS = 5.0


class Routing(Protocol):
    """What `Publishes` needs of the broker, for one connection."""

    @property
    def intake(self) -> Intake | None:
        """Where publishes go; `None` while the bridge is not running."""

    @property
    def restricted(self) -> bool:
        """Whether any plugin filters topics."""

    async def may_publish(self, topic: str) -> bool:
        """Ask the plugins that filter topics."""

    def pass_on(self, publish: Publish) -> None:
        """Hand to amqtt's routing what is permitted and durable."""

    def keep_private(self, publish: Publish) -> None:
        """Tell the broker's plugins of a publish that amqtt must not route: refused, or P2P."""

    def backlog(self) -> int:
        """How many publishes of this connection wait in amqtt's routing."""

    def fail(self, problem: str) -> None:
        """Close the connection: the device must send again what is not acknowledged."""


class Publishes:
    """The publishes of one connection.

    `unreleased` are the session's QoS 2 publishes between PUBREC and PUBREL: a persistent session's outlive the
    connection (section 4.1 of MQTT 3.1.1), and a publish leaves it only when it is acknowledged.
    """

    def __init__(
        self, *, routing: Routing, wire: Wire, client_id: str, clean_session: bool, unreleased: dict[int, Publish]
    ) -> None:
        self._routing = routing
        self._wire = wire
        self._client_id = client_id
        self._clean_session = clean_session
        self._unreleased = unreleased
        self._releasing: set[int] = set()
        # Of those without PUBREL: with it they wait as publishes of QoS 1 do, bounded by PAUSE_AT.
        self._unreleased_bytes = sum(map(_size, unreleased.values()))
        self._unchecked: deque[Publish] = deque()  # bounded: reading pauses at PAUSE_AT
        self._checker: asyncio.Task[None] | None = None
        # With what is still to be done for a publish, once it waits no more.
        self._waiting: dict[asyncio.Future[None], tuple[Publish, Callable[[], None]]] = {}
        self._room: asyncio.Future[None] | None = None

    def take(self, publish: Publish) -> None:
        """A PUBLISH came.

        Raises:
            MalformedPacketError: MQTT has the connection closed for it.
        """
        topic = publish.topic
        if topic.startswith("$"):
            if not topics.is_legacy_request(topic):
                raise MalformedPacketError(f"[MQTT-4.7.2-1] a client may not publish to {topic}")
        elif problem := topics.topic_problem(topic):
            raise MalformedPacketError(f"[MQTT-3.3.2-1] the topic {problem}")
        if publish.qos < 2:  # noqa: PLR2004 - QoS 2
            self._submit(publish)
            return
        if publish.packet_id not in self._releasing:
            self._hold(publish)
        self._wire.write(acknowledgement(PUBREC, publish.packet_id))

    def _hold(self, publish: Publish) -> None:
        """Keep a QoS 2 publish until its PUBREL.

        Raises:
            MalformedPacketError: the session has too much of them.
        """
        number = publish.packet_id
        # MQTT-4.3.3-2: until PUBREL, a PUBLISH with the same identifier is the same message, sent again. The last one
        # counts: a client that has lost its state gives new messages the old identifiers.
        before = self._unreleased.get(number)
        if before is None and len(self._unreleased) >= MAX_UNRELEASED:
            raise MalformedPacketError(f"more than {MAX_UNRELEASED} QoS 2 messages without PUBREL")
        others = self._unreleased_bytes - (0 if before is None else _size(before))
        total = others + _size(publish)
        # What a session has from an earlier connection may be more, and is sent again all the same.
        if others and total > max(MAX_UNRELEASED_BYTES, self._unreleased_bytes):
            raise MalformedPacketError(f"more than {MAX_UNRELEASED_BYTES} bytes of QoS 2 messages without PUBREL")
        self._unreleased[number] = publish
        self._unreleased_bytes = total

    def release(self, number: int) -> None:
        """A PUBREL came."""
        if number in self._releasing:
            return
        publish = self._unreleased.get(number)
        if publish is None:
            # The message was acknowledged before, or its session is gone: the sender has dropped it at PUBREC and
            # would repeat PUBREL for ever.
            self._wire.write(acknowledgement(PUBCOMP, number))
            return
        self._releasing.add(number)
        self._unreleased_bytes -= _size(publish)
        self._submit(publish)

    def _submit(self, publish: Publish) -> None:
        if not self._routing.restricted:
            self._admit(publish)
            return
        self._unchecked.append(publish)
        if self._checker is None:
            self._checker = asyncio.create_task(self._check(), name=f"mq2mqtt.acl[{self._client_id}]")

    async def _check(self) -> None:
        """Ask for permission one by one: the answers of concurrent calls could overtake each other."""
        try:
            while self._unchecked:
                publish = self._unchecked[0]
                if topics.is_legacy_request(publish.topic) or await self._routing.may_publish(publish.topic):
                    self._admit(publish)
                else:
                    self._refuse(publish)
                self._unchecked.popleft()
                self._make_room()
        except Exception:  # noqa: BLE001 - a task's top edge: the plugins are somebody else's
            logger.exception("client {}: a plugin failed to say whether it may publish", self._client_id)
            self._routing.fail("internal error")
        finally:
            self._checker = None

    def _admit(self, publish: Publish) -> None:
        if topics.is_legacy_request(publish.topic):
            self._acknowledge(publish)
            return
        intake = self._routing.intake
        route = intake.route(publish.topic) if intake is not None else None
        if intake is None or route is None:
            self._routing.pass_on(publish)
            self._acknowledge(publish)
            return
        if intake.over_limit(publish.topic, len(publish.payload)):
            self._refuse(publish)
            return
        message = MqttMessage(
            publish.topic,
            publish.payload,
            publish.qos,
            publish.retain and route.p2p_target is None,
            self._client_id,
            self._clean_session,
        )
        waiting = intake.accept(route, message) if route.outbound is not None else None
        if waiting is None:
            self._accepted(publish, route, message)
        else:
            self._wait(waiting, publish, partial(self._accepted, publish, route, message))

    def _wait(self, waiting: Awaitable[None], publish: Publish, then: Callable[[], None]) -> None:
        future = asyncio.ensure_future(waiting)
        self._waiting[future] = (publish, then)
        future.add_done_callback(self._wait_ended)

    def _wait_ended(self, future: "asyncio.Future[None]") -> None:
        publish, then = self._waiting.pop(future)
        self._make_room()
        if future.cancelled():
            if self._unreleased.get(publish.packet_id) is publish:  # QoS 2
                self._releasing.discard(publish.packet_id)
                self._unreleased_bytes += _size(publish)
        elif error := future.exception():
            logger.error("client {}: publish to {} not accepted: {}", self._client_id, publish.topic, error)
            self._routing.fail("a publish could not be accepted")
        else:
            then()

    def _accepted(self, publish: Publish, route: TopicRoute, message: MqttMessage) -> None:
        """The outbound rule's lane has it, where there is one."""
        if route.p2p_target is None:
            self._routing.pass_on(publish)
            self._acknowledge(publish)
            return
        self._routing.keep_private(publish)
        intake = self._routing.intake
        waiting = intake.deliver_p2p(route, message) if intake is not None else None
        if waiting is None:
            self._acknowledge(publish)
        else:
            self._wait(waiting, publish, partial(self._acknowledge, publish))

    def _refuse(self, publish: Publish) -> None:
        # MQTT-3.3.5-2: without permission to publish, the server acknowledges all the same, or closes; amqtt does the
        # former.
        logger.debug("client {} may not publish to {}", self._client_id, publish.topic)
        self._routing.keep_private(publish)
        self._acknowledge(publish)

    def _acknowledge(self, publish: Publish) -> None:
        if publish.qos == 1:
            self._wire.write(acknowledgement(PUBACK, publish.packet_id))
        elif publish.qos:
            self._unreleased.pop(publish.packet_id, None)
            self._releasing.discard(publish.packet_id)
            self._wire.write(acknowledgement(PUBCOMP, publish.packet_id))

    @property
    def full(self) -> bool:
        """Whether reading from the connection must pause."""
        return self._load() >= PAUSE_AT

    def _load(self) -> int:
        return len(self._unchecked) + len(self._waiting) + self._routing.backlog()

    def room(self) -> "asyncio.Future[None]":
        """Return what is done when reading may go on."""
        if self._room is None or self._room.done():
            self._room = asyncio.get_running_loop().create_future()
            self._make_room()
        return self._room

    def _make_room(self) -> None:
        if self._room is not None and not self._room.done() and self._load() <= RESUME_AT:
            self._room.set_result(None)

    def moved_on(self) -> None:
        """Look again: the broker's routing has taken a publish."""
        if self._room is not None:
            self._make_room()

    async def close(self) -> None:
        """The connection has ended: finish what only waits for plugins, give up what waits for a lane. Idempotent.

        What is given up was not acknowledged, and the device sends it again.
        """
        if self._checker is not None:
            await asyncio.wait({self._checker}, timeout=_SETTLE_SECONDS)
        if self._checker is not None:
            self._checker.cancel()
        for future in tuple(self._waiting):
            future.cancel()


def _size(publish: Publish) -> int:
    return len(publish.topic) + len(publish.payload)
