"""The writing end of a lane: append-only segment files, one synchronous `write` for each frame.

`durability: process` ends there: the page cache survives `kill -9`. `power` adds group commit (`Lane.durable`).
"""

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NoReturn, Self

from loguru import logger

from mq2mqtt.errors import FrameTooLargeError, LaneError, LaneFullError
from mq2mqtt.spool import frame as codec
from mq2mqtt.spool.commit import GroupCommit
from mq2mqtt.spool.cursor import Head, read_cursor
from mq2mqtt.spool.files import NO_SPACE, FileLock, make_directory, map_errors, open_file, sync_directory
from mq2mqtt.spool.info import LaneInfo, read_info, write_info
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.recovery import (
    WRITER_LOCK,
    Chain,
    accepted_us_at,
    base_of,
    created_us_of,
    find_head,
    list_segments,
    read_chain,
    unsettled,
)
from mq2mqtt.spool.segment import HEADER_BYTES, Segment, SegmentHeader, segment_name

if TYPE_CHECKING:
    import asyncio

__all__ = ["Durability", "Lane"]

Durability = Literal["process", "power"]

MAX_SEGMENT_BYTES: Final = 64 * 1024 * 1024
SEGMENTS_PER_LANE: Final = 8

# After a loss of power, messages that were sent may be missing at the end of the lane. Their offsets are never given
# out again, because consumers would take the new messages for duplicates. The clock is normally far ahead of them;
# this is for a clock that restarts in the past: 100 s of the fastest appending.
_SKIP_AFTER_BOOT = 1 << 24


class Lane:
    """The durable queue of one rule: the writer, and the owner of the directory `spool/<rule id>/`.

    A message's offset is its sequence number; offsets rise, and may skip where a lane was reopened after the machine
    started anew. A new lane's first offset is its creation time in microseconds.
    """

    info: LaneInfo
    first: Segment
    """The oldest segment; the others follow by `next`."""
    last: Segment
    """The segment that is appended to."""
    head: Head
    """Where the oldest unsettled message is, or the next one will be."""
    messages: int
    """Messages that are not settled."""
    unsent_bytes: int
    """Bytes of frames from the head on: what `max_bytes` bounds."""
    _lock: FileLock
    on_space: Callable[[], None] | None = None
    """Called, from within the reader's `settle`, when what was refused last would fit now. May append."""

    def __init__(self, path: Path, *, max_bytes: int, durability: Durability, machine: Machine) -> None:
        """Use `Lane.open`."""
        if max_bytes <= 0:
            raise ValueError("max_bytes must be positive")
        self.path = path
        self.max_bytes = max_bytes
        self.durability: Durability = durability
        self._segment_bytes = min(MAX_SEGMENT_BYTES, max_bytes // SEGMENTS_PER_LANE)
        self._machine = machine
        self._descriptor = -1
        self._failure: LaneError | None = None
        self._next_base: int | None = None
        self._refused_bytes = 0
        self._head_time: tuple[Head, int] | None = None
        self._wake_reader: Callable[[], None] | None = None
        self._commit: GroupCommit | None = None
        if durability == "power":
            self._commit = GroupCommit(path, sync=machine.sync, failed=self._fail)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        max_bytes: int,
        target: str,
        durability: Durability = "process",
        machine: Machine | None = None,
    ) -> Self:
        """Lock the lane's directory, made if missing, and recover it. The rule id is the directory's name.

        Raises:
            LaneLockedError: it has a writer already.
            LaneCorruptError: damage that no crash explains.
            LaneError: a file cannot be read or written.
        """
        lane = cls(path, max_bytes=max_bytes, durability=durability, machine=machine or Machine())
        with map_errors(path, "create"):
            make_directory(path, mode=0o700)
        lane._lock = FileLock(path / WRITER_LOCK, role="writer")
        try:
            with map_errors(path, "open"):
                lane._recover(target)
        except BaseException:
            lane.close()
            raise
        return lane

    def _recover(self, target: str) -> None:
        info = read_info(self.path)
        created_us = info.created_us if info else None
        paths = list_segments(self.path)
        stored, remark = None, None
        if created_us is None and paths:
            # lane.json is lost; a segment's header has what matters of it.
            created_us = created_us_of(paths)
            remark = f"lane {self.path}: lane.json was missing and is made anew"
        if created_us is None:
            created_us = self._machine.now_us()
        else:
            self._remark(remark)
            stored, remark = read_cursor(self.path, created_us)
        self._remark(remark)
        wanted = LaneInfo(self.path.name, target, created_us)
        if info != wanted:
            write_info(self.path, wanted)
        self.info = wanted
        self._adopt(read_chain(self.path, created_us=created_us, boot_id=self._machine.boot_id, stored=stored), stored)

    def _adopt(self, chain: Chain, stored: Head | None) -> None:
        """Cut and delete what a crash left, find the head, and open or make the segment to append to."""
        floor = stored.offset if stored else 0
        for path in chain.unborn:
            floor = max(floor, base_of(path))
            self._remark(f"lane {self.path}: removed {path.name}, a crash came before its header")
            path.unlink()
        for text in chain.remarks:
            self._remark(text)
        for segment in chain.torn:
            self._cut(segment)
        if not chain.segments:
            if stored:
                self._remark(f"lane {self.path}: all its segments were removed, and with them what was not sent yet")
            if floor:
                floor += _SKIP_AFTER_BOOT
            self.first = self.last = self._create(max(floor, self._machine.now_us(), self.info.created_us), None)
        else:
            self.first, self.last = chain.segments[0], chain.segments[-1]
            if stored and stored.offset > self.last.end:
                self._remark(f"lane {self.path}: cursor {floor} lies behind the last message: all of them are settled")
            if floor > self.last.end or not chain.same_boot:
                skip = 0 if chain.same_boot else _SKIP_AFTER_BOOT
                self._begin_segment(max(floor, self._machine.now_us(), self.last.end + skip))
            else:
                self._descriptor = os.open(self.last.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        chain.segments = self.segments()
        self.head, remark = find_head(chain, stored)
        self._remark(remark and f"lane {self.path}: {remark}")
        self.messages, self.unsent_bytes = unsettled(chain.segments, self.head)
        self._delete_settled()

    def _cut(self, segment: Segment) -> None:
        """Cut off what a crash left after the last frame, for good: a later segment's header tells of the length."""
        descriptor = os.open(segment.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            torn = os.fstat(descriptor).st_size - segment.size
            self._remark(f"{segment.path}: cut {torn} bytes of an unfinished write after its frames")
            os.ftruncate(descriptor, segment.size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _begin_segment(self, base: int) -> None:
        """Begin a segment whose base is not the last one's end; later, if the disk is full: the lane must drain."""
        self._next_base = base
        try:
            self._roll(base)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            self._remark(f"lane {self.path}: takes no messages until there is space: {error.strerror}")

    def _remark(self, text: str | None) -> None:
        if text:
            logger.warning("{}", text)

    # -- state --

    @property
    def next_offset(self) -> int:
        """Offset that the next message gets."""
        return self.last.end

    @property
    def full(self) -> bool:
        """Whether the last append was refused for want of space, and none has come back since."""
        return self._refused_bytes > 0

    @property
    def oldest_us(self) -> int | None:
        """When the oldest message that is not settled was accepted, microseconds since 1970; `None` without one.

        Raises:
            LaneError: it cannot be read.
        """
        if not self.messages:
            return None
        if self._head_time is None or self._head_time[0] != self.head:
            self._head_time = (self.head, accepted_us_at(self.segments(), self.head))
        return self._head_time[1]

    def segments(self) -> list[Segment]:
        """Return the segment files, oldest first."""
        found = [self.first]
        while (following := found[-1].next) is not None:
            found.append(following)
        return found

    def retarget(self, target: str) -> None:
        """Note another RocketMQ topic in `lane.json`.

        Raises:
            LaneError: it cannot be written.
        """
        if target != self.info.target:
            info = replace(self.info, target=target)
            write_info(self.path, info)
            self.info = info

    # -- writing --

    def append(self, frame: bytes) -> int:
        """Write one whole frame and return its offset. The caller made it with `mq2mqtt.spool.frame`.

        Raises:
            LaneFullError: no space now; nothing was written.
            FrameTooLargeError: longer than `max_bytes`: it never fits.
            LaneError: the lane cannot be written any more.
        """
        size = len(frame)
        last = self.last
        if self.unsent_bytes + size > self.max_bytes or last.size + size > self._segment_bytes or self._descriptor < 0:
            self._make_room(size)
            last = self.last
        try:
            written = os.write(self._descriptor, frame)
        except OSError as error:
            self._refuse(error, size)
        if written != size:
            self._cut_tail()
            self._refused_bytes = size
            raise LaneFullError(f"lane {self.path}: the disk is full")
        offset = last.end
        last.end = offset + 1
        last.size += size
        self.messages += 1
        self.unsent_bytes += size
        self._refused_bytes = 0
        if self._wake_reader is not None:
            self._wake_reader()
        return offset

    def durable(self) -> "asyncio.Future[None] | None":
        """Return a future that ends when all that was appended so far survives a loss of power.

        `None` if it does already, and always with `durability: process`. Each call's future is its own: cancelling
        it touches no other. It fails with `LaneError` when the disk cannot do it, and so does every later append.
        """
        return None if self._commit is None else self._commit.wait(self._descriptor, upto=self.last.end)

    def _make_room(self, size: int) -> None:
        """Do what a plain append cannot: refuse, mend the tail, begin the next segment."""
        if self._failure is not None:
            raise self._failure
        if size > min(self.max_bytes, codec.MAX_FRAME_BYTES):
            raise FrameTooLargeError(
                f"lane {self.path}: a message of {size} bytes is longer than the lane: raise spool.max_bytes"
            )
        if self.unsent_bytes + size > self.max_bytes:
            self._refused_bytes = size
            raise LaneFullError(
                f"lane {self.path}: {self.unsent_bytes} bytes are unsent, max_bytes is {self.max_bytes}"
            )
        try:
            if self._next_base is not None:
                self._roll(self._next_base)
            elif self._descriptor < 0:
                self._reopen()
            # A frame longer than a segment gets one of its own.
            if self.last.size + size > self._segment_bytes and self.last.end > self.last.base:
                self._roll(self.last.end)
        except OSError as error:
            self._refuse(error, size)

    def _refuse(self, error: OSError, size: int) -> NoReturn:
        text = f"cannot write lane {self.path}: {error.strerror}"
        if error.errno in NO_SPACE:
            self._refused_bytes = size
            raise LaneFullError(text) from error
        raise LaneError(text) from error

    def _cut_tail(self) -> None:
        """Take an unfinished write back, so that the next frame follows a whole one."""
        try:
            os.ftruncate(self._descriptor, self.last.size)
        except OSError:
            # Nothing may be appended behind it: the next append reopens the file and tries again.
            self._let_go(self._descriptor)
            self._descriptor = -1

    def _reopen(self) -> None:
        descriptor = os.open(self.last.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, self.last.size)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _roll(self, base: int) -> None:
        """Begin the next segment; nothing has changed if that fails with an `OSError`."""
        previous, descriptor = self.last, self._descriptor
        segment = self._create(base, previous)
        previous.next = segment
        self.last = segment
        self._next_base = None
        self._let_go(descriptor)

    def _let_go(self, descriptor: int) -> None:
        """Close a file that is appended to no more, in `power` mode after its fdatasync."""
        if self._commit is not None:
            self._commit.file_finished(descriptor)
        elif descriptor >= 0:
            os.close(descriptor)

    def _create(self, base: int, previous: Segment | None) -> Segment:
        """Make the file of the next segment, with its header, and append to it from now on. Raises `OSError`."""
        path = self.path / segment_name(base)
        header = SegmentHeader(
            base,
            self.info.created_us,
            previous.base if previous else 0,
            previous.end if previous else 0,
            previous.size if previous else 0,
            self._machine.boot_id,
        ).pack()
        descriptor = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        try:
            if os.write(descriptor, header) != len(header):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))  # noqa: TRY301 - one way out
            if previous is None or base != previous.end:
                # Were it lost, the same offsets would be chosen again where the clock restarts in the past.
                os.fsync(descriptor)
                sync_directory(self.path)
        except OSError:
            _discard(descriptor, path)
            raise
        self._descriptor = descriptor
        return Segment(path, base, base, HEADER_BYTES)

    def _fail(self, failure: LaneError) -> None:
        """Take nothing more: after a failed fdatasync nobody knows what is on the disk."""
        self._failure = failure
        self._close_file()

    # -- for the reader --

    def watch(self, wake: Callable[[], None] | None) -> None:
        """Have `wake` called at every append from now on."""
        self._wake_reader = wake

    def look(self) -> bool:
        """Look for what was appended: never anything that `last` does not say already."""
        return False

    def unfinished(self, segment: Segment, position: int, *, problem: str | None) -> bool:  # noqa: ARG002 - as `look`
        """Whether what stands at `position` may become a whole frame: only whole ones are told."""
        return False

    def is_released(self) -> bool:
        """Whether no other process writes it: this one has the lock."""
        return True

    def settled(self, head: Head, *, messages: int, size: int) -> None:
        """Note that `messages` more are settled, and that the head moved over `size` bytes of frames to `head`."""
        self.messages -= messages
        self.unsent_bytes -= size
        self.head = head
        self._delete_settled()
        if self._refused_bytes and self.unsent_bytes + self._refused_bytes <= self.max_bytes:
            self._refused_bytes = 0
            if self.on_space is not None:
                self.on_space()

    def _delete_settled(self) -> None:
        """Delete the segments before the head's."""
        while self.first.base < self.head.segment and self.first.next is not None:
            try:
                self.first.path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("lane {}: cannot delete {}: {}", self.path, self.first.path.name, error.strerror)
                return
            self.first = self.first.next

    # -- the end --

    def close(self) -> None:
        """Let the files and the lock go, in `power` mode after a last fdatasync. Idempotent."""
        self._failure = self._failure or LaneError(f"lane {self.path} is closed")
        if self._commit is not None:
            self._commit.close(self._descriptor)
        self._close_file()
        self._lock.release()

    def _close_file(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _discard(descriptor: int, path: Path) -> None:
    os.close(descriptor)
    with contextlib.suppress(OSError):
        path.unlink()
