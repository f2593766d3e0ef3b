"""The reading side's view of a lane that another process writes (the Mosquitto hook).

The writer tells nothing: what there is to read is in the files. While the reader is busy it looks at their lengths;
only at the end of all of them does it ask the kernel for news.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

from loguru import logger

from mq2mqtt.errors import LaneCorruptError, LaneError, LaneLockedError
from mq2mqtt.spool import frame as codec
from mq2mqtt.spool.cursor import Head, read_cursor
from mq2mqtt.spool.files import FileLock, map_errors
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
from mq2mqtt.spool.segment import HEADER_BYTES, SUFFIX, Segment, SegmentHeader
from mq2mqtt.spool.watching import Watcher

__all__ = ["FollowedLane"]

_LOOK_SECONDS: Final = 1.0
"""How often a lane is looked at without news."""

_LINGER_SECONDS: Final = 0.002
"""How long news that follows others closely waits for more: being woken costs as much as dozens of messages."""

_DAMAGE_SECONDS: Final = 1.0
_COUNT_BYTES = 1 << 20


class FollowedLane:
    """A lane whose writer is another process: what `LaneReader` needs of it, and the gauges.

    It deletes settled segments and keeps `lane.json`; the frames are the writer's.
    """

    info: LaneInfo
    first: Segment
    last: Segment
    head: Head
    """Where the oldest unsettled message is, or the next one will be."""

    def __init__(self, path: Path, *, max_bytes: int, watcher: Watcher) -> None:
        """Use `FollowedLane.open`."""
        self.path = path
        self.max_bytes = max_bytes
        self._watcher = watcher
        self._wake: Callable[[], None] | None = None
        self._armed = False
        self._names_changed = True
        self._touched = False
        self._looked_at = self._reread_at = self._woken_at = 0.0
        self._lingering: asyncio.TimerHandle | None = None
        # Length of the last segment's file when it was last looked at; its `size` may hide an unfinished frame.
        self._file_size = 0
        # Up to where the last segment's frames are counted: its `end`.
        self._counted = HEADER_BYTES
        self._taken = self._settled = 0
        self._head_time: tuple[Head, int] | None = None
        self._suspect: tuple[Path, int, int, float] | None = None
        self._writer_lock: FileLock | None = None
        self._watch: int | None = None

    @classmethod
    def open(
        cls, path: Path, *, max_bytes: int, target: str, watcher: Watcher, machine: Machine | None = None
    ) -> Self | None:
        """Return the lane as it is now; `None` while its writer has not begun it.

        Raises:
            LaneCorruptError: damage that no crash explains; the text names the file, the byte and what to do.
            LaneError: a file cannot be read, or `lane.json` not be written.
        """
        if not path.is_dir():
            return None
        info = read_info(path)
        created_us = info.created_us if info else created_us_of(list_segments(path))
        if created_us is None:
            return None
        stored, remark = read_cursor(path, created_us)
        boot_id = (machine or Machine()).boot_id
        chain = read_chain(path, created_us=created_us, boot_id=boot_id, stored=stored)
        if not chain.segments:
            return None
        lane = cls(path, max_bytes=max_bytes, watcher=watcher)
        wanted = LaneInfo(path.name, target, created_us)
        if info != wanted:
            write_info(path, wanted)
        lane.info = wanted
        if remark:
            logger.warning("{}", remark)
        lane._adopt(chain, stored)
        return lane

    def _adopt(self, chain: Chain, stored: Head | None) -> None:
        self.first, self.last = chain.segments[0], chain.segments[-1]
        self._file_size = self._counted = self.last.size
        self.head, remark = find_head(chain, stored)
        if remark:
            logger.warning("lane {}: {}", self.path, remark)
        self._taken, _ = unsettled(chain.segments, self.head)
        self._delete_settled()

    # -- state --

    @property
    def messages(self) -> int:
        """Messages that are not settled."""
        return self.counts()[1]

    def counts(self) -> tuple[int, int]:
        """Return `taken` and `messages` of one moment: the writer may add some between two questions."""
        taken = self.taken
        return taken, taken - self._settled

    @property
    def unsent_bytes(self) -> int:
        """Bytes of frames from the head on."""
        self._look_for_gauges()
        *earlier, last = self.segments()
        return unsettled([*earlier, replace(last, size=self._counted)], self.head)[1]

    @property
    def taken(self) -> int:
        """Messages that were unsettled when the lane was opened, and those that came since."""
        self._look_for_gauges()
        return self._taken

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

    def _look_for_gauges(self) -> None:
        # What cannot be read or is damaged is for the reader to meet, which can say so.
        with contextlib.suppress(LaneError):
            self._count_all()

    def _count_all(self) -> None:
        self._look_at_files(names=False)
        self._find_segments()
        self._count()

    def _count(self) -> None:
        """Count the frames of the last segment that are not counted yet."""
        last = self.last
        if self.head.segment == last.base and self.head.position > self._counted:
            self._count_to(self.head.offset, self.head.position)
        if self._counted >= self._file_size:
            return
        with map_errors(last.path, "read"), last.path.open("rb") as file:
            step = _COUNT_BYTES
            while data := os.pread(file.fileno(), step, self._counted):
                count, size = codec.count_frames(data, 0)
                self._count_to(last.end + count, self._counted + size)
                wanted = codec.size_of(data, size) or 0
                # What is left may be the beginning of a frame longer than a step.
                if not count and not len(data) < wanted <= self._file_size - self._counted:
                    break
                step = max(_COUNT_BYTES, min(wanted, codec.MAX_FRAME_BYTES))

    def _count_to(self, end: int, position: int) -> None:
        """Note that the frames before `end` are those before `position` in the last segment."""
        self._taken += end - self.last.end
        self.last.end, self._counted = end, position

    def retarget(self, target: str) -> None:
        """Note another RocketMQ topic in `lane.json`.

        Raises:
            LaneError: it cannot be written.
        """
        if target != self.info.target:
            info = replace(self.info, target=target)
            write_info(self.path, info)
            self.info = info

    # -- for the reader --

    def watch(self, wake: Callable[[], None] | None) -> None:
        """Have `wake` called when there is more to read after `look` found nothing."""
        self._wake = wake
        if wake is None:
            return
        try:
            news = self._is_news_after_arming()
        except LaneError:
            # For the reader to meet, which can say so.
            news = True
        if news:
            wake()

    def look(self) -> bool:
        """Look for what the writer added; return whether there is any. If not, `wake` will be called for it."""
        if self._look_at_files(names=self._names_changed or self._watch is None or self._is_due()):
            return True
        return self._wake is not None and self._is_news_after_arming()

    def unfinished(self, segment: Segment, position: int, *, problem: str | None) -> bool:
        """Whether what stands at `position`, no whole frame, may become one; if so, hide it until the file changes.

        It may as long as the writer can be at it. A problem that stays while frames follow, or in a segment that is
        finished, is damage.
        """
        if segment.next is not None:
            return False
        if problem is None:
            self._suspect = None
        elif self._suspect is None or self._suspect[:2] != (segment.path, position):
            self._suspect = (segment.path, position, self._file_size, time.monotonic())
        elif self._file_size > self._suspect[2] and time.monotonic() > self._suspect[3] + _DAMAGE_SECONDS:
            return False
        segment.size = position
        return True

    def settled(self, head: Head, *, messages: int, size: int) -> None:  # noqa: ARG002 - `Lane` counts bytes
        """Note that `messages` more are settled, and that the head moved to `head`."""
        self._settled += messages
        self.head = head
        self._delete_settled()

    def _is_due(self) -> bool:
        return time.monotonic() > self._looked_at + _LOOK_SECONDS

    def _look_at_files(self, *, names: bool) -> bool:
        """Look at the last file's length, and for new files if `names`; return whether there is more to read."""
        last = self.last
        hidden_too_long = last.size != self._file_size and time.monotonic() > self._reread_at + _LOOK_SECONDS
        with map_errors(last.path, "read"):
            size = last.path.stat().st_size
        if size != self._file_size or self._touched or hidden_too_long:
            self._touched, self._reread_at = False, time.monotonic()
            grown = size > last.size
            last.size = self._file_size = size
            if grown:
                return True
        return names and self._find_segments()

    def _find_segments(self) -> bool:
        self._names_changed, self._looked_at = False, time.monotonic()
        before = self.last
        paths = list_segments(self.path)
        for path in paths:
            if base_of(path) <= self.last.base:
                continue
            header = self._header_of(path, is_last=path == paths[-1])
            if header is None:
                # The writer is at it.
                self._names_changed = True
                if self._wake is not None:
                    self._watcher.once(path, self._news)
                break
            self._append(path, header)
        return self.last is not before

    def _header_of(self, path: Path, *, is_last: bool) -> SegmentHeader | None:
        """Return the header; `None` while the last one has no frames: its writer may yet take it back."""
        with map_errors(path, "read"):
            try:
                with path.open("rb") as file:
                    data = file.read(HEADER_BYTES + 1)
            except FileNotFoundError:
                return None
        if len(data) < HEADER_BYTES + is_last:
            return None
        data = data[:HEADER_BYTES]
        header = SegmentHeader.unpack(data, path)
        if header.created_us != self.info.created_us:
            raise LaneCorruptError(f"{path}: byte 24: a segment of another lane; move it away")
        if header.previous_base != self.last.base:
            raise LaneCorruptError(f"{path}: byte 32: does not follow {self.last.path.name}; put back what is missing")
        return header

    def _append(self, path: Path, header: SegmentHeader) -> None:
        self._count_to(header.previous_end, header.previous_bytes)
        self.last.size = header.previous_bytes
        self.last.next = Segment(path, header.base, header.base, HEADER_BYTES)
        self.last = self.last.next
        self._file_size = self._counted = HEADER_BYTES
        self._armed = False
        self._look_at_files(names=False)

    def _is_news_after_arming(self) -> bool:
        """Ask the kernel for news; return whether there was some before it was asked."""
        if self._watch is None:
            self._watch = self._watcher.directory(self.path, self._named)
            self._names_changed = True
        if not self._armed and self._lingering is None:
            self._armed = True
            self._watcher.once(self.last.path, self._modified)
            return self._look_at_files(names=self._names_changed)
        return False

    def _modified(self) -> None:
        self._armed = False
        self._touched = True
        if time.monotonic() > self._woken_at + _LINGER_SECONDS / 2:
            self._news()
        elif self._lingering is None:
            self._lingering = asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._news)

    def _named(self, name: str) -> None:
        if not name or name.endswith(SUFFIX):
            self._names_changed = True
            self._news()

    def _news(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        self._woken_at = time.monotonic()
        if self._wake is not None:
            self._wake()

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

    def is_released(self) -> bool:
        """Whether the writer has let go of the lane; from then on it cannot take it again until `close`.

        What it added before is in `messages` then.

        Raises:
            LaneError: the lock cannot be used, or a file not be read.
        """
        if self._writer_lock is None:
            try:
                self._writer_lock = FileLock(self.path / WRITER_LOCK, role="writer")
            except LaneLockedError:
                return False
        self._count_all()
        return True

    def close(self) -> None:
        """Let files and locks go. Idempotent."""
        self._wake = None
        if self._lingering is not None:
            self._lingering.cancel()
        self._watcher.forget(self._watch)
        self._watch = None
        if self._writer_lock is not None:
            self._writer_lock.release()
