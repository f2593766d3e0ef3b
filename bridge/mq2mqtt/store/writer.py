"""The one task that writes: what has come in since the last transaction becomes the next one."""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from loguru import logger

from mq2mqtt.errors import StoreError, UnstorableError
from mq2mqtt.store.changes import Batch, Operation
from mq2mqtt.store.database import Database

__all__ = ["BATCH_ROWS", "Writer"]

BATCH_ROWS: Final = 500
"""Rows that one transaction writes."""
_FIRST_ROWS: Final = 400
"""Of them, what goes first where others wait: it must be faster than these, and not keep them out."""
_BATCH_BYTES: Final = 4 << 20
_WAITING_OPERATIONS: Final = 20_000
_WAITING_BYTES: Final = 64 << 20
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
_SLOW_SECONDS: Final = 5.0
"""A write that takes longer is a problem to show, before the database says anything."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An operation, and who waits for it. `size` is of its payload, in bytes."""

    operation: Operation
    done: asyncio.Future[None]
    rows: int
    size: int


class Writer:
    """Writes to `database` in the order in which operations are submitted, but for those that go first.

    Starts its task; `close` ends it.
    """

    def __init__(self, database: Database, *, node: str) -> None:
        self._database = database
        self._node = node
        self._queue: deque[_Waiting] = deque()  # bounded by _WAITING_OPERATIONS, and by the subscriptions there are
        self._first: deque[_Waiting] = deque()  # bounded by the messages there are to remove
        self._bytes = 0
        self._news = asyncio.Event()
        self._closing = False
        self._fault: str | None = None
        self._began: float | None = None
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run(), name="mq2mqtt.store")

    @property
    def problem(self) -> str | None:
        """See `Store.problem`."""
        if self._fault is None and self._began is not None:
            seconds = time.monotonic() - self._began
            if seconds > _SLOW_SECONDS:
                return f"store: a write has taken {seconds:.0f} s so far"
        return self._fault

    def submit(
        self, operation: Operation, *, rows: int = 1, size: int = 0, always: bool = False
    ) -> asyncio.Future[None]:
        """Have `operation` done in one of the next transactions; the future is done when that is committed.

        It raises `StoreError` when too much waits already, unless `always`, or the writer was closed before.
        """
        done = self._loop.create_future()
        full = len(self._queue) >= _WAITING_OPERATIONS or self._bytes + size > _WAITING_BYTES
        if self._closing:
            done.set_exception(StoreError("store: it is closed"))
        elif full and self._queue and not always:
            done.set_exception(StoreError(self.problem or "store: too much waits to be written"))
        else:
            self._queue.append(_Waiting(operation, done, rows, size))
            self._bytes += size
            self._news.set()
        return done

    def submit_first(self, operation: Operation, *, rows: int) -> asyncio.Future[None]:
        """As `submit`, always taken and done before what was submitted so far: it must not need any of that."""
        if self._closing:
            return self.refuse(StoreError("store: it is closed"))
        done = self._loop.create_future()
        self._first.append(_Waiting(operation, done, rows, 0))
        self._news.set()
        return done

    def note(self, operation: Operation) -> None:
        """As `submit`, where nobody wants to know what becomes of it."""
        done = self.submit(operation)
        done.add_done_callback(lambda done: done.cancelled() or done.exception())

    def refuse(self, error: StoreError) -> asyncio.Future[None]:
        """Return a future that has failed."""
        done = self._loop.create_future()
        done.set_exception(error)
        return done

    async def close(self, *, seconds: float) -> None:
        """Write what waits, for `seconds` at most; fail the rest. Idempotent."""
        self._closing = True
        self._news.set()
        await asyncio.wait([self._task], timeout=seconds)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        left = [*self._first, *self._queue]
        if left:
            logger.warning("store: closed with {} changes not written", len(left))
        self._first.clear()
        self._queue.clear()
        for waiting in left:
            _fail(waiting, StoreError("store: it was closed before this was written"))

    async def _run(self) -> None:
        while self._first or self._queue or not self._closing:
            if not self._first and not self._queue:
                self._news.clear()
                await self._news.wait()
                continue
            # They stay in their queues until they are written: what is closed in the middle has failed.
            first = _next_of(self._first, rows=_FIRST_ROWS if self._queue else BATCH_ROWS)
            others = _next_of(self._queue, rows=BATCH_ROWS - sum(waiting.rows for waiting in first))
            await self._write([*first, *others])
            for _ in first:
                self._first.popleft()
            for _ in others:
                self._bytes -= self._queue.popleft().size

    async def _write(self, batch: Sequence[_Waiting]) -> None:
        """Write `batch`, however long it takes; set its futures."""
        try:
            await self._commit_at_last(batch)
        except UnstorableError as error:
            if len(batch) == 1:
                logger.error("{}; what cannot be stored is refused", error)
                _fail(batch[0], error)
                return
            # Halved until only the culprit fails.
            middle = len(batch) // 2
            await self._write(batch[:middle])
            await self._write(batch[middle:])
            return
        for waiting in batch:
            if not waiting.done.done():
                waiting.done.set_result(None)

    async def _commit_at_last(self, batch: Sequence[_Waiting]) -> None:
        pause = _FIRST_PAUSE
        failing_since = None
        while True:
            self._began = time.monotonic()
            try:
                await self._commit(batch)
            except UnstorableError:
                raise
            except StoreError as error:
                self._fault = str(error)
            except Exception as error:  # noqa: BLE001 - the task's top edge: nothing would be written any more
                logger.opt(exception=error).error("store: unexpected error, trying again")
                self._fault = f"store: unexpected: {error!r}"
            else:
                break
            finally:
                self._began = None
            if failing_since is None:
                failing_since = time.monotonic()
                logger.warning("{}; trying again until it works", self._fault)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._fault = None
        if failing_since is not None:
            logger.info("store: writes again, after {:.1f} s", time.monotonic() - failing_since)

    async def _commit(self, waiting: Sequence[_Waiting]) -> None:
        batch = Batch()
        for entry in waiting:
            entry.operation(batch)
        async with self._database.transaction() as connection:
            for statement, parameters in batch.steps(self._node, self._database.dialect):
                await connection.execute(statement, parameters)


def _next_of(queue: Iterable[_Waiting], *, rows: int) -> list[_Waiting]:
    """Return what comes next in `queue`: so many rows, or the one that has more."""
    batch: list[_Waiting] = []
    size = 0
    for waiting in queue:
        rows -= waiting.rows
        size += waiting.size
        if batch and (rows < 0 or size > _BATCH_BYTES):
            break
        batch.append(waiting)
    return batch


def _fail(waiting: _Waiting, error: StoreError) -> None:
    if not waiting.done.done():
        waiting.done.set_exception(error)
