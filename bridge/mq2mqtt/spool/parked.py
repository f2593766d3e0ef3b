"""Parked messages: those that can never be sent as they are. Kept with the reason, one file each, until replayed.

One file for each message makes dropping and replaying by another process a plain unlink, without locks.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

from mq2mqtt.errors import LaneCorruptError, LaneError, LaneFullError
from mq2mqtt.spool import frame as codec
from mq2mqtt.spool.files import make_directory, map_errors, replace_file
from mq2mqtt.spool.frame import Frame, FrameKind
from mq2mqtt.spool.lane import Durability
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.recovery import PARKED_NAME

__all__ = ["MAX_PARKED", "ParkedMessage", "ParkedStore", "count_parked", "list_parked"]

MAX_PARKED: Final = 10_000
"""Messages that one rule may park."""

_QUOTA_SHARE = 8
_SUFFIX = ".parked"
_MAX_NAME_BYTES = 200
_MAX_REASON_BYTES = 1000


class ParkedMessage(NamedTuple):
    """One parked message."""

    key: str
    """Unique in the rule: the offset of a lane's message, broker, queue and offset of a RocketMQ message."""
    reason: str
    parked_us: int
    """Microseconds since 1970."""
    frame: Frame
    """The message as it was."""
    path: Path


class ParkedStore:
    """Parks the messages of one rule in `spool/<rule id>/parked/`.

    It is bounded: when it is full the oldest message makes room. Whoever sends what can never go on must not be able
    to stop the rule for everybody else.
    """

    def __init__(
        self,
        lane: Path,
        *,
        max_bytes: int,
        durability: Durability = "process",
        max_messages: int = MAX_PARKED,
        machine: Machine | None = None,
    ) -> None:
        """`lane` is `spool/<rule id>`, `max_bytes` the lane's; an eighth of that is kept, at least one message.

        Raises:
            LaneError: the directory cannot be read.
        """
        self._directory = lane / PARKED_NAME
        self._max_bytes = max_bytes // _QUOTA_SHARE
        self._max_messages = max_messages
        self._sync = durability == "power"
        self._machine = machine or Machine()
        self._directory_is_safe = False
        self._changed_ns = -1
        self._sizes: dict[str, int] = {}
        self._look()

    @property
    def count(self) -> int:
        """Messages that are parked now.

        Raises:
            LaneError: the directory cannot be read.
        """
        self._look()
        return len(self._sizes)

    def append(self, frame: Frame, *, key: str, reason: str) -> int:
        """Park `frame`. The same `key` again (after a crash before the cursor moved) replaces the record.

        Returns:
            How many of the oldest messages were dropped for it: `max_messages`, or an eighth of `max_bytes`.

        Raises:
            LaneFullError: the disk refuses.
            ValueError: the key is empty or too long for a file name.
        """
        name = quote(key, safe="") + _SUFFIX
        if not key or len(name) > _MAX_NAME_BYTES:
            raise ValueError(f"{key!r} cannot be a parked message's key")
        self._look()
        # Cut at a character, and never so long that it does not fit its field.
        text = reason.encode("utf-8", "replace")[:_MAX_REASON_BYTES].decode("utf-8", "ignore")
        record = codec.encode(Frame(FrameKind.PARKED, 0, self._machine.now_us(), key, text, b"", codec.encode(frame)))
        self._write(name, record)
        self._sizes.pop(name, None)
        used = sum(self._sizes.values()) + len(record)
        dropped = 0
        while self._sizes and (len(self._sizes) >= self._max_messages or used > self._max_bytes):
            oldest = next(iter(self._sizes))
            used -= self._sizes.pop(oldest)
            (self._directory / oldest).unlink(missing_ok=True)
            dropped += 1
        self._sizes[name] = len(record)
        self._changed_ns = self._directory.stat().st_mtime_ns
        return dropped

    def _write(self, name: str, record: bytes) -> None:
        try:
            if not self._directory_is_safe or not self._directory.is_dir():
                make_directory(self._directory, mode=0o700)
                self._directory_is_safe = True
            replace_file(self._directory / name, record, sync=self._sync)
        except OSError as error:
            raise LaneFullError(f"cannot park in {self._directory}: {error.strerror}") from error

    def _look(self) -> None:
        """Learn what another process (replay, drop) changed."""
        with map_errors(self._directory, "read"):
            try:
                changed_ns = self._directory.stat().st_mtime_ns
                if changed_ns != self._changed_ns:
                    with os.scandir(self._directory) as found:
                        records = [(entry.stat(), entry.name) for entry in found if entry.name.endswith(_SUFFIX)]
                    records.sort(key=lambda record: record[0].st_mtime_ns)
                    self._sizes = {name: stat.st_size for stat, name in records}
                    self._changed_ns = changed_ns
            except FileNotFoundError:
                self._sizes = {}


def count_parked(lane: Path) -> int:
    """Return how many messages of a rule are parked.

    Raises:
        LaneError: the directory cannot be read.
    """
    with map_errors(lane / PARKED_NAME, "read"):
        try:
            return sum(path.suffix == _SUFFIX for path in (lane / PARKED_NAME).iterdir())
        except FileNotFoundError:
            return 0


def list_parked(lane: Path, *, on_damage: Callable[[LaneCorruptError], None] | None = None) -> list[ParkedMessage]:
    """Return a rule's parked messages, oldest first. Takes no lock.

    `on_damage` is told of each damaged file, and the others are read: with `durability: process` a loss of power may
    leave one.

    Raises:
        LaneCorruptError: a file is damaged, and there is no `on_damage`.
        LaneError: a file cannot be read.
    """
    directory = lane / PARKED_NAME
    with map_errors(directory, "read"):
        paths = [path for path in directory.iterdir() if path.suffix == _SUFFIX] if directory.is_dir() else []
    messages: list[ParkedMessage] = []
    for path in paths:
        try:
            message = _read(path)
        except LaneCorruptError as error:
            if on_damage is None:
                raise
            on_damage(error)
        else:
            messages += [message] if message is not None else []
    return sorted(messages, key=lambda message: (message.parked_us, message.key))


def _read(path: Path) -> ParkedMessage | None:
    """Read one record; `None` if it was dropped just now."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LaneError(f"cannot read {path}: {error.strerror}") from error
    records, ends = codec.decode_frames(data, 0, max_frames=1)
    if not records or ends[0] != len(data) or records[0].kind != FrameKind.PARKED:
        raise LaneCorruptError(f"{path}: damaged; restore it or move it away")
    record = records[0]
    frames, _ = codec.decode_frames(record.payload, 0, max_frames=1)
    if not frames:
        raise LaneCorruptError(f"{path}: holds no message; move it away")
    return ParkedMessage(record.client_id, record.topic, record.accepted_us, frames[0], path)
