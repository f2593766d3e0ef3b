"""A member of a consumer group that reads one topic (clustering mode), and what Java members sent back to it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Final, Self

from mq2mqtt.rocketmq.allocation import allocate
from mq2mqtt.rocketmq.client import Client
from mq2mqtt.rocketmq.codes import RequestCode, ResponseCode
from mq2mqtt.rocketmq.errors import (
    DecodeError,
    NoPermission,
    NotConnected,
    RequestTimeout,
    RocketMQError,
    TopicNotFound,
    for_code,
)
from mq2mqtt.rocketmq.liveness import Liveness
from mq2mqtt.rocketmq.message import ReceivedMessage
from mq2mqtt.rocketmq.puller import PrefetchBudget, Puller
from mq2mqtt.rocketmq.route import ReadQueue, TopicRoute, parse_members
from mq2mqtt.rocketmq.start_offsets import Start, StartOffsets, first_alone, store_offset
from mq2mqtt.rocketmq.tags import ALL_TAGS, TagFilter

__all__ = ["Consumer"]

logger = logging.getLogger(__name__)

_REBALANCE_SECONDS: Final = 20.0  # as the Java client
_COMMIT_SECONDS: Final = 1.0
_WATCH_SECONDS: Final = 2.0
_CLOSE_SECONDS: Final = 2.0
_FIRST_RETRY: Final = 0.1
_MAX_RETRY: Final = 3.0
_RETRY_TOPIC_PROPERTY: Final = "RETRY_TOPIC"
_CONSUME_FROM: Final = {"latest": "CONSUME_FROM_LAST_OFFSET", "earliest": "CONSUME_FROM_FIRST_OFFSET"}


class Consumer:
    """One topic consumed in one group; iterating yields batches, each of one queue in its order.

    Queues are shared with the other members exactly as Java's push consumer shares them. Each message is to be given
    to `settle`, in any order; what is settled without a gap is committed every second. `start` begins, `close` ends;
    between them the consumer rides out every failure by itself and says in `problem` what is wrong.

    Args:
        client: started; several consumers of different groups may share it.
        group: no other consumer of this client may be in it.
        topic: a name server need not know it yet.
        tags: a tag expression: `*`, `a`, `a || b`.
        start: where a group that is born now starts.
        liveness: shared by the consumers of `client`.
        budget: shared by the consumers of `client`.

    Raises:
        ValueError: `tags` names no tag.

    Attributes:
        undecodable: number of messages that could not be read and were left out (each is logged with its place).
    """

    def __init__(  # noqa: PLR0913 - keyword-only, each a setting of its own
        self,
        client: Client,
        *,
        group: str,
        topic: str,
        tags: str = ALL_TAGS,
        start: Start = "latest",
        liveness: Liveness | None = None,
        budget: PrefetchBudget | None = None,
    ) -> None:
        self.group = group
        self.topic = topic
        self.undecodable = 0
        self._client = client
        self._own_liveness = Liveness(client) if liveness is None else None
        self._liveness = liveness or self._own_liveness or Liveness(client)
        self._budget = budget or PrefetchBudget()
        retry_topic = f"%RETRY%{group}"
        # What was sent back has passed the filter once, and Java members subscribe to all of it.
        self._filters = {topic: TagFilter(tags), retry_topic: TagFilter(ALL_TAGS)}
        self._starts = {
            topic: StartOffsets(client, group=group, topic=topic, start=start),
            retry_topic: StartOffsets(client, group=group, topic=retry_topic, start="earliest"),
        }
        self._data = self._consumer_data(start)
        self._pullers: dict[tuple[str, ReadQueue], Puller] = {}
        self._by_place: dict[tuple[str, int], list[Puller]] = {}
        self._ready: dict[Puller, None] = {}  # an ordered set: who has something to hand out, longest waiting first
        self._arrived = asyncio.Event()
        self._rebalance_now = asyncio.Event()
        self._uncommitted = asyncio.Event()
        self._balanced: TopicRoute | None = None
        self._trouble: str | None = f"joining group {group}"
        self._closed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to join the group. Does not wait for RocketMQ."""
        if not self._tasks and not self._closed.is_set():
            self._client.on_group_changed(self.group, self._rebalance_now.set)
            self._tasks = [
                asyncio.create_task(self._keep_balanced(), name=f"rocketmq.balance[{self.group}]"),
                asyncio.create_task(self._keep_committed(), name=f"rocketmq.commit[{self.group}]"),
                asyncio.create_task(self._keep_watched(), name=f"rocketmq.watch[{self.group}]"),
            ]

    async def close(self) -> None:
        """End the iteration, commit what is settled, and leave the group. Idempotent."""
        self._closed.set()
        self._arrived.set()
        self._uncommitted.set()
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"rocketmq.close[{self.group}]")
        # A caller that is cancelled does not end it halfway.
        await asyncio.shield(self._closing)

    # Messages

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[ReceivedMessage]:
        """Return the next batch; queues take turns."""
        while not self._closed.is_set():
            while self._ready:
                puller = next(iter(self._ready))
                del self._ready[puller]
                if puller.can_hand_out():
                    messages = puller.take()
                    if puller.can_hand_out():
                        self._ready[puller] = None
                    return messages
            self._arrived.clear()
            await self._arrived.wait()
        raise StopAsyncIteration

    def settle(self, message: ReceivedMessage) -> None:
        """Say that nothing more will be done about `message`. Has no effect when its queue was lost meanwhile."""
        for puller in self._by_place.get((message.broker, message.queue_id), ()):
            if puller.progress.settle(message):
                self._uncommitted.set()
                if puller not in self._ready and puller.can_hand_out():
                    self.ready(puller)
                return

    # State

    @property
    def problem(self) -> str | None:
        """Why nothing can be received now; `None` while every owned queue is known to be served."""
        if self._closed.is_set():
            return "closed"
        if self._trouble is not None:
            return self._trouble
        pullers = self._pullers.values()
        for puller in pullers:
            if puller.problem is not None:
                return puller.problem
        for address in {puller.address for puller in pullers}:
            if problem := self._liveness.problem(address):
                return problem
        return None

    @property
    def lag(self) -> int:
        """Messages behind the settled prefixes of the owned queues."""
        return sum(max(0, puller.max_offset - puller.progress.committable) for puller in self._pullers.values())

    @property
    def queues(self) -> tuple[tuple[str, ReadQueue], ...]:
        """The queues that this member owns now, each with its topic, sorted."""
        return tuple(sorted(self._pullers))

    async def members(self) -> tuple[str, ...]:
        """Return the client ids of the group's members by a broker's list, one for each connection.

        Raises:
            RocketMQError: no broker of the topic answers.
        """
        return await self._list_members(await self._client.route(self.topic))

    # What pullers tell (PullerEvents)

    def ready(self, puller: Puller) -> None:
        """Note that `puller` has something to hand out."""
        self._ready[puller] = None
        self._arrived.set()

    def advanced(self) -> None:
        """Note that there is something to commit."""
        self._uncommitted.set()

    def recovered(self) -> None:
        """A broker answers again: others may have taken our queues, and it may have forgotten our commits."""
        self._uncommitted.set()
        self._rebalance_now.set()

    def forgotten(self) -> None:
        """The group was deleted, its offsets with it: commit again how far each queue is."""
        logger.warning("%s: the broker has no offset of the group any more: committing them again", self.group)
        for puller in self._pullers.values():
            puller.commit_again = True
        self._uncommitted.set()

    def cannot_decode(self, puller: Puller, error: DecodeError) -> None:
        """Count and log a message that is left out."""
        self.undecodable += 1
        logger.error("%s broker %s queue %d: %s", puller.topic, puller.queue.broker, puller.queue.queue_id, error)

    # Balancing

    async def _keep_balanced(self) -> None:
        retry = _FIRST_RETRY
        while not self._closed.is_set():
            self._rebalance_now.clear()
            try:
                complete = await self._rebalance()
            except RocketMQError as error:
                complete = False
                if not self._pullers:
                    self._set_trouble(str(error))
            except Exception:
                # The top edge of the task: a strange answer must not end the membership for good.
                logger.exception("balancing %s", self.group)
                complete = False
                self._set_trouble("internal error, see the log")
            if complete:
                self._set_trouble(None)
            delay, retry = (_REBALANCE_SECONDS, _FIRST_RETRY) if complete else (retry, min(retry * 2, _MAX_RETRY))
            await _wait(self._rebalance_now, delay)

    async def _rebalance(self) -> bool:
        """Own what is ours now; false when that has to be tried again soon."""
        route = self._balanced = await self._route()
        if not route.read_queues:
            self._set_trouble(f"topic {self.topic} has no readable queue")
            return False
        members = await self._list_members(route)
        if self._client.client_id not in members:
            # Not heard of yet, or forgotten by a broker that was started again.
            self._client.register_consumer(self.group, self._data)
            await self._join(route)
            if not self._pullers:
                self._set_trouble(f"joining group {self.group}")
            return False
        complete = await self._own(route, members)
        try:
            retry_route = await self._client.route(f"%RETRY%{self.group}")
        except TopicNotFound:
            # The broker makes it with the group, or never where it may not.
            return complete
        return await self._own(retry_route, members) and complete

    async def _join(self, route: TopicRoute) -> None:
        """Tell the brokers now that this client is in the group; raises `AnswerError` when one does not want it."""
        beats = (self._client.heartbeat(address, consumer=self.group) for address in _masters(route))
        for result in await asyncio.gather(*beats, return_exceptions=True):
            # One that cannot be reached is told later, by the client's own heartbeats.
            if isinstance(result, BaseException) and not isinstance(result, NotConnected | RequestTimeout):
                raise result

    async def _route(self) -> TopicRoute:
        try:
            return await self._client.route(self.topic, max_age=_REBALANCE_SECONDS)
        except (NotConnected, RequestTimeout):
            # Members come and go, whether a name server is there or not.
            return await self._client.route(self.topic, max_age=float("inf"))

    async def _keep_watched(self) -> None:
        """Ask a name server for changes of the topic that a held poll would hide for up to 20 seconds.

        What it says is put to the brokers, who know better: a name server that has just started knows no topic yet.
        """
        while not self._closed.is_set():
            await _wait(self._closed, _WATCH_SECONDS)
            try:
                route = await self._client.route(self.topic, max_age=_WATCH_SECONDS / 2)
            except TopicNotFound:
                pass
            except RocketMQError:
                continue
            else:
                if route == self._balanced:
                    continue
                self._rebalance_now.set()
            for (topic, _), puller in self._pullers.items():
                if topic == self.topic:
                    puller.doubt()

    async def _list_members(self, route: TopicRoute) -> tuple[str, ...]:
        problem: RocketMQError = NotConnected(f"the brokers of {route.topic}", "none has a master now")
        for address in _masters(route):
            try:
                response = await self._client.call(
                    address, RequestCode.GET_CONSUMER_LIST_BY_GROUP, {"consumerGroup": self.group}
                )
            except RocketMQError as error:
                problem = error
                continue
            if response.code == ResponseCode.SUCCESS:
                return parse_members(response.body)
            problem = for_code(response.code, response.remark, address=address)
            if response.code == ResponseCode.SYSTEM_ERROR and not isinstance(problem, NoPermission):
                return ()  # "no consumer for this group"
        raise problem

    async def _own(self, route: TopicRoute, members: Iterable[str]) -> bool:
        topic = route.topic
        if outdated := [puller for (name, _), puller in self._pullers.items() if name == topic and puller.outdated]:
            # Begin as in queues that have appeared.
            self._starts[topic].renew(puller.queue for puller in outdated)
            await self._lose(outdated)
        mine = set(allocate(self._client.client_id, queues=route.read_queues, members=members))
        owned = {queue for name, queue in self._pullers if name == topic}
        if lost := owned - mine:
            logger.info("%s: no longer reading %s", self.group, _listed(topic, lost))
            await self._lose([self._pullers[topic, queue] for queue in lost])
        for queue in owned & mine:
            self._follow(self._pullers[topic, queue], route.master(queue.broker))
        await self._refresh_ends(topic)
        gained = sorted(mine - owned)
        if not gained:
            return True
        try:
            starts = await self._starts[topic].find(gained, route)
        except RocketMQError as error:
            self._set_trouble(str(error))
            return False
        if starts:
            logger.info("%s: reading %s", self.group, _listed(topic, starts))
        for queue, offset in starts.items():
            self._gain(topic, queue, route.master(queue.broker) or "", offset)
        if unknown := set(gained) - set(starts):
            self._set_trouble(f"the broker does not tell where to begin in {_listed(topic, unknown)}")
            return False
        return True

    def _gain(self, topic: str, queue: ReadQueue, address: str, offset: int) -> None:
        self._liveness.watch(address)
        puller = Puller(
            self._client,
            group=self.group,
            topic=topic,
            sibling=next(name for name in self._filters if name != topic),
            queue=queue,
            address=address,
            offset=offset,
            tags=self._filters[topic],
            shown_topic_property=None if topic == self.topic else _RETRY_TOPIC_PROPERTY,
            events=self,
            liveness=self._liveness,
            budget=self._budget,
        )
        # `find` has asked for it, or stored it.
        puller.committed = offset
        self._pullers[topic, queue] = puller
        self._by_place.setdefault((queue.broker, queue.queue_id), []).append(puller)

    async def _lose(self, pullers: Sequence[Puller]) -> None:
        """Hand out nothing more of these queues, commit what is settled, and forget the rest."""
        for puller in pullers:
            del self._pullers[puller.topic, puller.queue]
            self._by_place[puller.queue.broker, puller.queue.queue_id].remove(puller)
            self._ready.pop(puller, None)
        await asyncio.gather(*(puller.stop() for puller in pullers))
        with contextlib.suppress(TimeoutError):
            # A broker that hangs must not hold up the other queues, nor the end of the process.
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._commit([puller for puller in pullers if not puller.outdated])
        for puller in pullers:
            self._liveness.unwatch(puller.address)

    def _follow(self, puller: Puller, address: str | None) -> None:
        if address is not None and address != puller.address:
            self._liveness.watch(address)
            self._liveness.unwatch(puller.address)
            puller.address = address

    async def _refresh_ends(self, topic: str) -> None:
        """Keep `lag` true of queues that are not pulled because nobody settles what was handed out."""
        waiting = [puller for (name, _), puller in self._pullers.items() if name == topic and puller.waits]
        for result in await asyncio.gather(
            *(puller.refresh_max_offset() for puller in waiting), return_exceptions=True
        ):
            if isinstance(result, BaseException) and not isinstance(result, RocketMQError):
                raise result

    # Committing

    async def _keep_committed(self) -> None:
        while not self._closed.is_set():
            await self._uncommitted.wait()
            await _wait(self._closed, _COMMIT_SECONDS)
            self._uncommitted.clear()
            # A queue in trouble says `recovered` when there is a point in trying.
            healthy = [puller for puller in self._pullers.values() if puller.problem is None]
            for puller in healthy:
                if puller.commit_again:
                    puller.committed, puller.commit_again = None, False
            if not await self._commit(healthy):
                self._uncommitted.set()

    async def _commit(self, pullers: Iterable[Puller]) -> bool:
        """Store what has changed; false when a broker did not take it."""
        changed = [
            (puller, offset) for puller in pullers if (offset := puller.progress.committable) != puller.committed
        ]
        if all(puller.committed is not None for puller, _ in changed):
            return await self._store_all(changed)
        # The broker may have no offset of the group left.
        first, rest = first_alone(changed, lambda change: (change[0].topic, change[0].address))
        return all([await self._store_all(first), await self._store_all(rest)])

    async def _store_all(self, changes: Sequence[tuple[Puller, int]]) -> bool:
        results = await asyncio.gather(*(self._store(*change) for change in changes), return_exceptions=True)
        for (puller, _), result in zip(changes, results, strict=True):
            if isinstance(result, RocketMQError):
                logger.info("%s queue %d: offset not committed: %s", puller.topic, puller.queue.queue_id, result)
            elif isinstance(result, BaseException):
                raise result
        return not any(results)

    async def _store(self, puller: Puller, offset: int) -> None:
        await store_offset(
            self._client,
            puller.address,
            group=self.group,
            topic=puller.topic,
            queue_id=puller.queue.queue_id,
            offset=offset,
        )
        puller.committed = offset

    # Beginning and end

    def _consumer_data(self, start: Start) -> dict[str, object]:
        version = time.time_ns() // 1_000_000
        return {
            "consumeType": "CONSUME_PASSIVELY",
            "messageModel": "CLUSTERING",
            "consumeFromWhere": _CONSUME_FROM.get(str(start), "CONSUME_FROM_TIMESTAMP"),
            "subscriptionDataSet": [tags.subscription(topic, version) for topic, tags in self._filters.items()],
            "unitMode": False,
        }

    async def _close(self) -> None:
        self._client.on_group_changed(self.group, None)
        self._rebalance_now.set()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._lose(list(self._pullers.values()))
        await self._client.unregister_consumer(self.group)
        if self._own_liveness is not None:
            await self._own_liveness.close()

    def _set_trouble(self, trouble: str | None) -> None:
        if trouble is not None and trouble != self._trouble:
            logger.info("%s: %s", self.group, trouble)
        self._trouble = trouble


def _masters(route: TopicRoute) -> list[str]:
    return sorted({address for name in route.brokers if (address := route.master(name))})


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait until `event` is set, at most `seconds`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _listed(topic: str, queues: Iterable[ReadQueue]) -> str:
    return f"{topic} " + ", ".join(f"{queue.broker}:{queue.queue_id}" for queue in sorted(queues))
