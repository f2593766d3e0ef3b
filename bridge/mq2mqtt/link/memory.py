"""A RocketMQ within the process: for tests and dry runs.

It keeps what the bridge relies on: queues in order, groups with offsets, tags, the birth of a group, the sharing of
queues, the window of unsettled messages, and what cannot be sent. Commits are immediate.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from mq2mqtt.errors import (
    BridgeError,
    ConfigError,
    LinkError,
    MessageRejectedError,
    NotConnectedError,
    TopicNotFoundError,
)
from mq2mqtt.link import ConsumeFrom, GroupMember, Queue, RocketLink, Subscription
from mq2mqtt.message import ReceivedMessage, RocketMessage
from mq2mqtt.rocketmq import MessageIllegal, ReadQueue
from mq2mqtt.rocketmq import ReceivedMessage as StoredMessage
from mq2mqtt.rocketmq.allocation import allocate
from mq2mqtt.rocketmq.codec import BodyEncoder
from mq2mqtt.rocketmq.message import UNIQ_KEY
from mq2mqtt.rocketmq.offsets import SettledPrefix
from mq2mqtt.rocketmq.tags import TagFilter
from mq2mqtt.rocketmq.unique import UniqueIds

__all__ = ["MemoryCluster", "MemoryLink"]

_BROKER = "memory"
_BATCH = 32
_QUEUE_MESSAGES = 1_000_000


class MemoryCluster:
    """Topics and groups that links share.

    Args:
        queue_messages: how many messages a queue holds; a send beyond fails with `LinkError`.
    """

    def __init__(self, *, queue_messages: int = _QUEUE_MESSAGES) -> None:
        self._queue_messages = queue_messages
        self._encoder = BodyEncoder(UniqueIds().take)
        self._topics: dict[str, list[list[StoredMessage]]] = {}
        self._errors: dict[str, BridgeError] = {}
        self._offsets: dict[tuple[str, str], list[int]] = {}  # by group and topic
        self._members: list[_MemorySubscription] = []

    def fail_with(self, topic: str, error: BridgeError | None) -> None:
        """Have everything about `topic` fail with `error` from now on; `None` ends it."""
        if error is None:
            self._errors.pop(topic, None)
        else:
            self._errors[topic] = error
        self._wake(topic)

    def error(self, topic: str) -> BridgeError | None:
        """Return what a use of `topic` fails with now."""
        if topic in self._errors:
            return self._errors[topic]
        return None if topic in self._topics else TopicNotFoundError(f"no topic {topic}")

    def queues(self, topic: str) -> list[list[StoredMessage]]:
        """Return the messages of each queue of `topic`; raises what `error` returns."""
        if error := self.error(topic):
            raise error
        return self._topics[topic]

    def committed(self, topic: str, group: str) -> tuple[int, ...]:
        """Return the committed offset of each queue; empty for a group that is not born."""
        return tuple(self._offsets.get((group, topic), ()))

    def exists(self, topic: str) -> bool:
        """Whether there is a `topic`."""
        return topic in self._topics

    def create_topic(self, topic: str, queues: int) -> None:
        """Create `topic` unless it exists."""
        self._topics.setdefault(topic, [[] for _ in range(queues)])
        for member in self.members_of(topic):
            member.rebalance()

    def store(self, queue: Queue, messages: Sequence[RocketMessage]) -> None:
        """Append `messages`; raises as `RocketLink.send`."""
        stored = self.queues(queue.topic)[queue.queue_id]
        try:
            # What the native driver would make of them, for its checks and its ids.
            ids = (
                self._encoder.batch(list(messages))[1] if len(messages) > 1 else [self._encoder.single(messages[0])[1]]
            )
        except MessageIllegal as error:
            raise MessageRejectedError(str(error)) from error
        if len(stored) + len(messages) > self._queue_messages:
            raise LinkError(f"queue {queue.queue_id} of {queue.topic} holds {self._queue_messages} messages already")
        now = time.time_ns() // 1_000_000
        for message, unique in zip(messages, ids, strict=True):
            properties = {name: value for name, value in message.properties.items() if value}
            properties[UNIQ_KEY] = unique
            stored.append(_stored(queue, message.body, properties, offset=len(stored), now=now))
        self._wake(queue.topic)

    def offsets(self, topic: str, group: str, start: ConsumeFrom) -> list[int]:
        """Return the committed offsets, to be changed in place; a new group is born here."""
        queues = self._topics[topic]
        offsets = self._offsets.get((group, topic))
        if offsets is None:
            offsets = [0 if start is ConsumeFrom.EARLIEST else len(queue) for queue in queues]
            self._offsets[group, topic] = offsets
        return offsets

    def members_of(self, topic: str, group: str | None = None) -> list["_MemorySubscription"]:
        """Return who reads `topic` now, in any group or in `group`."""
        return [member for member in self._members if member.topic == topic and group in {None, member.group}]

    def join(self, member: "_MemorySubscription") -> None:
        """Let `member` share the queues."""
        self._members.append(member)
        self._rebalance(member.topic, member.group)

    def leave(self, member: "_MemorySubscription") -> None:
        """Share the queues of `member` among those who stay."""
        self._members.remove(member)
        self._rebalance(member.topic, member.group)

    def _rebalance(self, topic: str, group: str) -> None:
        for member in self.members_of(topic, group):
            member.rebalance()

    def _wake(self, topic: str) -> None:
        for member in self.members_of(topic):
            member.wake()


class MemoryLink(RocketLink):
    """See `RocketLink`. Links with the same `cluster` see the same messages."""

    def __init__(self, *, cluster: MemoryCluster | None = None, client_id: str = "memory") -> None:
        self.cluster = cluster or MemoryCluster()
        self._client_id = client_id
        self._subscriptions: list[_MemorySubscription] = []
        self._closed = False

    async def start(self) -> None:
        """Do nothing (RocketLink)."""

    async def close(self) -> None:
        """End everything (RocketLink)."""
        self._closed = True
        for subscription in self._subscriptions:
            await subscription.close()

    def fail_with(self, topic: str, error: BridgeError | None) -> None:
        """Have everything about `topic` fail with `error` from now on; `None` ends it."""
        self.cluster.fail_with(topic, error)

    async def queues(self, topic: str) -> tuple[Queue, ...]:
        """Return the queues of `topic` (RocketLink)."""
        self._check_open()
        return tuple(Queue(topic, _BROKER, number) for number in range(len(self.cluster.queues(topic))))

    async def send(self, queue: Queue, messages: Sequence[RocketMessage]) -> None:
        """Store `messages` (RocketLink)."""
        self._check_open()
        self.cluster.store(queue, messages)

    async def probe(self, topic: str) -> None:
        """Raise what a send would (RocketLink)."""
        self._check_open()
        self.cluster.queues(topic)

    async def subscribe(self, topic: str, group: str, *, tags: str, start: ConsumeFrom) -> Subscription:
        """Join `group` (RocketLink)."""
        self._check_open()
        if any(other.group == group and not other.is_closed for other in self._subscriptions):
            raise ConfigError(f"consumer group {group} is subscribed twice; RocketMQ knows one topic for each member")
        try:
            tag_filter = TagFilter(tags)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        subscription = _MemorySubscription(
            self.cluster, self._client_id, topic=topic, group=group, tags=tag_filter, start=start
        )
        self._subscriptions = [other for other in self._subscriptions if not other.is_closed]
        self._subscriptions.append(subscription)
        self.cluster.join(subscription)
        return subscription

    async def require_writing(self, topic: str) -> None:
        """Return when `topic` would be written (RocketLink)."""
        self._check_open()
        self.cluster.queues(topic)

    async def require_reading(self, topic: str, group: str) -> None:  # noqa: ARG002 - there is no access control here
        """Return when `topic` could be consumed (RocketLink)."""
        self._check_open()
        self.cluster.queues(topic)

    async def topic_exists(self, topic: str) -> bool:
        """Whether there is a `topic` (RocketLink)."""
        self._check_open()
        return self.cluster.exists(topic)

    async def create_topic(self, topic: str, *, queues: int = 4) -> None:
        """Create `topic` (RocketLink)."""
        self._check_open()
        self.cluster.create_topic(topic, queues)

    def _check_open(self) -> None:
        if self._closed:
            raise NotConnectedError("the link is closed")


class _MemorySubscription(Subscription):
    def __init__(  # noqa: PLR0913 - keyword-only but for where and who
        self, cluster: MemoryCluster, client_id: str, *, topic: str, group: str, tags: TagFilter, start: ConsumeFrom
    ) -> None:
        self.topic = topic
        self.group = group
        self.client_id = client_id
        self.is_closed = False
        self._cluster = cluster
        self._tags = tags
        self._start = start
        self._owned: dict[int, SettledPrefix] = {}  # by queue, whose turn it is first
        self._arrived = asyncio.Event()

    @property
    def problem(self) -> str | None:
        if self.is_closed:
            return "closed"
        error = self._cluster.error(self.topic)
        return None if error is None else str(error)

    @property
    def lag(self) -> int:
        if self._cluster.error(self.topic):
            return 0
        queues = self._cluster.queues(self.topic)
        return sum(len(queues[number]) - progress.committable for number, progress in self._owned.items())

    @property
    def unreadable(self) -> int:
        return 0

    async def members(self) -> tuple[GroupMember, ...]:
        members = self._cluster.members_of(self.topic, self.group)
        client_ids = sorted({member.client_id for member in members})
        return tuple(GroupMember(client_id, ours=client_id == self.client_id) for client_id in client_ids)

    def __aiter__(self) -> AsyncIterator[Sequence[ReceivedMessage]]:
        return self

    async def __anext__(self) -> Sequence[ReceivedMessage]:
        while not self.is_closed:
            for number in list(self._owned):
                if messages := self._take(number):
                    return messages
            self._arrived.clear()
            await self._arrived.wait()
        raise StopAsyncIteration

    def settle(self, message: ReceivedMessage) -> None:
        progress = self._owned.get(message.queue_id)
        if progress is not None and isinstance(message, StoredMessage) and progress.settle(message):
            self._commit(message.queue_id)
            self.wake()

    async def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._owned.clear()
            self._cluster.leave(self)
            self.wake()

    def wake(self) -> None:
        self._arrived.set()

    def rebalance(self) -> None:
        """Own what is ours by the members of now."""
        if not self._cluster.exists(self.topic):
            return
        members = [member.client_id for member in self._cluster.members_of(self.topic, self.group)]
        offsets = self._cluster.offsets(self.topic, self.group, self._start)
        queues = [ReadQueue(_BROKER, number) for number in range(len(offsets))]
        mine = [queue.queue_id for queue in allocate(self.client_id, queues=queues, members=members)]
        self._owned = {number: self._owned.get(number) or SettledPrefix(offsets[number]) for number in mine}
        self.wake()

    def _take(self, number: int) -> list[StoredMessage]:
        if self._cluster.error(self.topic):
            return []
        progress = self._owned[number]
        queue = self._cluster.queues(self.topic)[number]
        wanted: list[StoredMessage] = []
        while not wanted and progress.frontier < len(queue):
            end = min(progress.frontier + _BATCH, len(queue))
            matching = [m for m in queue[progress.frontier : end] if self._tags.matches(m.properties)]
            room = progress.room(matching)
            wanted = matching[:room]
            progress.hand_out(wanted, end if room == len(matching) else matching[room].offset)
            if matching and not room:
                break
        self._commit(number)
        if wanted:
            self._owned[number] = self._owned.pop(number)
        return wanted

    def _commit(self, number: int) -> None:
        offsets = self._cluster.offsets(self.topic, self.group, self._start)
        offsets[number] = self._owned[number].committable


def _stored(queue: Queue, body: bytes, properties: dict[str, str], *, offset: int, now: int) -> StoredMessage:
    return StoredMessage(
        topic=queue.topic,
        body=body,
        properties=properties,
        broker=queue.broker,
        queue_id=queue.queue_id,
        offset=offset,
        commit_log_offset=0,
        born_ms=now,
        stored_ms=now,
        sys_flag=0,
        flag=0,
        reconsume_times=0,
        store_host=b"\x7f\0\0\x01\0\0\0\0",
    )
