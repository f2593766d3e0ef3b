"""Small file work that every part of a lane shares: atomic replacement, locks, and the words for what went wrong."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mq2mqtt.errors import LaneError, LaneLockedError

__all__ = ["NO_SPACE", "FileLock", "make_directory", "map_errors", "open_file", "replace_file", "sync_directory"]

NO_SPACE: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG))
"""Time mends these: somebody frees space, raises a quota or a limit, or the device recovers."""


@contextlib.contextmanager
def map_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an `OSError` into a `LaneError` that names the file."""
    try:
        yield
    except OSError as error:
        raise LaneError(f"cannot {doing} {error.filename or path}: {error.strerror}") from error


def sync_directory(path: Path) -> None:
    """Make the entries of a directory survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path, *, mode: int = 0o777) -> None:
    """Make a directory and those above it where they are missing, so that they survive a loss of power.

    What is there already may have been made by a process that was killed before it came to the fsync.
    """
    if path.is_dir():
        # Not ours to read, so not made by us.
        with contextlib.suppress(PermissionError):
            sync_directory(path.parent)
        return
    make_directory(path.parent)
    path.mkdir(mode=mode, exist_ok=True)
    sync_directory(path.parent)


def open_file(path: Path, flags: int) -> int:
    """Open a file of a lane. One that is made is the owner's, and the group's too if the directory is.

    Where another program writes the lane, as another user, the two have a group in common: the directory says so.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    if flags & os.O_CREAT and path.parent.stat().st_mode & stat.S_IWGRP:
        mode = os.fstat(descriptor).st_mode
        if not mode & stat.S_IWGRP:
            # Whoever made it has done so: it is ours unless it is all right already.
            with contextlib.suppress(PermissionError):
                os.fchmod(descriptor, 0o660)
    return descriptor


def replace_file(path: Path, data: bytes, *, sync: bool) -> None:
    """Give `path` new content at once: a reader, or a start after `kill -9`, sees the old or the new one.

    With `sync` this also holds for a loss of power. A leftover `.tmp` of an interrupted call is harmless.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        descriptor = open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if sync:
        sync_directory(path.parent)


class FileLock:
    """An exclusive `flock` on a file, held until `release`; it ends with the process, however that ends."""

    def __init__(self, path: Path, *, role: str) -> None:
        """Take the lock.

        Raises:
            LaneLockedError: another holder, in this process or another one.
            LaneError: the file cannot be used.
        """
        with map_errors(path, "open"):
            self._descriptor = open_file(path, os.O_RDWR | os.O_CREAT)
        try:
            with map_errors(path, "lock"):
                self._take(path, role)
        except LaneError:
            os.close(self._descriptor)
            raise

    def _take(self, path: Path, role: str) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise LaneLockedError(
                f"lane {path.parent}: process {holder} is already its {role}; stop it,"
                " or give this process a spool.path of its own"
            ) from error
        # Only for the text above: the lock itself is the kernel's, and a stale number does no harm.
        os.ftruncate(self._descriptor, 0)
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Let another one take it. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
