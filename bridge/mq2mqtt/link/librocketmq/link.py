"""The link over librocketmq: it knows the routes, and checks and shares out what is asked of it."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Final, NamedTuple, TypeVar

from mq2mqtt.errors import ConfigError, LinkError, MessageRejectedError, NotConnectedError, TopicNotFoundError
from mq2mqtt.link import ConsumeFrom, Queue, RocketLink, Subscription
from mq2mqtt.link.librocketmq.clients import Client, Consumer, Credentials, Library, Producer, PullStatus
from mq2mqtt.link.librocketmq.proving import PROVING_GROUP, Prover, no_answer
from mq2mqtt.link.librocketmq.reading import FAR
from mq2mqtt.link.librocketmq.receiving import LibrocketmqSubscription
from mq2mqtt.link.librocketmq.sending import Senders
from mq2mqtt.message import RocketMessage
from mq2mqtt.rocketmq import MessageIllegal
from mq2mqtt.rocketmq.codec import encoded_size
from mq2mqtt.rocketmq.names import parse_addresses
from mq2mqtt.rocketmq.tags import TagFilter

__all__ = ["LibrocketmqLink"]

_ROUTE_SECONDS: Final = 5.0
_CONNECT_SECONDS: Final = 3.0
_GROUP: Final = "GID_mq2mqtt"

_Result = TypeVar("_Result")
_ClientT = TypeVar("_ClientT", bound=Client)
_Part = TypeVar("_Part")


class _Route(NamedTuple):
    """A topic's queues as of a moment; `indexes` are their places in the library's own list."""

    queues: tuple[Queue, ...]
    indexes: dict[Queue, int]
    known_at: float


class LibrocketmqLink(RocketLink):
    """See `RocketLink`, and `mq2mqtt.link.drivers` for what it can't do.

    A topic is known by its readable queues, the only ones that the library lists.

    Args:
        library: that is loaded.
        namesrv: name servers, `host:port`, several with `;` between them.
        client_id: unique among the links of this process.
        credentials: for a cluster with access control.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(self, library: Library, *, namesrv: str, client_id: str, credentials: Credentials | None) -> None:
        try:
            self._addresses = parse_addresses(namesrv)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._library = library
        self._client_id = client_id
        self._credentials = credentials
        self._producer: Producer | None = None
        self._consumer: Consumer | None = None
        self._prover: Prover | None = None
        self._senders: dict[str, Senders] = {}
        """By broker."""
        # What waits for the thread is bounded by the callers, who each wait for their own.
        self._router = ThreadPoolExecutor(1, thread_name_prefix="librocketmq-route")
        self._routes: dict[str, _Route] = {}
        self._met: set[str] = set()
        self._meeting = asyncio.Lock()
        self._subscriptions: dict[str, LibrocketmqSubscription] = {}
        self._stopping = threading.Event()
        self._closing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Make ready (RocketLink).

        Raises:
            ConfigError: the library refuses a setting.
        """

        def start() -> tuple[Producer, Consumer]:
            producer, consumer = self.new_client(Producer, _GROUP), self.new_client(Consumer, PROVING_GROUP)
            producer.start()
            consumer.start()
            return producer, consumer

        self._producer, consumer = await _in(self._router, start)
        self._consumer, self._prover = consumer, Prover(consumer)

    def new_client(self, kind: type[_ClientT], group: str) -> _ClientT:
        """Return a client of the library that shares this link's connections, not started."""
        return kind(
            self._library,
            group,
            namesrv=";".join(self._addresses),
            instance=self._client_id,
            credentials=self._credentials,
        )

    async def close(self) -> None:
        """End everything (RocketLink)."""
        if self._closing is None:
            self._stopping.set()
            self._closing = asyncio.create_task(self._end(), name="mq2mqtt.librocketmq.close")
        await asyncio.shield(self._closing)

    async def _end(self) -> None:
        ends = [subscription.close() for subscription in list(self._subscriptions.values())]
        if self._prover is not None:
            ends.append(self._prover.close())
        await asyncio.gather(*ends)

        def end() -> None:
            # The library must not be left while another thread is in it.
            for senders in self._senders.values():
                senders.close()
            self._router.shutdown(cancel_futures=True)
            for client in (self._consumer, self._producer):
                if client is not None:
                    client.close()

        await asyncio.to_thread(end)

    async def queues(self, topic: str) -> tuple[Queue, ...]:
        """Return the queues of `topic` (RocketLink)."""
        return (await self._route(topic)).queues

    async def _route(self, topic: str) -> _Route:
        known = self._routes.get(topic)
        if known is not None and time.monotonic() < known.known_at + _ROUTE_SECONDS:
            return known
        found = await self.find_queues(topic)
        if not found:
            self._routes.pop(topic, None)
            await self.require_name_server()
            raise TopicNotFoundError(f"no topic {topic}, or none that may be read")
        if known is None or known.indexes.keys() != set(found):
            await self._meet(found)
            known = _Route(tuple(sorted(found)), {queue: index for index, queue in enumerate(found)}, 0.0)
        self._routes[topic] = known = known._replace(known_at=time.monotonic())
        return known

    async def _meet(self, queues: Sequence[Queue]) -> None:
        """Have one thread connect to each broker: while it does, the library fails the calls of all others."""
        async with self._meeting:
            for queue in queues:
                if queue.broker not in self._met:
                    self._met.add(queue.broker)
                    with contextlib.suppress(NotConnectedError):
                        await self._open(self._prover).prove(queue)

    async def find_queues(self, topic: str) -> list[Queue]:
        """Return the readable queues of `topic`; none when no name server knows it, or none answers.

        Raises:
            NotConnectedError: the link is closed.
        """
        consumer = self._open(self._consumer)
        return await _in(self._router, consumer.fetch_queues, topic)

    async def require_name_server(self) -> None:
        """Return when a name server lets itself be connected to; the library does not tell why it knows no route.

        Raises:
            NotConnectedError: none does.
        """
        problem: OSError | None = None
        for address in self._addresses:
            host, _, port = address.rpartition(":")
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            except OSError as error:
                problem = error
            else:
                writer.close()
                return
        raise NotConnectedError(f"cannot connect to name server {' or '.join(self._addresses)}: {problem}")

    async def send(self, queue: Queue, messages: Sequence[RocketMessage]) -> None:
        """Store `messages` in `queue`, one after another (RocketLink)."""
        producer = self._open(self._producer)
        checked = [_checked(message) for message in messages]
        index = (await self._route(queue.topic)).indexes.get(queue)
        if index is None:
            raise LinkError(f"{queue.topic} has no queue {queue.queue_id} on broker {queue.broker} any more")

        self._open(producer)
        senders = self._senders.get(queue.broker)
        if senders is None:
            senders = Senders(queue.broker, producer=producer, stopping=self._stopping)
            self._senders[queue.broker] = senders
        problem = await senders.send(checked, index)
        if problem is not None:
            self._open(producer)
            raise LinkError(
                f"broker {queue.broker} did not store a message of topic {queue.topic}: {problem} (librocketmq does "
                "not tell why: the broker is away, busy or full, it gives no permission, or calls the message illegal)"
            )

    async def probe(self, topic: str) -> None:
        """Prove that the brokers of `topic` answer (RocketLink); it takes the right to read it."""
        queues = await self.queues(topic)
        for queue in {queue.broker: queue for queue in queues}.values():
            await self._open(self._prover).prove(queue)

    async def subscribe(self, topic: str, group: str, *, tags: str, start: ConsumeFrom) -> Subscription:
        """Join `group` (RocketLink).

        Raises:
            ConfigError: `tags` names no tag, or this link is in `group` already.
        """
        self._open(self._consumer)
        if group in self._subscriptions:
            raise ConfigError(f"consumer group {group} is subscribed twice; RocketMQ knows one topic for each member")
        try:
            wanted = TagFilter(tags)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        subscription = LibrocketmqSubscription(self, topic=topic, group=group, tags=wanted, start=start)
        self._subscriptions[group] = subscription
        return subscription

    def forget(self, group: str) -> None:
        """A subscription is closed: its group may be joined again."""
        self._subscriptions.pop(group, None)

    async def require_writing(self, topic: str) -> None:
        """Return when the brokers of `topic` answer: whether they let it be written, they tell with a message."""
        await self.probe(topic)

    async def require_reading(self, topic: str, group: str) -> None:
        """Return when `topic` could be consumed in `group` (RocketLink)."""
        queues = await self.queues(topic)

        def read() -> Queue | None:
            consumer = self.new_client(Consumer, group)
            consumer.start()
            try:
                for queue in {queue.broker: queue for queue in queues}.values():
                    if consumer.pull(queue, FAR).status is PullStatus.NO_ANSWER:
                        return queue
                return None
            finally:
                consumer.close()

        if refused := await _in(self._router, read):
            raise no_answer(refused, group)

    async def topic_exists(self, topic: str) -> bool:
        """Whether `topic` has a route (RocketLink)."""
        if await self.find_queues(topic):
            return True
        await self.require_name_server()
        return False

    async def create_topic(self, topic: str, *, queues: int = 4) -> None:
        """Raise: librocketmq makes no topics."""
        raise LinkError(f"librocketmq cannot create topic {topic}: mqadmin updateTopic -r {queues} -w {queues} does")

    def _open(self, part: _Part | None) -> _Part:
        if part is None or self._stopping.is_set():
            raise NotConnectedError("the link is closed")
        return part


def _checked(message: RocketMessage) -> RocketMessage:
    """Return `message`.

    Raises:
        MessageRejectedError: RocketMQ would call it illegal, or librocketmq cannot carry it.
    """
    try:
        encoded_size(message)
    except MessageIllegal as error:
        raise MessageRejectedError(str(error)) from error
    if any("\0" in name or "\0" in value for name, value in message.properties.items()):
        raise MessageRejectedError("a property has a NUL, where librocketmq would cut it off")
    return message


async def _in(threads: Executor, function: Callable[..., _Result], *arguments: object) -> _Result:
    """Run `function` in one of `threads`; a caller who is cancelled does not stop it.

    Raises:
        NotConnectedError: the link is closed.
    """
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
    except RuntimeError as error:
        # The threads are shut down.
        raise NotConnectedError("the link is closed") from error
