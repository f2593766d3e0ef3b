"""Wills: published for a client that has gone without DISCONNECT, like any publish of it.

amqtt hands them to its routing unchecked. Here the ACL comes first, and the rules, as for every publish.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from amqtt.broker import Broker
from amqtt.session import Session
from loguru import logger

from mq2mqtt import topics
from mq2mqtt.host import TopicRoute
from mq2mqtt.message import MqttMessage
from mq2mqtt_amqtt.connection import Connection
from mq2mqtt_amqtt.roles import Host, Will

__all__ = ["Wills"]

MAX_WAITING: Final = 1000
"""Wills that wait for space in a lane. Their clients are gone and nobody repeats them; the next one is dropped."""


class Wills:
    """Publishes wills; keeps those that a lane cannot take yet."""

    def __init__(self, broker: Broker, host: Host) -> None:
        self._broker = broker
        self._host = host
        self._waiting: set[asyncio.Future[None]] = set()

    async def publish(self, connection: Connection, will: Will, session: Session) -> None:
        """Publish `will` unless its client may not: to the lanes, to a P2P receiver, or to amqtt's routing."""
        problem = "begins with $" if will.topic.startswith("$") else topics.topic_problem(will.topic)
        if problem is not None:
            logger.info("client {}: will dropped, its topic {}", connection.client_id, problem)
            return
        if self._host.restricted and not await self._host.may_publish(session, will.topic):
            logger.info("client {}: will dropped, it may not publish to {}", connection.client_id, will.topic)
            return
        intake = self._host.intake
        route = intake.route(will.topic) if intake is not None else None
        if intake is not None and route is not None:
            if intake.over_limit(will.topic, len(will.payload)):
                logger.info("client {}: will dropped, it is over a limit", connection.client_id)
                return
            self._export(connection, will, route)
        if route is None or route.p2p_target is None:
            await self._route(session, will)

    def _export(self, connection: Connection, will: Will, route: TopicRoute) -> None:
        intake = self._host.intake
        assert intake is not None  # noqa: S101 - the caller has just used it
        private = route.p2p_target is not None
        message = MqttMessage(
            will.topic,
            will.payload,
            will.qos,
            will.retain and not private,
            connection.client_id,
            connection.clean_session,
        )
        waiting = intake.accept(route, message, will=True) if route.outbound is not None else None
        hand_over = partial(intake.deliver_p2p, route, message) if private else _nothing
        self._wait(waiting, connection.client_id, hand_over)

    def _wait(
        self, waiting: Awaitable[None] | None, client_id: str, then: Callable[[], Awaitable[None] | None]
    ) -> None:
        """Let `waiting` come to its end, unless too many wills wait already, then wait for what `then` returns."""
        if waiting is None:
            if then is not _nothing:
                self._wait(then(), client_id, _nothing)
            return
        future = asyncio.ensure_future(waiting)
        if len(self._waiting) >= MAX_WAITING:
            logger.warning("client {}: will dropped, {} already wait", client_id, MAX_WAITING)
            future.cancel()
            return
        self._waiting.add(future)

        def accepted(done: "asyncio.Future[None]") -> None:
            self._waiting.discard(done)
            if done.cancelled():
                return
            if error := done.exception():
                logger.error("client {}: will not accepted: {}", client_id, error)
            else:
                self._wait(None, client_id, then)

        future.add_done_callback(accepted)

    async def _route(self, session: Session, will: Will) -> None:
        broker = self._broker
        await broker._broadcast_message(session, will.topic, will.payload, will.qos)  # noqa: SLF001 - as amqtt does
        if will.retain:
            await broker.retain_message(session, will.topic, will.payload, will.qos)

    def close(self) -> None:
        """Give up the wills that still wait."""
        for future in tuple(self._waiting):
            future.cancel()


def _nothing() -> None:
    """What is left to do with a will that only a lane takes."""
