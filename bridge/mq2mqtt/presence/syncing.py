"""What nobody waits for, on disk all the same: one sync after another while there is something new."""

import asyncio
from collections.abc import Callable

__all__ = ["Syncing"]


class Syncing:
    """Calls `wait`, which begins a sync and returns its future, or `None` when there is nothing to sync."""

    def __init__(self, wait: Callable[[], asyncio.Future[None] | None]) -> None:
        self._wait = wait
        self._running: asyncio.Future[None] | None = None
        self._more = False

    def soon(self) -> None:
        """Have everything that was written by now synced; does not wait for it."""
        if self._running is not None:
            self._more = True
            return
        self._more = False
        future = self._wait()
        if future is not None:
            self._running = future
            future.add_done_callback(self._done)

    def _done(self, future: asyncio.Future[None]) -> None:
        self._running = None
        # Who writes next is told of a failure.
        if not future.cancelled() and future.exception() is None and self._more:
            self.soon()
