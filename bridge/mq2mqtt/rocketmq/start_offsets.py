"""Where a member begins to read its queues, and the birth of a group.

A group is born when it has stored an offset for no queue of the topic. Then `start` is applied to every queue of the
route, also those of other members, and committed at once: a queue that never delivered anything would otherwise
have no offset, and be taken for new after the next restart. In a group that is born already, a queue without an
offset has appeared later, and is read from its minimum.

- Two members may give birth at once. Offsets are asked for again right before they are stored, so the second finds
  the first one's; when both are within that round trip, the later `latest` wins for the queues that are not being
  read yet, which moves the birth by that round trip.
- A crash between the commits of a birth leaves a group that is born, with queues that
  have no offset: those are read from their minimum. Old messages may be delivered, none is missed.
- Brokers write offsets to disk every 5 seconds. A broker that is killed sooner after a birth forgets it; members that
  run commit again what they have, and only if they are gone too is the group born anew.

Brokers before 5.0 ignore `setZeroIfNotFound=false`, and answer 0 for an offset that is not stored while the queue's
first message still exists (`ConsumerManageProcessor.queryConsumerOffset`). There the birth is recorded as an offset of
a queue that no topic has. They also keep the offsets of a topic that is deleted, and have them for the one that is made
again under its name: `renew` says that they mean nothing.

A broker of any version makes the table of a group's offsets in a topic with the first that it stores, and without a
lock (`ConsumerOffsetManager.commitOffset`): of two first ones at once it may forget one. `first_alone` parts them.
"""

import asyncio
import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final, Literal, TypeVar

from mq2mqtt.rocketmq.client import Client
from mq2mqtt.rocketmq.codes import RequestCode, ResponseCode
from mq2mqtt.rocketmq.errors import NotConnected, RocketMQError, for_code
from mq2mqtt.rocketmq.route import ReadQueue, TopicRoute

__all__ = ["Start", "StartOffsets", "first_alone", "store_offset"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

Start = Literal["latest", "earliest"] | int
"""Where a group that is born starts; a number is a time in milliseconds since 1970."""

_BIRTH_QUEUE: Final = 2**31 - 1
_BORN: Final = 1


async def store_offset(  # noqa: PLR0913 - the queue's name has three parts
    client: Client, address: str, *, group: str, topic: str, queue_id: int, offset: int
) -> None:
    """Commit `offset`: the next one that `group` wants of this queue.

    Raises:
        RocketMQError: it is not stored, or not known to be.
    """
    fields = {"consumerGroup": group, "topic": topic, "queueId": str(queue_id), "commitOffset": str(offset)}
    response = await client.call(address, RequestCode.UPDATE_CONSUMER_OFFSET, fields)
    if response.code != ResponseCode.SUCCESS:
        raise for_code(response.code, response.remark, address=address)


def first_alone(stores: Iterable[T], table: Callable[[T], Hashable]) -> tuple[list[T], list[T]]:
    """Split `stores` in two rounds, so that nothing goes with the first one for a `table` of offsets in a broker."""
    first: dict[Hashable, T] = {}
    rest = [store for store in stores if first.setdefault(table(store), store) is not store]
    return list(first.values()), rest


class StartOffsets:
    """Finds the first offset to read, for one group and topic."""

    def __init__(self, client: Client, *, group: str, topic: str, start: Start) -> None:
        self._client = client
        self._group = group
        self._topic = topic
        self._start = start
        self._born = False
        self._renewed: set[ReadQueue] = set()

    def renew(self, queues: Iterable[ReadQueue]) -> None:
        """The topic was made again, and `queues` with it: what is stored of them is of those before."""
        self._renewed.update(queues)

    async def find(self, queues: Sequence[ReadQueue], route: TopicRoute) -> dict[ReadQueue, int]:
        """Return where to begin in `queues`; a queue whose broker does not answer is left out.

        Raises:
            RocketMQError: no broker answers; or the group may have to be born, and one of the topic's does not.
        """
        stored = await self._stored(queues, route)
        stored.update(dict.fromkeys(self._renewed & stored.keys()))
        if not self._born and not all(stored.values()):
            others = [queue for queue in route.read_queues if queue not in stored]
            if await self._is_born({**stored, **await self._stored(others, route, strict=True)}, route):
                self._born = True
            else:
                stored = await self._give_birth(route)
        missing = [queue for queue in queues if queue in stored and stored[queue] is None]
        for queue in missing:
            oldest = await self._client.min_offset(_master(route, queue), self._topic, queue.queue_id)
            logger.info("%s has no offset of %s %s: read from %d", self._group, self._topic, queue, oldest)
            await self._store(queue, route, oldest)
            stored[queue] = oldest
            self._renewed.discard(queue)
        self._born = self._born or any(stored.values())
        return {queue: offset for queue in queues if (offset := stored.get(queue)) is not None}

    async def _is_born(self, stored: dict[ReadQueue, int | None], route: TopicRoute) -> bool:
        if any(stored.values()):
            return True
        if all(offset is None for offset in stored.values()):
            return False
        # Zeros: stored ones, or an older broker's word for none. Such a broker has no 22 for the birth queue either.
        for address in _masters(route):
            recorded = await self._ask(address, _BIRTH_QUEUE)
            if recorded is None or recorded == _BORN:
                return True
        return False

    async def _give_birth(self, route: TopicRoute) -> dict[ReadQueue, int | None]:
        queues = route.read_queues
        starts = await asyncio.gather(*(self._first(queue, route) for queue in queues))
        again = await self._stored(queues, route, strict=True)
        if await self._is_born(again, route):
            self._born = True
            return again
        births = dict(zip(queues, starts, strict=True))
        for together in first_alone(queues, lambda queue: queue.broker):
            await asyncio.gather(*(self._store(queue, route, births[queue]) for queue in together))
        if any(offset is not None for offset in again.values()):
            for address in _masters(route):
                await store_offset(
                    self._client, address, group=self._group, topic=self._topic, queue_id=_BIRTH_QUEUE, offset=_BORN
                )
        self._born = True
        logger.info("%s is born on %s at %s: %s", self._group, self._topic, self._start, list(births.values()))
        return dict(births)

    async def _first(self, queue: ReadQueue, route: TopicRoute) -> int:
        address = _master(route, queue)
        if self._start == "latest":
            return await self._client.max_offset(address, self._topic, queue.queue_id)
        if self._start == "earliest":
            return await self._client.min_offset(address, self._topic, queue.queue_id)
        return await self._client.offset_by_time(address, self._topic, queue.queue_id, self._start)

    async def _stored(
        self, queues: Sequence[ReadQueue], route: TopicRoute, *, strict: bool = False
    ) -> dict[ReadQueue, int | None]:
        async def ask(queue: ReadQueue) -> int | None:
            return await self._ask(_master(route, queue), queue.queue_id)

        answers = await asyncio.gather(*map(ask, queues), return_exceptions=True)
        stored: dict[ReadQueue, int | None] = {}
        problem: BaseException | None = None
        for queue, answer in zip(queues, answers, strict=True):
            if not isinstance(answer, BaseException):
                stored[queue] = answer
            elif strict or not isinstance(answer, RocketMQError):
                raise answer
            else:
                problem = answer
        if problem is not None and not stored:
            raise problem
        return stored

    async def _ask(self, address: str, queue_id: int) -> int | None:
        fields = {
            "consumerGroup": self._group,
            "topic": self._topic,
            "queueId": str(queue_id),
            "setZeroIfNotFound": "false",
        }
        response = await self._client.call(address, RequestCode.QUERY_CONSUMER_OFFSET, fields)
        if response.code == ResponseCode.QUERY_NOT_FOUND:
            return None
        if response.code != ResponseCode.SUCCESS:
            raise for_code(response.code, response.remark, address=address)
        return int(response.fields["offset"])

    async def _store(self, queue: ReadQueue, route: TopicRoute, offset: int) -> None:
        await store_offset(
            self._client,
            _master(route, queue),
            group=self._group,
            topic=self._topic,
            queue_id=queue.queue_id,
            offset=offset,
        )


def _master(route: TopicRoute, queue: ReadQueue) -> str:
    address = route.master(queue.broker)
    if address is None:
        raise NotConnected(f"broker {queue.broker}", "it has no master now")
    return address


def _masters(route: TopicRoute) -> list[str]:
    return sorted({_master(route, queue) for queue in route.read_queues})
