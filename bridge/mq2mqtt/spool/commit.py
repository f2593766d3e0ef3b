"""Group commit: one fdatasync at a time, in a thread, shared by all who wait for it."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mq2mqtt.errors import LaneError
from mq2mqtt.spool.files import sync_directory

__all__ = ["GroupCommit"]

_Waiters = list[asyncio.Future[None]]


class GroupCommit:
    """Runs rounds while somebody waits.

    A round covers what was written before it began; who comes while it runs waits for the next one. Waiters are
    bounded by the publishes that adapters let wait.
    """

    def __init__(self, lane: Path, *, sync: Callable[[int], None], failed: Callable[[LaneError], None]) -> None:
        """Nothing runs before `wait`; `failed` is told once, when a round fails."""
        self._lane = lane
        self._sync = sync
        self._failed = failed
        self._failure: LaneError | None = None
        self._waiters: _Waiters = []
        self._served: _Waiters = []
        """Waiters of the round that runs."""
        self._finished: list[int] = []
        """Files of finished segments, ours to close after a round."""
        self._synced_files: list[int] = []
        """Those of the round that runs."""
        # The first segment's directory entry is as new as its first frame.
        self._directory_is_new = True
        self._descriptor = -1
        self._upto = self._synced = -1
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"mq2mqtt.sync[{lane.name}]")

    def wait(self, descriptor: int, *, upto: int) -> asyncio.Future[None] | None:
        """Return a future for everything before offset `upto`, the newest of which is in `descriptor`."""
        if upto == self._synced:
            return None
        future = asyncio.get_running_loop().create_future()
        if self._failure is not None:
            future.set_exception(self._failure)
            return future
        self._descriptor, self._upto = descriptor, upto
        self._waiters.append(future)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"mq2mqtt.lane[{self._lane.name}].sync")
        return future

    def file_finished(self, descriptor: int) -> None:
        """Take over a file that is appended to no more (-1: there was none); a new one may have taken its place."""
        if descriptor >= 0:
            self._finished.append(descriptor)
        self._directory_is_new = True

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiters:
                self._served, self._waiters = self._waiters, []
                self._synced_files, self._finished = self._finished, []
                directory, self._directory_is_new = self._directory_is_new, False
                upto = self._upto
                files = {*self._synced_files, self._descriptor} - {-1}
                await loop.run_in_executor(self._thread, self._round, files, directory)
                self._synced = upto
                self._end_round(None)
        except OSError as error:
            # The kernel reports a failed write-back once, and may say yes the next time: never try again.
            self._failure = LaneError(f"lane {self._lane}: fdatasync failed, restart the bridge: {error.strerror}")
            self._end_round(self._failure)
            self._failed(self._failure)
        finally:
            self._task = None

    def _round(self, files: set[int], directory: bool) -> None:  # noqa: FBT001 - the executor passes no keywords
        for descriptor in files:
            self._sync(descriptor)
        if directory:
            sync_directory(self._lane)

    def _end_round(self, failure: LaneError | None) -> None:
        """Answer those whom the round served, on failure all; close what it was the last to need."""
        for descriptor in self._synced_files:
            os.close(descriptor)
        self._synced_files = []
        answered, self._served = self._served, []
        if failure is not None:
            answered, self._waiters = answered + self._waiters, []
        for future in answered:
            if future.done():
                continue
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)

    def close(self, descriptor: int) -> None:
        """Wait for the round that runs, do a last one for those who still wait, and end. Idempotent."""
        self._thread.shutdown(wait=True)
        if self._task is not None:
            self._task.cancel()
        waiting = self._served or self._waiters
        self._served, self._waiters = self._served + self._waiters, []
        self._synced_files, self._finished = self._synced_files + self._finished, []
        failure = self._failure
        if failure is None and waiting:
            try:
                self._round({*self._synced_files, descriptor} - {-1}, directory=self._directory_is_new)
            except OSError as error:
                failure = LaneError(f"lane {self._lane}: the last fdatasync failed: {error.strerror}")
        self._end_round(failure)
        self._failure = failure or LaneError(f"lane {self._lane} is closed")
