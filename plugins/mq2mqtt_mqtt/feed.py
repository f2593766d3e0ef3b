"""What devices publish under the parent topic of an outbound rule: from the broker into the lane, then acknowledged."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from loguru import logger

from mq2mqtt.host import DropReason, Intake
from mq2mqtt.message import MqttMessage
from mq2mqtt_mosquitto.client import Incoming, MqttClient, MqttError, Subscription

__all__ = ["UNACKNOWLEDGED", "Feed", "subscribe"]

UNACKNOWLEDGED: Final = 256
"""Messages that the broker may send before one of them is acknowledged: what can wait for a full lane."""

_QOS: Final = 1
"""With QoS 2 the broker lets go of a message on PUBREC, before it is in the lane; the lane is at least once anyway."""


class Feed:
    """One subscription. Without a connection it holds nothing: the broker has what is not acknowledged.

    `problem` says why nothing comes although there is a connection.
    """

    def __init__(self, parent: str, *, intake: Intake, dropped: Callable[[str, DropReason], None]) -> None:
        self.topic_filter = f"{parent}/#"
        self.problem: str | None = f"not subscribed to {self.topic_filter} yet"
        self._intake = intake
        self._dropped = dropped
        # Bounded by `UNACKNOWLEDGED`.
        self._waiting: set[asyncio.Future[None]] = set()

    async def open(self, client: MqttClient) -> None:
        """Subscribe; raises as `subscribe` does."""
        await subscribe(client, self.topic_filter)

    def take(self, client: MqttClient, incoming: Incoming) -> None:
        """A message came."""
        route = self._intake.route(incoming.topic)
        if route is None or route.outbound is None:
            client.acknowledge(incoming)
            return
        if self._intake.over_limit(incoming.topic, len(incoming.payload)):
            self._dropped(route.outbound, DropReason.TOO_LARGE)
            client.acknowledge(incoming)
            return
        message = MqttMessage(
            incoming.topic,
            incoming.payload,
            incoming.qos,
            incoming.retain and route.p2p_target is None,
            properties=incoming.properties,
        )
        waiting = self._intake.accept(route, message)
        if waiting is None:
            client.acknowledge(incoming)
        else:
            self._wait(client, incoming, waiting)

    def _wait(self, client: MqttClient, incoming: Incoming, waiting: Awaitable[None]) -> None:
        future = asyncio.ensure_future(waiting)
        self._waiting.add(future)

        def ended(_: object) -> None:
            self._waiting.discard(future)
            if future.cancelled():
                return
            if error := future.exception():
                logger.error("{}: a publish could not be accepted: {}", self.topic_filter, error)
                # The broker sends it again in the next connection.
                client.close()
            else:
                client.acknowledge(incoming)

        future.add_done_callback(ended)

    def close(self) -> None:
        """Give up what waits for the lane: the broker sends it again. Idempotent."""
        for future in tuple(self._waiting):
            future.cancel()


async def subscribe(client: MqttClient, topic_filter: str) -> None:
    """Subscribe so that what comes can be kept.

    Raises:
        MqttError: the broker does not let us, or not so that it would send again what is not acknowledged.
    """
    if not client.limits.wildcards:
        raise MqttError(f"the broker takes no subscriptions with wildcards, and {topic_filter} is one")
    (granted,) = await client.subscribe(
        # Retained messages were exported when they were published.
        [Subscription(topic_filter, qos=_QOS, no_local=True, retained=False, as_published=True)]
    )
    if granted < _QOS:
        raise MqttError(f"the broker grants only QoS {granted} for {topic_filter}: it would keep nothing")
