"""What a lane finds in its directory: which files, which frames, what a crash left at the end.

Reads only; `Lane.open` cuts and deletes. `docs/spool.md` ("Opening a lane") gives the rules and their reasons.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

from mq2mqtt.errors import LaneCorruptError
from mq2mqtt.spool import frame as codec
from mq2mqtt.spool.cursor import CURSOR_NAME, Head
from mq2mqtt.spool.files import map_errors
from mq2mqtt.spool.info import INFO_NAME
from mq2mqtt.spool.segment import HEADER_BYTES, SUFFIX, Segment, SegmentHeader, segment_name

__all__ = [
    "PARKED_NAME",
    "READER_LOCK",
    "WRITER_LOCK",
    "Chain",
    "accepted_us_at",
    "base_of",
    "created_us_of",
    "find_head",
    "list_segments",
    "read_chain",
    "unsettled",
]

WRITER_LOCK: Final = "writer.lock"
READER_LOCK: Final = "reader.lock"
PARKED_NAME: Final = "parked"
_OTHERS = frozenset((INFO_NAME, CURSOR_NAME, WRITER_LOCK, READER_LOCK, PARKED_NAME))
_NO_BOOT = bytes(16)
# What a disk writes at once or not at all.
_SECTOR_BYTES = 512
_UNWRITTEN = bytes(_SECTOR_BYTES)


@dataclass(slots=True)
class Chain:
    """The segments of a lane, oldest first and linked, and what a crash left behind."""

    segments: list[Segment] = field(default_factory=list)
    same_boot: bool = False
    """Whether the last segment was made since the machine started: it can have lost nothing but an unfinished write."""
    torn: list[Segment] = field(default_factory=list)
    """Those whose files go on behind the last sound frame, to be cut to `size`."""
    before: int = 0
    """Offset after the last message of the segment before the first one: what is gone ends there."""
    unborn: list[Path] = field(default_factory=list)
    """Segment files behind the last one whose headers were never written, to be deleted."""
    remarks: list[str] = field(default_factory=list)
    """What a loss of power took from segments before the last one."""


class _Tail(NamedTuple):
    offset: int
    """Offset after the last sound frame."""
    position: int
    """Byte after it."""
    torn: bool
    """Whether the file goes on there."""
    problem: str | None = None
    """What is wrong there, unless it is a prefix of a frame."""
    lost: bool = False
    """Whether a loss of power explains the problem."""


def list_segments(lane: Path) -> list[Path]:
    """Return the segment files, oldest first.

    Raises:
        LaneCorruptError: a file that no lane writes.
        LaneError: the directory cannot be read.
    """
    with map_errors(lane, "list"):
        names = sorted(path.name for path in lane.iterdir())
    found: list[Path] = []
    for name in names:
        stem = name.removesuffix(SUFFIX)
        if name != stem and stem.isdecimal() and segment_name(int(stem)) == name:
            found.append(lane / name)
        elif name not in _OTHERS and not name.endswith(".tmp"):
            raise LaneCorruptError(f"{lane / name}: no file of a lane; move it away")
    return found


def read_chain(lane: Path, *, created_us: int | None, boot_id: bytes, stored: Head | None) -> Chain:
    """Read the headers of all segments and walk through the last one; `created_us` is `None` if it is not known.

    Frames of earlier segments are checked when they are read, and so are those that the cursor has passed never. But
    what was written in a boot that has ended may have been taken by a loss of power in any order: that is looked for.

    Raises:
        LaneCorruptError: damage that no crash explains; the text names the file, the byte and what to do.
        LaneError: a file cannot be read.
    """
    chain = Chain()
    found = [(path, _read_header(path)) for path in list_segments(lane)]
    while found and found[-1][1] is None:
        chain.unborn.append(found.pop()[0])
    headers = [header for _, header in found if header is not None]
    for path, header in found:
        if header and header.created_us != (headers[0].created_us if created_us is None else created_us):
            raise LaneCorruptError(f"{path}: byte 24: a segment of another lane; move it away")
    chain.segments = [Segment(path, base_of(path), base_of(path), HEADER_BYTES) for path, _ in found]
    if not chain.segments:
        return chain
    first, last = found[0][1], chain.segments[-1]
    chain.before = first.previous_end if first else 0
    chain.same_boot = headers[-1].boot_id == boot_id != _NO_BOOT
    if chain.same_boot and chain.unborn and (len(chain.unborn) > 1 or _has_frames(chain.unborn[0])):
        raise _no_header(chain.unborn[-1])
    past = _Past(chain, boot_id=boot_id, crashed_boot=headers[-1].boot_id, stored=stored)
    for number, segment in enumerate(chain.segments[:-1]):
        segment.next = chain.segments[number + 1]
        following = [header for _, header in found[number + 1 :] if header is not None]
        past.look_at(segment, found[number][1], successor=found[number + 1][1], made_later=following[0])
    tail = _walk(last, stored)
    if tail.problem is not None and (chain.same_boot or not tail.lost):
        raise _damage(last.path, tail.position, tail.problem)
    _end_at(chain, last, tail)
    return chain


def base_of(path: Path) -> int:
    """Return the offset of the first frame of a segment file, by its name."""
    return int(path.stem)


def created_us_of(paths: Iterable[Path]) -> int | None:
    """Return the creation time of the lane that these segments are of; `None` if no header says it.

    Raises:
        LaneCorruptError, LaneError: a file is no segment, or cannot be read.
    """
    return next((header.created_us for path in paths if (header := _read_header(path)) is not None), None)


def _read_header(path: Path) -> SegmentHeader | None:
    """Return the header; `None` if it was never wholly written because a crash came first."""
    with map_errors(path, "read"), path.open("rb") as file:
        head = file.read(_SECTOR_BYTES)
    try:
        return SegmentHeader.unpack(head[:HEADER_BYTES], path)
    except LaneCorruptError:
        if any(head) and _has_frames(path):
            raise
        return None


def _has_frames(path: Path) -> bool:
    """Whether anything stands behind the header."""
    with map_errors(path, "read"), path.open("rb") as file:
        file.seek(HEADER_BYTES)
        return any(iter(lambda: file.read(1 << 20).strip(b"\0"), b""))


def _no_header(path: Path) -> LaneCorruptError:
    return LaneCorruptError(f"{path}: byte 0: no segment of a lane, or its header is lost; move the file away")


class _Past:
    """Judges the segments before the last one of a chain."""

    def __init__(self, chain: Chain, *, boot_id: bytes, crashed_boot: bytes, stored: Head | None) -> None:
        """`crashed_boot` made the last segment: what other boots had made was looked at, and cut, by its opening."""
        self._chain = chain
        self._boot_id = boot_id
        self._crashed_boot = crashed_boot
        self._stored = stored

    def look_at(
        self,
        segment: Segment,
        header: SegmentHeader | None,
        *,
        successor: SegmentHeader | None,
        made_later: SegmentHeader,
    ) -> None:
        """Find where `segment` ends; `made_later` is the next header that there is, the successor's or a later one."""
        restarted = self._boot_id == _NO_BOOT or made_later.boot_id != self._boot_id
        if successor is not None:
            _check_neighbours(segment, successor)
        if header is None:
            if not restarted:
                raise _no_header(segment.path)
            self._chain.remarks.append(f"{segment.path}: a loss of power took all of it")
            return
        if successor is None:
            self._walk(segment, None)
            return
        with map_errors(segment.path, "read"):
            size = segment.path.stat().st_size
        if size != successor.previous_bytes and not restarted:
            raise LaneCorruptError(
                f"{segment.path}: byte {min(size, successor.previous_bytes)}: {size} bytes, but"
                f" {successor.previous_bytes} were written; restore it, or move it and the segments before it away to"
                " give their messages up"
            )
        segment.end, segment.size = successor.previous_end, successor.previous_bytes
        settled = self._stored is not None and self._stored.offset >= segment.end
        if size != segment.size or (restarted and header.boot_id == self._crashed_boot and not settled):
            self._walk(segment, successor)

    def _walk(self, segment: Segment, successor: SegmentHeader | None) -> None:
        tail = _walk(segment, self._stored, size=successor.previous_bytes if successor else None)
        if tail.problem is not None and not tail.lost:
            if successor is None:
                raise _damage(segment.path, tail.position, tail.problem)
            # The reader will say so, when it comes there.
            return
        _end_at(self._chain, segment, tail)
        if successor is None:
            self._chain.remarks.append(f"{segment.path}: a loss of power took what came after it")
        elif tail.offset < successor.previous_end:
            self._chain.remarks.append(
                f"{segment.path}: a loss of power took {successor.previous_end - tail.offset} messages from its end"
            )


def _check_neighbours(segment: Segment, successor: SegmentHeader) -> None:
    if successor.previous_base != segment.base:
        missing, following = (
            segment.path.with_name(segment_name(at)) for at in (successor.previous_base, successor.base)
        )
        raise LaneCorruptError(
            f"{missing}: missing, between {segment.path.name} and {following.name}; put it back, or move the segments"
            f" before {following.name} away too to give their messages up"
        )


def _end_at(chain: Chain, segment: Segment, tail: _Tail) -> None:
    segment.end, segment.size = tail.offset, tail.position
    if tail.torn:
        chain.torn.append(segment)


def _walk(segment: Segment, stored: Head | None, *, size: int | None = None) -> _Tail:
    """Count the frames in the first `size` bytes of a segment, and judge what follows them."""
    with map_errors(segment.path, "read"):
        data = segment.path.read_bytes()
    whole = len(data)
    if size is not None:
        data = data[:size]
    start, offset = HEADER_BYTES, segment.base
    if stored is not None and stored.segment == segment.base and HEADER_BYTES <= stored.position <= len(data):
        start, offset = stored.position, stored.offset
    count, end = codec.count_frames(data, start)
    if not count and end < len(data) and start != HEADER_BYTES:
        # Nothing sound where the cursor points: trust the file rather than the hint.
        offset = segment.base
        count, end = codec.count_frames(data, HEADER_BYTES)
    problem, lost = _judge(data, end, whole=len(data) == size) if end < len(data) else (None, False)
    return _Tail(offset + count, end, end < whole, problem, lost)


def _judge(data: bytes, position: int, *, whole: bool) -> tuple[str | None, bool]:
    """Say what is wrong at `position`, and whether a loss of power explains it; `whole`: the length is known as right.

    `kill -9` and a full disk leave a prefix of one frame: nothing is wrong. A loss of power leaves anything in blocks
    that were never written: zeros, or old content. Where it is not zeros, nothing sound follows.
    """
    problem = codec.problem_at(data, position)
    if problem is None:
        # A prefix of a frame, by its header. A device chooses payloads, so frames found inside prove nothing; but if
        # the CRC fits what stands before one of them, the size field is damaged and a whole frame is meant.
        if position + codec.HEADER_BYTES <= len(data) and _size_is_damaged(data, position):
            return "damaged frame size", False
        return None, False
    if _has_unwritten_sector(data, position):
        return problem, True
    following = codec.find_frame(data, position + 1)
    if following is not None:
        return f"{problem}, with a sound frame at byte {following}", False
    return problem, not whole or data[-1] == 0


def _has_unwritten_sector(data: bytes, position: int) -> bool:
    """Whether the frame at `position` reaches into a sector of zeros; whether any follows, if its size is not known."""
    size = codec.size_of(data, position) or 0
    end = position + size if codec.PREFIX_BYTES < size <= len(data) - position else len(data)
    first = -(-position // _SECTOR_BYTES) * _SECTOR_BYTES
    sectors = (data[at : at + _SECTOR_BYTES] for at in range(first, end, _SECTOR_BYTES))
    return any(sector == _UNWRITTEN[: len(sector)] for sector in sectors)


def _damage(path: Path, position: int, problem: str) -> LaneCorruptError:
    return LaneCorruptError(
        f"{path}: byte {position}: {problem}; restore the file, or cut it there to give up what follows:"
        f" truncate -s {position} {path}"
    )


def _size_is_damaged(data: bytes, position: int) -> bool:
    expected = codec.crc_of(data, position)
    checked, crc = position + codec.PREFIX_BYTES, 0
    view = memoryview(data)
    for start in codec.possible_frames(data, position + codec.HEADER_BYTES):
        crc = crc32(view[checked:start], crc)
        checked = start
        if crc == expected and codec.frame_end(data, start) is not None:
            return True
    return crc32(view[checked:], crc) == expected


def find_head(chain: Chain, stored: Head | None) -> tuple[Head, str | None]:
    """Return where the oldest unsettled message is, and a remark if something lies between that and what was stored.

    A cursor past the last frame is the caller's to deal with: here it yields the end of the last segment.

    Raises:
        LaneCorruptError, LaneError: the segment had to be read and is damaged.
    """
    first = chain.segments[0]
    remark = None
    if stored is None or stored.offset < first.base:
        head = Head(first.base, first.base, HEADER_BYTES)
        if stored is not None and stored.offset < chain.before:
            remark = (
                f"cursor {stored.offset} lies before the oldest segment {first.path}: what was between them"
                " was settled before a loss of power, or its file was removed"
            )
    else:
        head = _find(chain.segments, stored)
    # Not to be left behind by empty segments, or at the end of a finished one.
    segment = next(found for found in chain.segments if found.base == head.segment)
    while head.offset >= segment.end and segment.next is not None:
        segment = segment.next
        head = Head(segment.base, segment.base, HEADER_BYTES)
    return head, remark


def _find(segments: list[Segment], stored: Head) -> Head:
    segment = next(found for found in reversed(segments) if found.base <= stored.offset)
    if stored.offset >= segment.end:
        return Head(segment.end, segment.base, segment.size)
    if stored.segment == segment.base and HEADER_BYTES <= stored.position < segment.size:
        return Head(stored.offset, segment.base, stored.position)
    return _seek(segment, stored.offset)


def _seek(segment: Segment, offset: int) -> Head:
    """Find the byte position of `offset` by walking through its segment."""
    with map_errors(segment.path, "read"):
        data = segment.path.read_bytes()[: segment.size]
    position = HEADER_BYTES
    for _ in range(offset - segment.base):
        end = codec.frame_end(data, position)
        if end is None:
            raise _damage(segment.path, position, codec.problem_at(data, position) or "cut off")
        position = end
    return Head(offset, segment.base, position)


def unsettled(segments: Iterable[Segment], head: Head) -> tuple[int, int]:
    """Return how many messages, and bytes of frames, lie from `head` on."""
    messages = size = 0
    for segment in segments:
        if segment.base == head.segment:
            messages += segment.end - head.offset
            size += segment.size - head.position
        elif segment.base > head.segment:
            messages += segment.end - segment.base
            size += segment.size - HEADER_BYTES
    return messages, size


def accepted_us_at(segments: Iterable[Segment], head: Head) -> int:
    """Return when the message at `head` was accepted; there is one.

    Raises:
        LaneCorruptError: the file ends before it.
        LaneError: it cannot be read.
    """
    segment, position = next(found for found in segments if found.base == head.segment), head.position
    while position >= segment.size and segment.next is not None:
        segment, position = segment.next, HEADER_BYTES
    with map_errors(segment.path, "read"), segment.path.open("rb") as file:
        file.seek(position)
        header = file.read(codec.HEADER_BYTES)
    if len(header) < codec.HEADER_BYTES:
        raise LaneCorruptError(f"{segment.path}: ends before the oldest message, at byte {position}")
    return codec.accepted_us_of(header)
