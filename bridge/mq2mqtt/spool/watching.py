"""News of files that another process writes, from the kernel: one inotify instance for all lanes."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from inotify_simple import INotify, flags
from loguru import logger

__all__ = ["Watcher"]

_News = Callable[[str], None]


class Watcher:
    """Tells of growing files and of new names in directories. Callbacks run on the event loop.

    News may be lost (the kernel's queue is full, a limit on watches is reached): whoever waits looks for itself now and
    then as well.
    """

    def __init__(self) -> None:
        self._inotify: INotify | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watches: dict[int, _News] = {}
        self._complained = False

    def once(self, file: Path, news: Callable[[], None]) -> None:
        """Call `news` at the next change of `file`'s content, and not again. What came before may be missed."""
        self._watch(file, flags.MODIFY | flags.ONESHOT, lambda _: news())

    def directory(self, path: Path, news: _News) -> int | None:
        """Call `news` with each name that appears in `path`, until `forget` of what this returns."""
        return self._watch(path, flags.CREATE | flags.MOVED_TO | flags.ONLYDIR, news)

    def forget(self, watch: int | None) -> None:
        """End what `directory` began. Idempotent."""
        if watch is not None and self._inotify is not None and self._watches.pop(watch, None) is not None:
            with contextlib.suppress(OSError):
                self._inotify.rm_watch(watch)

    def _watch(self, path: Path, mask: int, news: _News) -> int | None:
        try:
            watch = int(self._opened().add_watch(path, mask))
        except FileNotFoundError:
            return None
        except OSError as error:
            if not self._complained:
                logger.warning("{}: cannot be watched ({}); new messages are found once a second", path, error.strerror)
            self._complained = True
            return None
        self._watches[watch] = news
        return watch

    def _opened(self) -> INotify:
        """Return the instance, made when the first watch is set: the loop runs by then."""
        if self._inotify is None:
            self._loop = asyncio.get_running_loop()
            self._inotify = INotify(nonblocking=True)
            self._loop.add_reader(self._inotify.fileno(), self._read)
        return self._inotify

    def _read(self) -> None:
        assert self._inotify is not None  # noqa: S101 - it calls this
        for watch, mask, _, name in self._inotify.read(timeout=0):
            if mask & flags.Q_OVERFLOW:
                for news in list(self._watches.values()):
                    news("")
            elif mask & flags.IGNORED:
                self._watches.pop(watch, None)
            elif (told := self._watches.get(watch)) is not None:
                told(name)

    def close(self) -> None:
        """Watch nothing more. Idempotent."""
        if self._inotify is not None and self._loop is not None:
            self._loop.remove_reader(self._inotify.fileno())
            self._inotify.close()
            self._inotify = None
        self._watches.clear()
