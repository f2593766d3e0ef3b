"""Who this bridge is to RocketMQ: the same over restarts, and another one for another bridge.

A default consumer group that shows a member with another id means that two bridges use one `node`; so the id must
neither change by itself (design section 7.6) nor be derived from anything two bridges can share.
"""

import fcntl
import os
import secrets
from pathlib import Path

from mq2mqtt.errors import ConfigError, LaneLockedError

__all__ = ["Instance"]

_HEX_DIGITS = 12


class Instance:
    """The file `<spool>/instance`, locked while the bridge runs. `id` is 12 hex digits, made once."""

    def __init__(self, spool: Path) -> None:
        """Open or create it.

        Raises:
            LaneLockedError: another bridge runs on this spool directory.
            ConfigError: the directory cannot be used.
        """
        path = spool / "instance"
        try:
            spool.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"spool.path: cannot use {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise LaneLockedError(
                f"spool.path: another bridge runs on {spool}: stop it, or give this one a spool.path of its own"
            ) from error
        self.id = os.read(self._fd, _HEX_DIGITS).decode("ascii", "replace")
        if len(self.id) != _HEX_DIGITS:
            self.id = secrets.token_hex(_HEX_DIGITS // 2)
            os.pwrite(self._fd, f"{self.id}\n".encode(), 0)
            os.fsync(self._fd)

    def close(self) -> None:
        """Let another process run on this spool. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
