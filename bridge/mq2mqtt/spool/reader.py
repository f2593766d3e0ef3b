"""The reading end of a lane: sequential reading ahead of the cursor, settling in any order, waiting without polling.

Where the writer is in the same process, `Lane` says how far each file may be read, and nothing half-written is ever
seen. With a writer in another one, `FollowedLane` finds that out as the reader comes to the end of what is known.
"""

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from loguru import logger

from mq2mqtt.errors import LaneCorruptError, LaneError
from mq2mqtt.spool import frame as codec
from mq2mqtt.spool.cursor import CursorFile, Head
from mq2mqtt.spool.files import FileLock, map_errors
from mq2mqtt.spool.frame import Frame
from mq2mqtt.spool.info import LaneInfo
from mq2mqtt.spool.recovery import READER_LOCK
from mq2mqtt.spool.segment import HEADER_BYTES, Segment

__all__ = ["MAX_AHEAD", "Entry", "LaneReader", "ReadableLane"]

MAX_AHEAD: Final = 10_000
"""Messages that are read and not settled, at most (design section 2)."""

_CHUNK_BYTES = 256 * 1024


class Entry(NamedTuple):
    """A message of a lane."""

    offset: int
    frame: Frame


class ReadableLane(Protocol):
    """What a reader needs of its lane, whoever writes it."""

    @property
    def path(self) -> Path:
        """Its directory."""

    @property
    def info(self) -> LaneInfo:
        """What `lane.json` says."""

    @property
    def head(self) -> Head:
        """Where the oldest unsettled message is, or the next one will be."""

    def segments(self) -> list[Segment]:
        """Return the segment files, oldest first. They grow, and are linked to new ones, while they are read."""

    def look(self) -> bool:
        """Look for more behind the last segment's end as it is known; return whether there is any.

        Raises:
            LaneError: a file is damaged or cannot be read.
        """

    def unfinished(self, segment: Segment, position: int, *, problem: str | None) -> bool:
        """Whether what stands at `position`, no whole frame, may become one; if so, it is hidden until it changed.

        `problem` is what is wrong with it besides being cut off.
        """

    def watch(self, wake: Callable[[], None] | None) -> None:
        """Have `wake` called from now on when there is more to read than was found at the last look."""

    def settled(self, head: Head, *, messages: int, size: int) -> None:
        """Note that `messages` more are settled, and that the head moved over `size` bytes of frames to `head`."""


class _Run(NamedTuple):
    """Messages that were read at once: of one segment, with consecutive offsets."""

    segment: Segment
    first: int
    past: int
    """Offset after the last one."""
    ends: list[int]
    """Where each one ends, counted from `origin`."""
    origin: int
    """Byte in the file."""


class LaneReader:
    """Reads a lane from its cursor on. A lane has one reader."""

    def __init__(self, lane: ReadableLane) -> None:
        """Lock the reading end and start at the cursor.

        Raises:
            LaneLockedError: it has a reader already.
            LaneError: a file cannot be opened.
        """
        self._lane = lane
        self._lock = FileLock(lane.path / READER_LOCK, role="reader")
        try:
            self._cursor_file = CursorFile(lane.path, lane.info.created_us)
        except LaneError:
            self._lock.release()
            raise
        self._cursor_is_stored = True
        self._segment = next(found for found in lane.segments() if found.base == lane.head.segment)
        self._byte = lane.head.position
        self._next = lane.head.offset
        self._descriptor = -1
        self._buffer = b""
        self._buffer_at = 0
        # Bounded: each run holds at least one of the MAX_AHEAD messages.
        self._runs: deque[_Run] = deque(maxlen=MAX_AHEAD)
        self._settled: set[int] = set()
        self._ahead = 0
        self._news = asyncio.Event()
        self._closed = False

    @property
    def cursor(self) -> int:
        """Everything before this offset is settled. It skips where offsets do."""
        return self._lane.head.offset

    @property
    def position(self) -> int:
        """Offset after the last message that was read. Offsets may skip: this is not `cursor + ahead`."""
        return self._next

    @property
    def ahead(self) -> int:
        """Messages read at or after the cursor, settled or not; at most `MAX_AHEAD`."""
        return self._ahead

    # -- reading --

    def read(self, *, max_messages: int, max_bytes: int = codec.MAX_FRAME_BYTES) -> list[Entry]:
        """Return the next messages, in order; none when all is read or `MAX_AHEAD` are unsettled.

        Stops before `max_bytes` of frames would be exceeded, but returns at least one message.

        Raises:
            LaneCorruptError: the next frame is damaged; the text names the file, the byte and what to do.
            LaneError: the file cannot be read.
        """
        entries: list[Entry] = []
        wanted = min(max_messages, MAX_AHEAD - self._ahead)
        make = tuple.__new__
        while wanted > 0 and max_bytes > 0:
            try:
                if not self._advance():
                    break
                decoded = self._decode(wanted, max_bytes, required=not entries)
            except LaneError:
                if entries:
                    # What is sound goes first; the next call meets the damage again.
                    break
                raise
            if decoded is None:
                continue
            frames, size = decoded
            if not frames:
                break
            first = self._runs[-1].first
            entries.extend([make(Entry, pair) for pair in enumerate(frames, first)])
            wanted -= len(frames)
            max_bytes -= size
        return entries

    def _advance(self) -> bool:
        """Go to the next segment at the end of one; return whether there is a byte to read."""
        while self._byte >= self._segment.size:
            following = self._segment.next
            if following is None:
                self._buffer = b""
                if self._lane.look():
                    continue
                return False
            if self._next != self._segment.end:
                raise LaneCorruptError(
                    f"{self._segment.path}: byte {self._byte}: {self._next - self._segment.base} messages,"
                    f" but {self._segment.end - self._segment.base} were written; restore the file"
                )
            self._close_file()
            self._segment, self._byte, self._next = following, HEADER_BYTES, following.base
        return True

    def _decode(self, wanted: int, max_bytes: int, *, required: bool) -> tuple[list[Frame], int] | None:
        """Decode what the buffer holds, refilled if that is nothing whole; a frame over `max_bytes` if `required`.

        Returns `None` when the writer is still at the next frame.
        """
        for fill in (False, True):
            if fill:
                self._fill()
            start = self._byte - self._buffer_at
            if not 0 <= start < len(self._buffer):
                continue
            frames, ends = codec.decode_frames(self._buffer, start, max_frames=wanted, max_bytes=max_bytes)
            if frames and not required and ends[0] - start > max_bytes:
                return [], 0
            if frames:
                past = self._next + len(frames)
                self._runs.append(_Run(self._segment, self._next, past, ends, self._buffer_at))
                self._ahead += len(frames)
                self._next = past
                self._byte = self._buffer_at + ends[-1]
                return frames, ends[-1] - start
        problem = codec.problem_at(self._buffer, 0)
        if self._lane.unfinished(self._segment, self._byte, problem=problem):
            return None
        raise self._damage(problem or "frame cut off")

    def _damage(self, problem: str) -> LaneCorruptError:
        path, byte = self._segment.path, self._byte
        stop = "stop the bridge (a Mosquitto beside it too)"
        way_out = (
            # It is being written: what is accepted from now on would go into a file that was moved away.
            f"{stop} and cut it there to give up what follows: truncate -s {byte} {path}"
            if self._segment.next is None
            else f"when everything before it is sent, {stop} and move it away to give the rest of it up"
        )
        return LaneCorruptError(f"{path}: byte {byte}: {problem}; restore the file, or {way_out}")

    def _fill(self) -> None:
        """Read on from the next frame: a chunk, or the whole frame if that is longer."""
        with map_errors(self._segment.path, "read"):
            if self._descriptor < 0:
                self._descriptor = os.open(self._segment.path, os.O_RDONLY | os.O_CLOEXEC)
            available = self._segment.size - self._byte
            data = os.pread(self._descriptor, min(_CHUNK_BYTES, available), self._byte)
            size = codec.size_of(data, 0)
            if size is not None and len(data) < size <= available:
                data = os.pread(self._descriptor, size, self._byte)
        self._buffer, self._buffer_at = data, self._byte

    async def wait(self) -> None:
        """Return when `read` has something to return; at once if it has, or if the reader is closed."""
        while not self._closed and not (self._ahead < MAX_AHEAD and self._advance()):
            self._news.clear()
            self._lane.watch(self._news.set)
            try:
                await self._news.wait()
            finally:
                self._lane.watch(None)

    # -- settling --

    def settle(self, offsets: Iterable[int]) -> None:
        """Say that nothing more will be done about these messages: each once, in any order.

        The cursor moves to the first unsettled one and is stored; segments behind it are deleted. After a crash,
        what lies at or after the stored cursor is read again.

        Raises:
            ValueError: an offset is not one that was read and is unsettled.
        """
        settled = self._settled
        cursor, position = self.cursor, self._next
        count = 0
        for offset in offsets:
            if offset in settled or not cursor <= offset < position:
                raise ValueError(f"offset {offset} was not read, or is settled already")
            settled.add(offset)
            count += 1
        head, freed = self._move()
        if head != self._lane.head:
            self._store(head)
            self._news.set()
        self._lane.settled(head, messages=count, size=freed)

    def settle_to(self, offset: int) -> None:
        """Settle every message before `offset` that was read and is unsettled.

        Raises:
            ValueError: `offset` lies after the last message that was read.
        """
        if offset > self._next:
            raise ValueError(f"offset {offset} was not read yet")
        cursor, settled = self.cursor, self._settled
        self.settle(
            [
                number
                for run in self._runs
                for number in range(max(run.first, cursor), min(run.past, offset))
                if number not in settled
            ]
        )

    def _move(self) -> tuple[Head, int]:
        """Take the settled messages at the cursor out; return where the head is now, and the bytes of frames passed."""
        runs, settled = self._runs, self._settled
        head, freed = self._lane.head, 0
        while runs:
            run = runs[0]
            start = cursor = max(head.offset, run.first)
            while cursor < run.past and cursor in settled:
                settled.remove(cursor)
                cursor += 1
            if cursor == start:
                break
            position = run.origin + run.ends[cursor - run.first - 1]
            before = head.position if head.segment == run.segment.base else HEADER_BYTES
            freed += position - before
            self._ahead -= cursor - start
            head = Head(cursor, run.segment.base, position)
            if cursor < run.past:
                break
            runs.popleft()
            following = run.segment.next
            if cursor == run.segment.end and following is not None:
                head = Head(following.base, following.base, HEADER_BYTES)
        return head, freed

    def _store(self, head: Head) -> None:
        try:
            self._cursor_file.store(head)
        except LaneError as error:
            # Only costs duplicates after a crash, and stopping would not mend the disk.
            if self._cursor_is_stored:
                logger.warning("{}; messages sent from now on will be sent again after a restart", error)
            self._cursor_is_stored = False
        else:
            self._cursor_is_stored = True

    # -- the end --

    def close(self) -> None:
        """Let the files and the lock go, and whoever waits. Idempotent."""
        self._closed = True
        self._news.set()
        self._close_file()
        self._cursor_file.close()
        self._lock.release()

    def _close_file(self) -> None:
        self._buffer = b""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
