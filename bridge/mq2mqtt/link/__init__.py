"""The RocketMQ side of the bridge, as the rest of it sees it.

A driver implements `RocketLink`, and declares what of it it can't do (`mq2mqtt.link.capabilities`). It raises only
errors of `mq2mqtt.errors` (`LinkError` and below are retriable, `MessageRejectedError` is not) and never retries a
send by itself: the delivery loop owns retries.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from mq2mqtt.message import ReceivedMessage, RocketMessage

__all__ = ["ConsumeFrom", "GroupMember", "Queue", "RocketLink", "Subscription"]


@dataclass(frozen=True, slots=True, order=True)
class Queue:
    """One writable queue of a topic. Sorted order is the same on every bridge."""

    topic: str
    broker: str
    queue_id: int


class ConsumeFrom(StrEnum):
    """Where a consumer group that is born now starts, in every queue of the route (design section 2)."""

    LATEST = "latest"
    EARLIEST = "earliest"


@dataclass(frozen=True, slots=True)
class GroupMember:
    """A member of a consumer group; `ours` is false for any other process's."""

    client_id: str
    ours: bool


class Subscription(Protocol):
    """One topic consumed in one group.

    Iterating yields batches; a batch is of one queue, in its order. Each message must be given to `settle`
    exactly once, in any order: the committed offset is the end of the settled prefix of each queue. At most
    1000 messages of a queue are handed out unsettled.
    """

    @property
    def problem(self) -> str | None:
        """Why nothing can be received now, in words for an operator; `None` after an answered fetch."""

    @property
    def lag(self) -> int | None:
        """Messages in RocketMQ behind the committed offsets, as of the last fetch; `None` where none can tell."""

    @property
    def unreadable(self) -> int:
        """Messages so far that could not be decoded: they are logged and left out."""

    async def members(self) -> tuple[GroupMember, ...]:
        """Who is in the group now, by RocketMQ's own list; nobody where none can tell."""

    def __aiter__(self) -> AsyncIterator[Sequence[ReceivedMessage]]: ...

    def settle(self, message: ReceivedMessage) -> None:
        """Say that nothing more will be done about `message`."""

    async def close(self) -> None:
        """Commit what is settled and leave the group. Idempotent."""


class RocketLink(Protocol):
    """A client of one RocketMQ cluster, for any number of topics and groups."""

    async def start(self) -> None:
        """Make ready. Does not need RocketMQ to be there."""

    async def close(self) -> None:
        """End everything; unanswered sends fail with `NotConnectedError`. Idempotent."""

    async def queues(self, topic: str) -> tuple[Queue, ...]:
        """Return the writable queues of `topic`, sorted, from a route that is refreshed in the background.

        Raises:
            TopicNotFoundError: no name server knows the topic.
            NotConnectedError: no name server answers.
            NotAuthorizedError: the topic is not writable.
        """

    async def send(self, queue: Queue, messages: Sequence[RocketMessage]) -> None:
        """Store `messages` in `queue` in their order: all of them, or raise. Returns when stored.

        Raises:
            MessageRejectedError: one of them is illegal; which one is not known for more than one message.
            LinkError: not stored, or not known to be; send them again later.
        """

    async def probe(self, topic: str) -> None:
        """Prove now that `topic` is routed and its brokers answer; raises like `queues` and `send`."""

    async def subscribe(self, topic: str, group: str, *, tags: str, start: ConsumeFrom) -> Subscription:
        """Join `group`; `tags` is a RocketMQ tag expression (`*`, `a`, `a || b`). Does not wait for RocketMQ."""

    async def require_writing(self, topic: str) -> None:
        """Return when `topic` would be written, without writing; raises like `queues` and `send`."""

    async def require_reading(self, topic: str, group: str) -> None:
        """Return when `topic` could be consumed in `group`, without consuming.

        Raises:
            NotAuthorizedError: the key is wrong, or lacks a right to the topic or the group.
            LinkError: there is another obstacle; the text names it.
        """

    async def topic_exists(self, topic: str) -> bool:
        """Whether a name server has a route for `topic`; raises `LinkError` when none answers."""

    async def create_topic(self, topic: str, *, queues: int = 4) -> None:
        """Create `topic` on every broker of the cluster; an existing one is left as it is."""
