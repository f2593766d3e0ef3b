"""What a lane finds in its directory: which files, which frames, what a crash left at the end.

Reads only; `Lane.open` cuts and deletes. `docs/spool.md` ("Opening a lane") gives the rules and their reasons.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
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


@dataclass(slots=True)
class Chain:
    """The segments of a lane, oldest first and linked, and what a crash left behind."""

    segments: list[Segment]
    same_boot: bool = False
    """Whether the last segment was made since the machine started: it can have lost nothing but an unfinished write."""
    torn_bytes: int = 0
    """Bytes after the last sound frame, to be cut off."""
    before: int = 0
    """Offset after the last message of the segment before the first one: what is gone ends there."""
    unborn: Path | None = None
    """A segment file whose header was never written, to be deleted."""


class _Tail(NamedTuple):
    offset: int
    """Offset after the last sound frame."""
    position: int
    """Byte after it."""
    size: int
    """Bytes of the file."""


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

    Frames of earlier segments are checked when they are read, and so are those that the cursor has passed never.

    Raises:
        LaneCorruptError: damage that no crash explains; the text names the file, the byte and what to do.
        LaneError: a file cannot be read.
    """
    paths = list_segments(lane)
    chain = Chain([])
    if paths and _is_unborn(paths[-1]):
        chain.unborn = paths.pop()
    headers = [_read_header(path) for path in paths]
    chain.segments = [Segment(path, header.base, header.base, 0) for path, header in zip(paths, headers, strict=True)]
    for segment, header in zip(chain.segments, headers, strict=True):
        if header.created_us != (headers[0].created_us if created_us is None else created_us):
            raise LaneCorruptError(f"{segment.path}: byte 24: a segment of another lane; move it away")
    for (segment, following), header in zip(pairwise(chain.segments), headers[1:], strict=True):
        _link(segment, following, header)
    if chain.segments:
        chain.before = headers[0].previous_end
        last = chain.segments[-1]
        chain.same_boot = headers[-1].boot_id == boot_id != _NO_BOOT
        tail = _walk_last(last, stored, same_boot=chain.same_boot)
        last.end, last.size, chain.torn_bytes = tail.offset, tail.position, tail.size - tail.position
    return chain


def _is_unborn(path: Path) -> bool:
    """Whether the last segment has no header because a crash came first: too short, or zeros to the end."""
    with map_errors(path, "read"), path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        if len(head) < HEADER_BYTES:
            return True
        return not any(head) and not any(iter(lambda: file.read(1 << 20).strip(b"\0"), b""))


def _read_header(path: Path) -> SegmentHeader:
    with map_errors(path, "read"), path.open("rb") as file:
        return SegmentHeader.unpack(file.read(HEADER_BYTES), path)


def _link(segment: Segment, following: Segment, header: SegmentHeader) -> None:
    if header.previous_base != segment.base:
        raise LaneCorruptError(
            f"{segment.path.with_name(segment_name(header.previous_base))}: missing, between {segment.path.name} and"
            f" {following.path.name}; put it back, or move the segments before {following.path.name} away too"
            " to give their messages up"
        )
    with map_errors(segment.path, "read"):
        size = segment.path.stat().st_size
    if size != header.previous_bytes:
        raise LaneCorruptError(
            f"{segment.path}: byte {min(size, header.previous_bytes)}: {size} bytes, but {header.previous_bytes} were"
            " written; restore it, or move it and the segments before it away to give their messages up"
        )
    segment.end, segment.size, segment.next = header.previous_end, size, following


def _walk_last(segment: Segment, stored: Head | None, *, same_boot: bool) -> _Tail:
    """Count the frames of the last segment, and judge what follows them."""
    with map_errors(segment.path, "read"):
        data = segment.path.read_bytes()
    start, offset = HEADER_BYTES, segment.base
    if stored is not None and stored.segment == segment.base and HEADER_BYTES <= stored.position <= len(data):
        start, offset = stored.position, stored.offset
    count, end = codec.count_frames(data, start)
    if not count and end < len(data) and start != HEADER_BYTES:
        # Nothing sound where the cursor points: trust the file rather than the hint.
        offset = segment.base
        count, end = codec.count_frames(data, HEADER_BYTES)
    if end < len(data):
        _judge_tail(segment.path, data, end, same_boot=same_boot)
    return _Tail(offset + count, end, len(data))


def _judge_tail(path: Path, data: bytes, position: int, *, same_boot: bool) -> None:
    """Return if what begins at `position` may be what a crash leaves; else raise.

    `kill -9` and a full disk leave a prefix of one frame. A loss of power leaves anything in blocks that were never
    written: zeros, or old content; but then nothing sound follows.
    """
    problem = codec.problem_at(data, position)
    if problem is None:
        # A prefix of a frame, by its header. A device chooses payloads, so frames found inside prove nothing; but if
        # the CRC fits what stands before one of them, the size field is damaged and a whole frame is meant.
        if position + codec.HEADER_BYTES <= len(data) and _size_is_damaged(data, position):
            raise _damage(path, position, "damaged frame size")
        return
    if same_boot:
        raise _damage(path, position, problem)
    following = codec.find_frame(data, position + 1)
    if following is not None:
        raise _damage(path, position, f"{problem}, with a sound frame at byte {following}")


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
