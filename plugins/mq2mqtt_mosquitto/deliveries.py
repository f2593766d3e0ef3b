"""Operations on their way to the hook: batched per turn of the loop, sent again where an answer was lost."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from loguru import logger

from mq2mqtt_mosquitto.control import (
    BATCH_BYTES,
    BATCH_OPERATIONS,
    Refused,
    Result,
    Results,
    encode_batch,
    operation_at,
)

__all__ = ["Deliveries"]

UNANSWERED_BATCHES: Final = 64
"""Batches that are sent and not answered, at most."""

_ENOUGH_OPERATIONS = 4 * BATCH_OPERATIONS
_LARGE_BATCH = 128

# What a packet has besides a batch's operations: fixed header, topic, properties, the batch's own header; rounded up.
_PACKET_OVERHEAD_BYTES = 64


class _Job(NamedTuple):
    operation: bytes
    done: Callable[[Result], None]


class _Batch(NamedTuple):
    jobs: list[_Job]
    size: int
    sent_at: float


class Deliveries:
    """What the bridge wants done, in the order in which it wants it. Each operation's `done` is called once.

    While a batch has no answer yet, operations wait for it, or until there are enough of them for a large one: a batch
    costs as much as some ten operations, and its answer comes after a fraction of a millisecond.

    An operation that was sent and not answered when the connection ended is sent again: its receiver may get it twice.
    """

    def __init__(self) -> None:
        self._send: Callable[[bytes], bool] | None = None
        # Bounded by the windows of the inbound rules, which take no more while `room` waits.
        self._waiting: deque[_Job] = deque()  # bounded, see above
        self._unanswered: dict[int, _Batch] = {}
        self._number = 0
        self._longest: int | None = None
        self._flushing = False
        self._room = asyncio.Event()
        self._room.set()

    def next_number(self) -> int:
        """Return a number for a batch."""
        self._number = self._number % 0xFFFFFFFF + 1
        return self._number

    @property
    def overdue_seconds(self) -> float:
        """For how long the oldest batch has been waiting for its answer; 0 without one."""
        oldest = next(iter(self._unanswered.values()), None)
        return 0.0 if oldest is None else time.monotonic() - oldest.sent_at

    @property
    def longest_unanswered(self) -> int:
        """Bytes of the longest batch that has no answer yet; 0 without one."""
        return max((batch.size for batch in self._unanswered.values()), default=0)

    def add(self, operation: bytes, done: Callable[[Result], None]) -> None:
        """Have `operation` done; `done` is told how it ended."""
        self._waiting.append(_Job(operation, done))
        if len(self._waiting) >= _ENOUGH_OPERATIONS:
            self._room.clear()
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self.flush)

    async def room(self) -> None:
        """Return when there are not too many operations waiting."""
        await self._room.wait()

    def connected(self, send: Callable[[bytes], bool], *, packet_bytes: int | None = None) -> None:
        """Send what waits, and all that comes. `send` takes a batch, or says that it cannot now.

        An operation that is longer than the broker takes packets, `packet_bytes`, is refused: the broker would close
        the connection each time that it came.
        """
        self._send = send
        self._longest = None if packet_bytes is None else packet_bytes - _PACKET_OVERHEAD_BYTES
        self.flush()

    def limit(self, packet_bytes: int) -> None:
        """Keep to `packet_bytes` from now on; longer batches, whose answers will never come, are sent again first."""
        self._longest = packet_bytes - _PACKET_OVERHEAD_BYTES
        self._take_back([number for number, batch in self._unanswered.items() if batch.size > packet_bytes])
        self.flush()

    def disconnected(self) -> None:
        """Keep what was not answered, to be sent again first. Idempotent."""
        self._send = None
        self._take_back(list(self._unanswered))

    def _take_back(self, numbers: list[int]) -> None:
        jobs = [job for number in numbers for job in self._unanswered.pop(number).jobs]
        self._waiting.extendleft(reversed(jobs))

    def flush(self) -> None:
        """Send as much of what waits as the window allows."""
        self._flushing = False
        while self._waiting and self._send is not None and len(self._unanswered) < UNANSWERED_BATCHES:
            if self._unanswered and len(self._waiting) < _LARGE_BATCH:
                break
            jobs = self._next_jobs()
            if self._longest is not None and len(jobs[0].operation) > self._longest:
                self._refuse(jobs[0])
                continue
            number = self.next_number()
            batch = encode_batch(number, [job.operation for job in jobs])
            if not self._send(batch):
                self._waiting.extendleft(reversed(jobs))
                break
            self._unanswered[number] = _Batch(jobs, len(batch), time.monotonic())
        if len(self._waiting) < _ENOUGH_OPERATIONS:
            self._room.set()

    def _refuse(self, job: _Job) -> None:
        logger.error(
            "a message of {} bytes is dropped: the broker takes packets up to {}; raise its max_packet_size (and "
            "message_size_limit)",
            len(job.operation),
            self._longest,
        )
        job.done(Result.REFUSED)

    def _next_jobs(self) -> list[_Job]:
        """Take what fits into one batch; what is longer than that is alone."""
        limit = BATCH_BYTES if self._longest is None else min(BATCH_BYTES, self._longest)
        jobs = [self._waiting.popleft()]
        size = len(jobs[0].operation)
        while self._waiting and len(jobs) < BATCH_OPERATIONS:
            size += len(self._waiting[0].operation)
            if size > limit:
                break
            jobs.append(self._waiting.popleft())
        return jobs

    def answered(self, number: int, answer: Results | Refused) -> None:
        """Take the answer to a batch; one that nobody waits for is ignored."""
        batch = self._unanswered.get(number)
        if batch is None:
            return
        jobs = batch.jobs
        if isinstance(answer, Results):
            if len(answer.results) != len(jobs):
                logger.error("the hook answered {} operations with {} results", len(jobs), len(answer.results))
                return
            del self._unanswered[number]
            for job, result in zip(jobs, answer.results, strict=True):
                job.done(Result(result))
        else:
            del self._unanswered[number]
            index = operation_at([job.operation for job in jobs], answer.position)
            logger.error("the hook refuses an operation: {}", answer.text)
            # Nothing of the batch was done. The others are sent again, before all that came after them.
            self._waiting.extendleft(reversed([job for at, job in enumerate(jobs) if at != index]))
            jobs[index].done(Result.REFUSED)
        self.flush()
