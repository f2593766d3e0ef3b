"""One topic pulled in one group: which queues, from where, what is out, and what is committed."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, TypeVar

from loguru import logger

from mq2mqtt.errors import BridgeError, LinkError
from mq2mqtt.link import ConsumeFrom, GroupMember, Queue, Subscription
from mq2mqtt.link.librocketmq.clients import Client, Consumer, Producer, Pulled, PullStatus
from mq2mqtt.link.librocketmq.reading import FAR, RETRY_SECONDS, Reading, Step
from mq2mqtt.message import ReceivedMessage
from mq2mqtt.rocketmq.message import ReceivedMessage as StoredMessage
from mq2mqtt.rocketmq.tags import TagFilter

__all__ = ["Clients", "LibrocketmqSubscription"]

_COMMIT_SECONDS: Final = 1.0
_QUEUES_SECONDS: Final = 10.0
# The library cannot wait at the broker for a message: it has to be asked again and again.
_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.16
_SILENCE_SECONDS: Final = 2.0  # the library waits 10 s for a pull
_RETRY_TOPIC_SECONDS: Final = 2.0  # no member of the driver's own sends anything there
_BIRTH_TRIES: Final = 50
_BIRTH_PAUSE: Final = 0.1
_CLOSE_SECONDS: Final = 2.0
_CLOSE_PAUSE: Final = 0.025
_BIRTH_GROUP: Final = "GID_mq2mqtt_birth"

_Result = TypeVar("_Result")
_ClientT = TypeVar("_ClientT", bound=Client)


class Clients(Protocol):
    """What a subscription needs of its link."""

    async def queues(self, topic: str) -> tuple[Queue, ...]:
        """As `RocketLink.queues`."""

    async def find_queues(self, topic: str) -> list[Queue]:
        """Return the queues of `topic`, or none."""

    async def require_name_server(self) -> None:
        """Raise `NotConnectedError` unless a name server can be reached."""

    def new_client(self, kind: type[_ClientT], group: str) -> _ClientT:
        """Return a client of the library, not started."""

    def forget(self, group: str) -> None:
        """Be told that the subscription is closed."""


class LibrocketmqSubscription(Subscription):
    """See `Subscription`. It reads every queue, whoever else is in the group."""

    def __init__(self, clients: Clients, *, topic: str, group: str, tags: TagFilter, start: ConsumeFrom) -> None:
        self._clients = clients
        self._topic = topic
        self._group = group
        self._retry_topic = f"%RETRY%{group}"
        self._tags = tags
        self._start = start
        self._is_born: bool | None = None
        """Whether RocketMQ knows the group; `None` until that was asked, before the group had a member here."""
        self._births: dict[Queue, int] = {}
        self._readings: dict[Queue, Reading] = {}  # whose turn it is first
        self._silent_until: dict[str, float] = {}
        self._pulled: tuple[Reading, float] | None = None
        """What is pulled from now, and since when."""
        self._unreadable = 0
        self._problem: str | None = "not started"
        self._missing: str | None = None
        """Why some queue is not read yet."""
        self._closed = False
        self._ready = asyncio.Event()
        self._wanted = asyncio.Event()
        self._consumer: Consumer | None = None
        # One, because the library's consumer is not made for more.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="librocketmq-pull")
        self._closing: asyncio.Task[None] | None = None
        self._task = asyncio.create_task(self._run(), name=f"mq2mqtt.librocketmq[{group}]")

    @property
    def problem(self) -> str | None:
        """Why nothing can be received now (Subscription)."""
        if self._closed:
            return "closed"
        pulled = self._pulled
        if pulled is not None and time.monotonic() > pulled[1] + _SILENCE_SECONDS:
            return pulled[0].silence
        return self._problem

    @property
    def lag(self) -> int:
        """Messages behind the committed offsets, of all queues (Subscription)."""
        return sum(reading.lag for reading in self._readings.values())

    @property
    def unreadable(self) -> int:
        """Messages that librocketmq could not read (Subscription)."""
        return self._unreadable

    async def members(self) -> tuple[GroupMember, ...]:
        """Nobody: librocketmq does not tell."""
        return ()

    def __aiter__(self) -> AsyncIterator[Sequence[ReceivedMessage]]:
        return self

    async def __anext__(self) -> Sequence[ReceivedMessage]:
        while not self._closed:
            for queue in list(self._readings):
                if messages := self._readings[queue].take():
                    self._readings[queue] = self._readings.pop(queue)
                    self._wanted.set()
                    return messages
            self._ready.clear()
            await self._ready.wait()
        raise StopAsyncIteration

    def settle(self, message: ReceivedMessage) -> None:
        """Let the message be committed, once all before it are (Subscription)."""
        # The topic and the group's retry topic have queues of the same broker and number.
        for topic in (self._topic, self._retry_topic):
            reading = self._readings.get(Queue(topic, message.broker, message.queue_id))
            if reading is not None and isinstance(message, StoredMessage) and reading.prefix.settle(message):
                if reading.ready:
                    self._ready.set()
                return

    async def close(self) -> None:
        """Commit what is settled, and leave (Subscription)."""
        if self._closing is None:
            self._closed = True
            self._ready.set()
            self._wanted.set()
            self._closing = asyncio.create_task(self._end(), name=f"mq2mqtt.librocketmq[{self._group}].close")
        await asyncio.shield(self._closing)

    async def _end(self) -> None:
        try:
            await self._task
            if self._consumer is not None:
                try:
                    await self._commit_for_good(self._consumer)
                finally:
                    await self._in_thread(self._consumer.close)
        finally:
            self._thread.shutdown(wait=False)
            self._clients.forget(self._group)

    async def _commit_for_good(self, consumer: Consumer) -> None:
        """See that what is settled is committed: RocketMQ does not answer a commit, and the connection ends."""
        # All of it: an outage may have swallowed what was told before.
        for reading in self._readings.values():
            reading.committed = None
        offsets = await self._commit(consumer)
        until = time.monotonic() + _CLOSE_SECONDS
        while offsets and time.monotonic() < until:
            queue, offset = offsets[0]
            if await self._in_thread(consumer.committed, queue) == offset:
                del offsets[0]
            else:
                await asyncio.sleep(_CLOSE_PAUSE)
        if offsets:
            logger.warning("group {}: RocketMQ did not confirm what is settled; some may come again", self._group)

    async def _run(self) -> None:
        while not self._closed:
            try:
                await self._join()
                await self._receive()
                continue
            except BridgeError as error:
                self._problem = str(error)
            except Exception:  # noqa: BLE001 - a task's top edge: it would end unseen
                logger.exception("group {}: unexpected error", self._group)
                self._problem = "internal error, see the log"
            await self._pause(RETRY_SECONDS)

    async def _join(self) -> None:
        """Find the queues and where they begin.

        Raises:
            LinkError: nothing can be read now; what is known already is kept.
        """
        queues = await self._clients.queues(self._topic)
        retry_queues = await self._clients.find_queues(self._retry_topic)
        has_retry_topic = bool(retry_queues)
        if self._is_born is None and not has_retry_topic:
            # Nothing is found either when no name server answers.
            await self._clients.require_name_server()
        consumer = self._consumer
        if consumer is None:
            consumer = self._clients.new_client(Consumer, self._group)
            await self._in_thread(consumer.start)
            self._consumer = consumer
        if self._is_born is None:
            # Brokers make the retry topic when they first hear of a group. Without it a committed 0 means nothing.
            self._is_born = has_retry_topic or any(
                [await self._in_thread(consumer.committed, queue) for queue in queues]
            )
        if not self._is_born:
            await self._bear(consumer, queues)
            self._is_born = True
            retry_queues = await self._clients.find_queues(self._retry_topic)
        await self._begin_all(consumer, [*queues, *retry_queues])

    async def _begin_all(self, consumer: Consumer, queues: Sequence[Queue]) -> None:
        """Read all of `queues`, and no others, but for those whose broker does not answer.

        Raises:
            LinkError: none does.
        """
        self._missing = None
        for queue in queues:
            if queue not in self._readings:
                try:
                    self._readings[queue] = await self._begin(consumer, queue)
                except LinkError as error:
                    self._missing = str(error)
        if self._missing is not None and not self._readings:
            raise LinkError(self._missing)
        for queue in self._readings.keys() - set(queues):
            if not self._readings[queue].prefix.unsettled:
                del self._readings[queue]

    async def _bear(self, consumer: Consumer, queues: Sequence[Queue]) -> None:
        """Commit where a new group begins, and see that RocketMQ knows the group.

        Raises:
            LinkError: it does not yet.
        """
        for queue in queues:
            if queue not in self._births:
                ends = self._answered(await self._in_thread(consumer.pull, queue, FAR), queue)
                self._births[queue] = ends.min_offset if self._start is ConsumeFrom.EARLIEST else ends.max_offset
        offsets = list(self._births.items())
        await self._in_thread(consumer.commit, offsets)
        # A heartbeat makes the group; the library sends one for all clients when a producer starts.
        await self._in_thread(self._beat)
        for _ in range(_BIRTH_TRIES):
            if self._closed:
                break
            committed = [await self._in_thread(consumer.committed, queue) == offset for queue, offset in offsets]
            if all(committed) and await self._clients.find_queues(self._retry_topic):
                return
            await asyncio.sleep(_BIRTH_PAUSE)
        raise LinkError(f"joining group {self._group}: RocketMQ does not know it yet (access control: docs/drivers.md)")

    def _beat(self) -> None:
        producer = self._clients.new_client(Producer, _BIRTH_GROUP)
        producer.start()
        producer.close()

    async def _begin(self, consumer: Consumer, queue: Queue) -> Reading:
        """Return how `queue` is read from now on; one that the group does not know yet, from its first message."""
        committed = await self._in_thread(consumer.committed, queue)
        ends = self._answered(await self._in_thread(consumer.pull, queue, FAR), queue)
        if committed is None:
            # The library says the same when there was no answer. There is one now.
            committed = await self._in_thread(consumer.committed, queue)
        start = ends.min_offset if committed is None else committed
        return Reading(queue, start=start, committed=committed, end=ends.max_offset)

    def _answered(self, pulled: Pulled, queue: Queue) -> Pulled:
        if pulled.status is PullStatus.NO_ANSWER:
            raise LinkError(
                f"broker {queue.broker} does not answer, or does not let topic {queue.topic} be read in group "
                f"{self._group}"
            )
        return pulled

    async def _receive(self) -> None:
        """Pull until the queues are to be looked for again."""
        until = time.monotonic() + _QUEUES_SECONDS
        commit_at = time.monotonic() + _COMMIT_SECONDS
        pause = _FIRST_PAUSE
        consumer = self._consumer
        while consumer is not None and not self._closed and time.monotonic() < until:
            self._wanted.clear()
            found = await self._pull(consumer)
            if time.monotonic() >= commit_at:
                await self._commit(consumer)
                commit_at = time.monotonic() + _COMMIT_SECONDS
            pause = _FIRST_PAUSE if found else min(pause * 2, _LONGEST_PAUSE)
            if not found:
                await self._pause(pause)

    async def _pause(self, seconds: float) -> None:
        """Wait for so long, or until something is taken or the subscription closed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wanted.wait()

    async def _pull(self, consumer: Consumer) -> bool:
        """Pull from each queue that has nothing ready; return whether there was something."""
        began = time.monotonic()
        wanting = [
            reading
            for reading in self._readings.values()
            if not reading.ready and max(reading.retry_at, self._silent_until.get(reading.queue.broker, 0.0)) <= began
        ]
        for reading, step in await self._in_thread(self._pull_each, consumer, wanting):
            reading.keep(step, self._tags)
            self._unreadable += step.unreadable
            if reading.queue.topic == self._retry_topic and not reading.ready:
                reading.retry_at = time.monotonic() + _RETRY_TOPIC_SECONDS
            if step.is_silent:
                # As long again as it took: other brokers get their turn.
                now = time.monotonic()
                self._silent_until[reading.queue.broker] = now + max(RETRY_SECONDS, now - began)
        problems = (reading.problem for reading in self._readings.values() if reading.problem)
        self._problem = next(problems, self._missing)
        found = any(reading.ready for reading in wanting)
        if found:
            self._ready.set()
        return found

    def _pull_each(self, consumer: Consumer, readings: Sequence[Reading]) -> list[tuple[Reading, Step]]:
        """Pull once for each queue, as long as its broker answers; blocks."""
        steps: list[tuple[Reading, Step]] = []
        silent: set[str] = set()
        for reading in readings:
            if self._closed:
                break
            if reading.queue.broker not in silent:
                self._pulled = reading, time.monotonic()
                try:
                    step = reading.pull(consumer)
                finally:
                    self._pulled = None
                steps.append((reading, step))
                if step.is_silent:
                    silent.add(reading.queue.broker)
        return steps

    async def _commit(self, consumer: Consumer) -> list[tuple[Queue, int]]:
        """Tell RocketMQ what is settled since the last time, and return it."""
        offsets = []
        for reading in self._readings.values():
            settled = reading.prefix.committable
            if settled != reading.committed:
                offsets.append((reading.queue, settled))
                reading.committed = settled
        if offsets:
            await self._in_thread(consumer.commit, offsets)
        return offsets

    async def _in_thread(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
