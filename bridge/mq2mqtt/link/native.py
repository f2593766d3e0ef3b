"""The default driver: our own asyncio client of RocketMQ's remoting protocol."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ssl import SSLContext
from typing import cast

from mq2mqtt import __version__
from mq2mqtt.errors import (
    ConfigError,
    LinkError,
    MessageRejectedError,
    NotAuthorizedError,
    NotConnectedError,
    TopicNotFoundError,
)
from mq2mqtt.link import ConsumeFrom, GroupMember, Queue, RocketLink, Subscription
from mq2mqtt.message import ReceivedMessage, RocketBatch, RocketMessage
from mq2mqtt.rocketmq import (
    Client,
    EncodedMessages,
    MessageIllegal,
    NoPermission,
    NotConnected,
    RequestTimeout,
    RocketMQError,
    TopicNotFound,
    TopicRoute,
    WriteQueue,
    permissions,
)
from mq2mqtt.rocketmq import ReceivedMessage as NativeMessage
from mq2mqtt.rocketmq.consumer import Consumer
from mq2mqtt.rocketmq.liveness import Liveness
from mq2mqtt.rocketmq.puller import PrefetchBudget
from mq2mqtt.settings import RocketMQSettings, tls_context

__all__ = ["NativeLink", "library", "make_link", "map_errors"]

# Rules are probed every 2 s: none may be proven by what was asked on behalf of its last probe.
_PROBE_SECONDS = 0.5
_ROUTE_SECONDS = 1.5


def make_link(settings: RocketMQSettings, *, client_id: str) -> RocketLink:
    """Return a link that is not started (drivers.py).

    Raises:
        ConfigError: a setting is wrong.
    """
    return NativeLink(
        namesrv=settings.namesrv,
        client_id=client_id,
        access_key=settings.access_key,
        secret_key=settings.secret_key.get_secret_value() if settings.secret_key else None,
        tls=tls_context(settings.tls),
        address_map=settings.address_map,
    )


def library() -> str:
    """Return the client library in words (drivers.py)."""
    return f"mq2mqtt {__version__}"


@contextmanager
def map_errors() -> Iterator[None]:
    """Translate the client's errors into the bridge's; the only place that does.

    Raises:
        BridgeError: instead of a `RocketMQError`.
    """
    try:
        yield
    except NotConnected as error:
        raise NotConnectedError(str(error)) from error
    except TopicNotFound as error:
        raise TopicNotFoundError(str(error)) from error
    except NoPermission as error:
        raise NotAuthorizedError(str(error)) from error
    except MessageIllegal as error:
        raise MessageRejectedError(str(error)) from error
    except RocketMQError as error:
        raise LinkError(str(error)) from error


class NativeLink(RocketLink):
    """See `RocketLink`. One client, whose connections all rules share.

    Args:
        namesrv: name servers, `host:port`, several with `;` between them.
        client_id: unique among the bridges of a cluster, and the same after a restart.
        access_key: with `secret_key`, for a cluster with access control.
        secret_key: never shown.
        tls: true for TLS verified against the system's authorities; a context for anything else.
        address_map: a broker's address as RocketMQ announces it -> as this machine reaches it.
        request_timeout: seconds.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(  # noqa: PLR0913 - keyword-only, each a setting of its own
        self,
        *,
        namesrv: str,
        client_id: str,
        access_key: str | None = None,
        secret_key: str | None = None,
        tls: bool | SSLContext = False,
        address_map: Mapping[str, str] | None = None,
        request_timeout: float = 3.0,
    ) -> None:
        try:
            self._client = Client(
                namesrv=namesrv,
                client_id=client_id,
                access_key=access_key,
                secret_key=secret_key,
                tls=tls,
                address_map=address_map,
                request_timeout=request_timeout,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._liveness = Liveness(self._client)
        self._budget = PrefetchBudget()
        self._subscriptions: dict[str, _NativeSubscription] = {}
        self._queues: dict[str, tuple[tuple[WriteQueue, ...], tuple[Queue, ...]]] = {}
        self._silent: set[str] = set()
        """Brokers that let a send go without an answer, until they answer something."""

    async def start(self) -> None:
        """Make ready (RocketLink)."""
        await self._client.start()

    async def close(self) -> None:
        """End everything (RocketLink)."""
        await asyncio.gather(*(subscription.close() for subscription in list(self._subscriptions.values())))
        await self._liveness.close()
        await self._client.close()

    async def queues(self, topic: str) -> tuple[Queue, ...]:
        """Return the writable queues of `topic` (RocketLink)."""
        with map_errors():
            native = await self._client.queues(topic)
        known = self._queues.get(topic)
        # A route that has not changed has the same tuple. An uplink asks with each step that it takes.
        if known is None or known[0] is not native:
            known = self._queues[topic] = native, tuple(Queue(topic, queue.broker, queue.queue_id) for queue in native)
        return known[1]

    async def send(self, queue: Queue, messages: Sequence[RocketMessage]) -> None:
        """Store `messages` in `queue` (RocketLink)."""
        sendable: Sequence[RocketMessage] | EncodedMessages = messages
        # One message alone has its properties in the request's header: not worth a second shortcut.
        if isinstance(messages, RocketBatch) and len(messages) > 1:
            sendable = EncodedMessages(messages.bodies, messages.property_texts)
        with map_errors():
            if queue.broker in self._silent:
                await self._until_answering(queue)
            try:
                await self._client.send(queue.topic, queue.broker, queue.queue_id, sendable)
            except RequestTimeout:
                # It may be stored yet. A broker that is paused would store it as often as it was sent.
                self._silent.add(queue.broker)
                raise

    async def _until_answering(self, queue: Queue) -> None:
        route = await self._client.route(queue.topic, max_age=float("inf"))
        if address := route.master(queue.broker):
            await self._liveness.check(address, max_age=_PROBE_SECONDS)
        self._silent.discard(queue.broker)

    async def probe(self, topic: str) -> None:
        """Prove that `topic` can be written (RocketLink).

        The brokers' answers are at most 0.5 seconds old, the route 1.5; rules share both. A known topic needs no name
        server: as long as none says that it is gone, it is the brokers who take messages.
        """
        with map_errors():
            known = await self._client.route(topic, max_age=float("inf"))
            await asyncio.gather(self._prove_routed(topic), self._prove_answering(known))

    async def _prove_routed(self, topic: str) -> None:
        try:
            await self._client.route(topic, max_age=_ROUTE_SECONDS)
        except (NotConnected, RequestTimeout):
            return
        except TopicNotFound:
            # A name server that has just started knows no topic until the brokers report: they know.
            await permissions.require_writing(self._client, topic)
            return
        await self._client.queues(topic)

    async def _prove_answering(self, route: TopicRoute) -> None:
        queues = route.write_queues or await self._client.queues(route.topic)
        addresses = {address for queue in queues if (address := route.master(queue.broker))}
        await asyncio.gather(*(self._liveness.check(address, max_age=_PROBE_SECONDS) for address in addresses))

    async def subscribe(self, topic: str, group: str, *, tags: str, start: ConsumeFrom) -> Subscription:
        """Join `group` (RocketLink).

        Raises:
            ConfigError: `tags` names no tag, or this link is in `group` already.
        """
        if group in self._subscriptions:
            raise ConfigError(f"consumer group {group} is subscribed twice; RocketMQ knows one topic for each member")
        try:
            consumer = Consumer(
                self._client,
                group=group,
                topic=topic,
                tags=tags,
                start="earliest" if start is ConsumeFrom.EARLIEST else "latest",
                liveness=self._liveness,
                budget=self._budget,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        subscription = self._subscriptions[group] = _NativeSubscription(self, consumer, self._client.client_id)
        consumer.start()
        return subscription

    async def require_writing(self, topic: str) -> None:
        """Return when `topic` would be written (RocketLink)."""
        with map_errors():
            await permissions.require_writing(self._client, topic)

    async def require_reading(self, topic: str, group: str) -> None:
        """Return when `topic` could be consumed (RocketLink)."""
        with map_errors():
            await permissions.require_reading(self._client, topic, group)

    async def topic_exists(self, topic: str) -> bool:
        """Whether a name server has a route for `topic` (RocketLink)."""
        with map_errors():
            return await self._client.topic_exists(topic)

    async def create_topic(self, topic: str, *, queues: int = 4) -> None:
        """Create `topic` (RocketLink)."""
        with map_errors():
            await self._client.create_topic(topic, queues=queues)

    def forget(self, group: str) -> None:
        """A subscription is closed: its group may be joined again."""
        self._subscriptions.pop(group, None)


class _NativeSubscription(Subscription):
    def __init__(self, link: NativeLink, consumer: Consumer, client_id: str) -> None:
        self._link = link
        self._consumer = consumer
        self._client_id = client_id
        self._closed = False

    @property
    def problem(self) -> str | None:
        return self._consumer.problem

    @property
    def lag(self) -> int:
        return self._consumer.lag

    @property
    def unreadable(self) -> int:
        return self._consumer.undecodable

    async def members(self) -> tuple[GroupMember, ...]:
        with map_errors():
            # One that has just reconnected is listed for both of its connections.
            client_ids = sorted(set(await self._consumer.members()))
        return tuple(GroupMember(client_id, ours=client_id == self._client_id) for client_id in client_ids)

    def __aiter__(self) -> AsyncIterator[Sequence[ReceivedMessage]]:
        return self._consumer

    def settle(self, message: ReceivedMessage) -> None:
        # Whatever is settled came from the consumer.
        self._consumer.settle(cast("NativeMessage", message))

    async def close(self) -> None:
        await self._consumer.close()
        if not self._closed:
            self._closed = True
            self._link.forget(self._consumer.group)
