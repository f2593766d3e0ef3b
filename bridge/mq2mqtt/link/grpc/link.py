"""`GrpcLink`: one producer for all rules, one consumer for each subscription."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from mq2mqtt.errors import ConfigError, LinkError, NotConnectedError, TopicNotFoundError
from mq2mqtt.link import ConsumeFrom, Queue, RocketLink, Subscription
from mq2mqtt.link.grpc import client
from mq2mqtt.link.grpc.answers import Answers
from mq2mqtt.link.grpc.outgoing import require_sendable
from mq2mqtt.link.grpc.reader import Reader
from mq2mqtt.link.grpc.route import Route, Routes
from mq2mqtt.link.grpc.subscription import GrpcSubscription
from mq2mqtt.message import RocketMessage
from mq2mqtt.rocketmq.tags import TagFilter

__all__ = ["GrpcLink"]

# Rules are probed every 2 s: none may be proven by what was asked on behalf of its last probe.
_PROBE_SECONDS = 1.5


class GrpcLink(RocketLink):
    """See `RocketLink`.

    Args:
        proxy: `host:port`, several IPv4 addresses with `;` between them.
        name: of this link among the members of a group.
        access_key: with `secret_key`, for a cluster with access control.
        secret_key: never shown.
        tls: whether the proxy is reached over TLS.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self, *, proxy: str, name: str, access_key: str | None = None, secret_key: str | None = None, tls: bool = False
    ) -> None:
        self.name = name
        self._config = client.configuration(proxy, access_key=access_key, secret_key=secret_key)
        self._tls = tls
        self._producer: client.LinkProducer | None = None
        self._closed = False
        self._answers = Answers(client.translate)
        self._routes = Routes(self._ask_route)
        self._held: dict[str, Route] = {}
        """By topic, what the producer was told of last."""
        self._subscriptions: dict[str, GrpcSubscription] = {}

    async def start(self) -> None:
        """Make ready (RocketLink)."""
        self._producer = await asyncio.to_thread(self._start_producer)

    def _start_producer(self) -> client.LinkProducer:
        producer = client.LinkProducer(self._config, tls_enable=self._tls)
        producer.startup()
        return producer

    async def close(self) -> None:
        """End everything (RocketLink)."""
        self._closed = True
        await self._routes.close()
        self._answers.close()
        producer, self._producer = self._producer, None
        ends = [subscription.close() for subscription in list(self._subscriptions.values())]
        if producer is not None:
            ends.append(asyncio.to_thread(producer.shutdown))
        # A proxy that hangs is waited for by all of them at once.
        await asyncio.gather(*ends)

    async def queues(self, topic: str) -> tuple[Queue, ...]:
        """Return as many queues as `topic` has; each is a message group of its own (RocketLink)."""
        self._open()
        route = await self._routes.get(topic)
        route.require_writable()
        return route.queues

    async def send(self, queue: Queue, messages: Sequence[RocketMessage]) -> None:
        """Store `messages` (RocketLink), one after the other: the client has no batches.

        What can be known to be illegal is refused before the first is sent. After another error those before the one
        that failed are stored, and will come again.
        """
        producer = self._open()
        for message in messages:
            require_sendable(message, max_body=producer.max_body)
        route = await self._routes.get(queue.topic)
        route.require_writable()
        group = route.group(queue)
        for message in messages:
            await self._answers.of(self._send(producer, message, group))

    def _send(self, producer: client.LinkProducer, message: RocketMessage, group: str) -> Future[Any]:
        if self._closed:
            raise NotConnectedError("the link is closed")
        try:
            future: Future[Any] = producer.send_async(client.outgoing(message, group=group))
        except Exception as error:
            # It knows the topic with another type than the proxy has by now, or the like.
            self._routes.forget(message.topic)
            self._held.pop(message.topic, None)
            raise LinkError(str(error)) from error
        return future

    async def probe(self, topic: str) -> None:
        """Prove that the proxy answers and has a route (RocketLink); of the brokers it says nothing."""
        await self._require_writing(topic, max_age=_PROBE_SECONDS)

    async def require_writing(self, topic: str) -> None:
        """Return when `topic` has a route that takes messages in order (RocketLink)."""
        await self._require_writing(topic, max_age=0.0)

    async def _require_writing(self, topic: str, *, max_age: float) -> None:
        self._open()
        (await self._routes.get(topic, max_age=max_age)).require_writable()

    async def subscribe(self, topic: str, group: str, *, tags: str, start: ConsumeFrom) -> Subscription:  # noqa: ARG002
        """Join `group` (RocketLink). Where it starts is RocketMQ's business: the client has no say.

        Raises:
            ConfigError: `tags` names no tag, or this link is in `group` already.
        """
        self._open()
        if group in self._subscriptions:
            raise ConfigError(f"consumer group {group} is subscribed twice; RocketMQ knows one topic for each member")
        reader = self._reader(topic, group, tags=tags)
        subscription = self._subscriptions[group] = GrpcSubscription(
            reader, name=self.name, left=lambda: self._subscriptions.pop(group, None)
        )
        return subscription

    def _reader(self, topic: str, group: str, *, tags: str) -> Reader:
        try:
            TagFilter(tags)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return Reader(config=self._config, tls=self._tls, topic=topic, group=group, tags=tags)

    async def require_reading(self, topic: str, group: str) -> None:
        """Return when `topic` has a route and `group` keeps order (RocketLink)."""
        self._open()
        (await self._routes.get(topic, max_age=0.0)).require_readable()
        reader = self._reader(topic, group, tags="*")
        try:
            await reader.connect()
        finally:
            await reader.close()

    async def topic_exists(self, topic: str) -> bool:
        """Whether the proxy has a route for `topic` (RocketLink); it believes what it heard for some seconds."""
        self._open()
        try:
            await self._routes.get(topic, max_age=0.0)
        except TopicNotFoundError:
            return False
        return True

    async def create_topic(self, topic: str, *, queues: int = 4) -> None:  # noqa: ARG002
        """Say that the protocol has no such request (RocketLink)."""
        raise LinkError(f"driver grpc can't create topic {topic}: mqadmin updateTopic -t {topic} -a +message.type=FIFO")

    def _open(self) -> client.LinkProducer:
        if self._closed or self._producer is None:
            raise NotConnectedError("the link is closed")
        return self._producer

    async def _ask_route(self, topic: str) -> Route:
        producer = self._open()
        route = client.to_route(topic, await self._answers.of(client.ask_route(producer, topic)))
        if self._held.get(topic) != route:
            # Before a send needs it: it would block the loop.
            await asyncio.to_thread(producer.hold_route, topic)
            self._held[topic] = route
        return route
