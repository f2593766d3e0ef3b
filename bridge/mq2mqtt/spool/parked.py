"""Parked messages: those that can never be sent as they are. Kept with the reason, one file each, until replayed.

One file for each message makes dropping by another process a plain unlink, and asking for its replay a plain rename
from `KEY.parked` to `KEY.replay`, without locks. The bridge deletes a `.replay` when its message has arrived, or makes
a `.parked` of it again, with the new reason: a bridge that is killed meanwhile finds it at its next start.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

from loguru import logger

from mq2mqtt.errors import LaneCorruptError, LaneError, LaneFullError
from mq2mqtt.spool import frame as codec
from mq2mqtt.spool.files import make_directory, map_errors, replace_file, sync_directory
from mq2mqtt.spool.frame import Frame, FrameKind
from mq2mqtt.spool.lane import Durability
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.recovery import PARKED_NAME

__all__ = [
    "MAX_PARKED",
    "MAX_REPLAYS",
    "ParkedMessage",
    "ParkedStore",
    "ask_replay",
    "count_parked",
    "drop",
    "keys_of",
    "list_parked",
    "read_parked",
]

MAX_PARKED: Final = 10_000
"""Messages that one rule may park."""

MAX_REPLAYS: Final = 1000
"""Messages that are replayed in one go: naming them all would keep the loop from devices."""

_QUOTA_SHARE = 8
_SUFFIX = ".parked"
_REPLAY_SUFFIX = ".replay"
_MAX_NAME_BYTES = 200
_TICK_NS = 1_000_000_000
_MAX_REASON_BYTES = 1000


class ParkedMessage(NamedTuple):
    """One parked message."""

    key: str
    """Unique in the rule: the offset of a lane's message; see `mq2mqtt.replay.key_of` for a RocketMQ message."""
    reason: str
    parked_us: int
    """Microseconds since 1970."""
    frame: Frame
    """The message as it was."""
    path: Path

    @property
    def replaying(self) -> bool:
        """Whether its replay was asked for, and has not come to an end yet."""
        return self.path.suffix == _REPLAY_SUFFIX


class ParkedStore:
    """Parks the messages of one rule in `spool/<rule id>/parked/`.

    It is bounded: when it is full the oldest message makes room. Whoever sends what can never go on must not be able
    to stop the rule for everybody else. What waits for its replay takes room too, and is never dropped for another.
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
        self._replay_sizes: dict[str, int] = {}
        self._counted_ns = -1
        self._count = 0
        self._look()

    @property
    def count(self) -> int:
        """Messages that are parked now, those that wait for their replay too.

        Raises:
            LaneError: the directory cannot be read.
        """
        with map_errors(self._directory, "read"):
            try:
                changed_ns = self._directory.stat().st_mtime_ns
                # Two changes within one tick of the file system's clock look like one.
                if changed_ns != self._counted_ns or time.time_ns() - changed_ns < _TICK_NS:
                    names = os.listdir(self._directory)  # noqa: PTH208 - half the time
                    self._count = sum(name.endswith((_SUFFIX, _REPLAY_SUFFIX)) for name in names)
                    self._counted_ns = changed_ns
            except FileNotFoundError:
                return 0
        return self._count

    def append(self, frame: Frame, *, key: str, reason: str) -> int:
        """Park `frame`. The same `key` again (after a crash before the cursor moved) replaces the record.

        Returns:
            How many of the oldest messages were dropped for it: `max_messages`, or an eighth of `max_bytes`.

        Raises:
            LaneError: the disk refuses.
            ValueError: the key is empty or too long for a file name.
        """
        name = _name(key)
        if not _is_possible(key):
            raise ValueError(f"{key!r} cannot be a parked message's key")
        self._look()
        # Cut at a character, and never so long that it does not fit its field.
        text = reason.encode("utf-8", "replace")[:_MAX_REASON_BYTES].decode("utf-8", "ignore")
        record = codec.encode(Frame(FrameKind.PARKED, 0, self._machine.now_us(), key, text, b"", codec.encode(frame)))
        self._write(key, record)
        self._sizes.pop(name, None)
        self._replay_sizes.pop(_replay_name(key), None)
        with map_errors(self._directory, "park in"):
            dropped = self._make_room(len(record))
            self._sizes[name] = len(record)
            self._changed_ns = self._directory.stat().st_mtime_ns
        return dropped

    def _make_room(self, size: int) -> int:
        """Drop the oldest messages until another one, of `size` bytes, is within the bounds; return how many."""
        messages, dropped = len(self._sizes) + len(self._replay_sizes), 0
        used = sum(self._sizes.values()) + sum(self._replay_sizes.values()) + size
        while self._sizes and (messages >= self._max_messages or used > self._max_bytes):
            oldest = next(iter(self._sizes))
            used -= self._sizes.pop(oldest)
            messages -= 1
            try:
                (self._directory / oldest).unlink()
            except FileNotFoundError:
                continue  # dropped, or to be replayed, just now
            dropped += 1
        return dropped

    def replays(self) -> list[str]:
        """Return the keys of the messages to be replayed, by offset for each queue: the first `MAX_REPLAYS` of them.

        Raises:
            LaneError: the directory cannot be read.
        """
        with map_errors(self._directory, "read"):
            try:
                names = os.listdir(self._directory)  # noqa: PTH208 - half the time
            except FileNotFoundError:
                return []
        found = sorted((name for name in names if name.endswith(_REPLAY_SUFFIX)), key=lambda name: (len(name), name))
        return [_key(name) for name in found[:MAX_REPLAYS]]

    def read_replay(self, key: str) -> ParkedMessage | None:
        """Read a message that is to be replayed; `None` if it is not any more.

        A damaged one can never be: it is parked as it is, so that `parked ls` names it.

        Raises:
            LaneError: it cannot be read now.
        """
        path = self._directory / _replay_name(key)
        try:
            return _read(path)
        except LaneCorruptError as error:
            logger.error("not replayed: {}", error)
            with map_errors(path, "park"):
                path.rename(self._directory / _name(key))
            return None

    def replayed(self, key: str) -> None:
        """The message with this key has arrived: forget it.

        Raises:
            LaneError: it cannot be deleted.
        """
        path = self._directory / _replay_name(key)
        with map_errors(path, "delete"):
            if not self._directory.is_dir():
                return
            is_known = self._directory.stat().st_mtime_ns == self._changed_ns
            path.unlink(missing_ok=True)
            self._replay_sizes.pop(path.name, None)
            if is_known:
                # Looking at thousands of files again for each of them would take the loop.
                self._changed_ns = self._directory.stat().st_mtime_ns

    def _write(self, key: str, record: bytes) -> None:
        path, replay = self._directory / _name(key), self._directory / _replay_name(key)
        try:
            if not self._directory_is_safe or not self._directory.is_dir():
                make_directory(self._directory, mode=0o700)
                self._directory_is_safe = True
            if replay.exists():
                # One file all the time: with two of them a replay that has succeeded would leave one behind. Where
                # the disk takes nothing, it stays parked for the reason that it had.
                with contextlib.suppress(OSError):
                    replace_file(replay, record, sync=self._sync)
                replay.replace(path)
                if self._sync:
                    sync_directory(self._directory)
            else:
                replace_file(path, record, sync=self._sync)
        except OSError as error:
            raise LaneFullError(f"cannot park in {self._directory}: {error.strerror}") from error

    def _look(self) -> None:
        """Learn what another process (replay, drop) changed."""
        with map_errors(self._directory, "read"):
            try:
                changed_ns = self._directory.stat().st_mtime_ns
                if changed_ns != self._changed_ns:
                    names = set(os.listdir(self._directory))  # noqa: PTH208 - half the time
                    known = self._sizes | self._replay_sizes
                    self._sizes = self._sized(names, _SUFFIX, known)
                    self._replay_sizes = self._sized(names, _REPLAY_SUFFIX, known)
                    self._changed_ns = changed_ns
            except FileNotFoundError:
                self._sizes, self._replay_sizes = {}, {}

    def _sized(self, names: set[str], suffix: str, known: Mapping[str, int]) -> dict[str, int]:
        """Return name and size of each file, oldest first. Of thousands, only news are worth a look."""
        sizes = {name: size for name, size in known.items() if name in names and name.endswith(suffix)}
        news: list[tuple[int, str, int]] = []
        for name in names:
            if name.endswith(suffix) and name not in sizes:
                before = known.get(name.removesuffix(_REPLAY_SUFFIX) + _SUFFIX)
                if before is not None:
                    news.append((0, name, before))
                    continue
                with contextlib.suppress(FileNotFoundError):
                    stat = (self._directory / name).stat()
                    news.append((stat.st_mtime_ns, name, stat.st_size))
        return sizes | {name: size for _, name, size in sorted(news)}


def _name(key: str) -> str:
    return quote(key, safe="", errors="surrogateescape") + _SUFFIX


def _replay_name(key: str) -> str:
    return quote(key, safe="", errors="surrogateescape") + _REPLAY_SUFFIX


def _is_possible(key: str) -> bool:
    """Whether a message can be parked with this key."""
    return bool(key) and len(_name(key)) <= _MAX_NAME_BYTES


def _key(name: str) -> str:
    return unquote(name.rpartition(".")[0], errors="surrogateescape")


def count_parked(lane: Path) -> int:
    """Return how many messages of a rule are parked.

    Raises:
        LaneError: the directory cannot be read.
    """
    return len(_paths(lane))


def keys_of(lane: Path) -> list[str]:
    """Return the keys of a rule's parked messages, in their order as texts, without reading them.

    Raises:
        LaneError: the directory cannot be read.
    """
    return sorted({_key(path.name) for path in _paths(lane)})


def _paths(lane: Path) -> list[Path]:
    directory = lane / PARKED_NAME
    with map_errors(directory, "read"):
        try:
            return [path for path in directory.iterdir() if path.suffix in (_SUFFIX, _REPLAY_SUFFIX)]
        except FileNotFoundError:
            return []


def read_parked(lane: Path, key: str) -> ParkedMessage | None:
    """Return one parked message, `None` if there is none with this key.

    Raises:
        LaneCorruptError: it is damaged.
        LaneError: it cannot be read.
    """
    for name in (_replay_name(key), _name(key)) if _is_possible(key) else ():
        message = _read(lane / PARKED_NAME / name)
        if message is not None:
            return message
    return None


def list_parked(lane: Path, *, on_damage: Callable[[LaneCorruptError], None] | None = None) -> list[ParkedMessage]:
    """Return a rule's parked messages, oldest first. Takes no lock.

    `on_damage` is told of each damaged file, and the others are read: with `durability: process` a loss of power may
    leave one.

    Raises:
        LaneCorruptError: a file is damaged, and there is no `on_damage`.
        LaneError: a file cannot be read.
    """
    messages: list[ParkedMessage] = []
    for path in _paths(lane):
        try:
            message = _read(path)
        except LaneCorruptError as error:
            if on_damage is None:
                raise
            on_damage(error)
        else:
            messages += [message] if message is not None else []
    return sorted(messages, key=lambda message: (message.parked_us, message.key))


def ask_replay(lane: Path, key: str) -> bool:
    """Have the bridge of this spool send a parked message again: within a second, or at its next start.

    Returns:
        False if there is no such message.

    Raises:
        LaneCorruptError: it is damaged.
        LaneError: it cannot be read, or not renamed.
    """
    message = read_parked(lane, key)
    if message is None:
        return False
    with map_errors(message.path, "rename"):
        try:
            message.path.rename(message.path.with_name(_replay_name(key)))
        except FileNotFoundError:
            return False
    return True


def drop(lane: Path, key: str) -> bool:
    """Delete a parked message, damaged or not; one that is just being replayed may arrive all the same.

    Returns:
        False if there is no such message.

    Raises:
        LaneError: it cannot be deleted.
    """
    found = False
    for name in (_name(key), _replay_name(key)) if _is_possible(key) else ():
        path = lane / PARKED_NAME / name
        with map_errors(path, "delete"):
            try:
                path.unlink()
            except FileNotFoundError:
                continue
        found = True
    return found


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
