"""One queue: pulling from it, past what the library can't read, and what of it is out."""

import time
from dataclasses import dataclass, field
from typing import Final

from loguru import logger

from mq2mqtt.link import Queue
from mq2mqtt.link.librocketmq.clients import Consumer, Pulled, PullStatus
from mq2mqtt.rocketmq.message import ReceivedMessage
from mq2mqtt.rocketmq.offsets import SettledPrefix
from mq2mqtt.rocketmq.tags import TagFilter

__all__ = ["FAR", "RETRY_SECONDS", "Reading", "Step"]

FAR: Final = 2**62
"""An offset beyond the end of any queue: a pull from it tells where the queue ends, and transfers nothing."""

RETRY_SECONDS: Final = 1.0
_PULL_MESSAGES: Final = 32  # what a broker gives at most, by default
# A message that cannot be decoded fails the pull just as an outage does. So often has it to fail alone, a second
# apart, while the broker answers, before it is left out.
_FAILURES: Final = 5
# A pull that is not answered takes 10 s. One that fails in decoding has had its answer.
_SOON_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Step:
    """What a pull brought; `frontier` is where the next one begins, `end` where the queue does."""

    frontier: int
    end: int
    messages: list[ReceivedMessage] = field(default_factory=list)
    problem: str | None = None
    is_silent: bool = False
    """The broker does not answer, or refuses."""
    is_moved: bool = False
    """The queue does not have what was asked for: it begins later by now, or was made again."""
    unreadable: int = 0


class Reading:
    """A queue as it is read: what is out of it, and at most one pull that is not yet.

    Args:
        queue: that is read.
        start: offset of its first message.
        committed: RocketMQ's own offset for the group, if it has one.
        end: of the queue.
    """

    __slots__ = (
        "_alone",
        "_failures",
        "committed",
        "end",
        "prefix",
        "problem",
        "queue",
        "ready",
        "ready_end",
        "retry_at",
    )

    def __init__(self, queue: Queue, *, start: int, committed: int | None, end: int) -> None:
        self.queue = queue
        self.prefix = SettledPrefix(start)
        self.committed = committed
        self.end = end
        self.ready: list[ReceivedMessage] = []
        self.ready_end = start
        self.problem: str | None = None
        self.retry_at = 0.0
        # Touched by the thread that pulls, and by no other.
        self._alone = 0
        """How many messages more are to be pulled one by one: there is one among them that can't be read."""
        self._failures = 0

    @property
    def lag(self) -> int:
        """Messages behind what may be committed, as of the last pull."""
        return max(0, self.end - self.prefix.committable)

    @property
    def silence(self) -> str:
        """What is wrong when a pull has no answer."""
        return f"broker {self.queue.broker} does not answer a pull from topic {self.queue.topic}, or refuses it"

    def pull(self, consumer: Consumer) -> Step:
        """Pull what follows, whatever its tags; blocks."""
        offset = self.prefix.frontier
        soon = time.monotonic() + _SOON_SECONDS
        if not self._alone:
            pulled = consumer.pull(self.queue, offset, count=_PULL_MESSAGES)
            if pulled.status is PullStatus.NO_ANSWER:
                if time.monotonic() > soon:
                    return self._silence(offset)
            elif len(pulled.messages) == pulled.found:
                return self._step(pulled)
            if pulled.messages:
                self._alone = _PULL_MESSAGES
                return Step(pulled.messages[-1].offset + 1, pulled.max_offset, pulled.messages)
        return self._pull_alone(consumer, offset, soon)

    def _pull_alone(self, consumer: Consumer, offset: int, soon: float) -> Step:
        pulled = consumer.pull(self.queue, offset, count=1)
        if pulled.status is not PullStatus.NO_ANSWER:
            self._failures = 0
            self._alone = max(0, self._alone - 1)
            if pulled.messages or not pulled.found:
                return self._step(pulled)
            return self._leave_out(offset, pulled.max_offset)
        if time.monotonic() > soon:
            return self._silence(offset)
        ends = consumer.pull(self.queue, FAR)
        if ends.status is PullStatus.NO_ANSWER or not ends.min_offset <= offset < ends.max_offset:
            return self._silence(offset)
        self._alone = self._alone or _PULL_MESSAGES
        self._failures += 1
        if self._failures < _FAILURES:
            where = f"offset {offset} of queue {self.queue.queue_id} of topic {self.queue.topic} on {self.queue.broker}"
            return Step(offset, ends.max_offset, problem=f"librocketmq cannot read the message at {where}")
        return self._leave_out(offset, ends.max_offset)

    def _silence(self, offset: int) -> Step:
        self._failures = 0
        return Step(offset, self.end, problem=self.silence, is_silent=True)

    def _step(self, pulled: Pulled) -> Step:
        if pulled.status is PullStatus.OFFSET_ILLEGAL:
            return Step(pulled.next_offset, pulled.max_offset, is_moved=True)
        return Step(max(pulled.next_offset, self.prefix.frontier), pulled.max_offset, pulled.messages)

    def _leave_out(self, offset: int, end: int) -> Step:
        self._alone = self._failures = 0
        logger.error(
            "librocketmq cannot read the message at offset {} of queue {} of topic {} on broker {}, and leaves it out: "
            "its sender is connected over IPv6, or its body is compressed by LZ4 or Zstd",
            offset,
            self.queue.queue_id,
            self.queue.topic,
            self.queue.broker,
        )
        return Step(offset + 1, end, unreadable=1)

    def keep(self, step: Step, tags: TagFilter) -> None:
        """Make what a pull brought ready to be taken."""
        self.end = step.end
        if self.problem is not None and step.problem is None:
            # A broker that was killed may have forgotten the last seconds of commits.
            self.committed = None
        self.problem = step.problem
        if step.problem is not None:
            self.retry_at = time.monotonic() + RETRY_SECONDS
        elif step.is_moved:
            self.prefix.reset(step.frontier)
        else:
            self.ready = [message for message in step.messages if tags.matches(message.properties)]
            self.ready_end = step.frontier
            if not self.ready:
                self.prefix.hand_out([], step.frontier)

    def take(self) -> list[ReceivedMessage]:
        """Return what is ready, as far as the window has room for it."""
        room = self.prefix.room(self.ready)
        messages, self.ready = self.ready[:room], self.ready[room:]
        if messages:
            self.prefix.hand_out(messages, self.ready[0].offset if self.ready else self.ready_end)
        return messages
