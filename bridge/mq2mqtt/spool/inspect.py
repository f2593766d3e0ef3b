"""Looking into lanes without a lock, while a bridge may be writing, reading and deleting: for the command line."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mq2mqtt.errors import LaneCorruptError, LaneError
from mq2mqtt.spool import frame as codec
from mq2mqtt.spool.cursor import Head, read_cursor
from mq2mqtt.spool.files import map_errors
from mq2mqtt.spool.info import read_info
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.parked import count_parked
from mq2mqtt.spool.reader import Entry
from mq2mqtt.spool.recovery import base_of, find_head, list_segments, read_chain, unsettled
from mq2mqtt.spool.segment import HEADER_BYTES

__all__ = ["PRESENCE_NAME", "LaneSummary", "lane_directories", "read_entries", "summarize", "summarize_all"]

PRESENCE_NAME: Final = ".presence"
"""The directory in the spool that is no lane: the journal of who is connected."""

# A running bridge begins or deletes a segment now and then, and may be stopped by its machine before it has written the
# header: seconds between two looks.
_PAUSES: Final = (0, 0, 0, 0.002, 0.01, 0.03, 0.1)
_STEP_MESSAGES: Final = 1000


@dataclass(frozen=True, slots=True)
class LaneSummary:
    """One lane at a glance. Counts are 0 where `problem` says why they are not known."""

    rule: str
    target: str
    """RocketMQ topic; empty for a directory that only holds parked messages."""
    messages: int = 0
    """Messages at or after the stored cursor."""
    bytes: int = 0
    oldest_us: int | None = None
    """When the oldest of them was accepted: microseconds since 1970."""
    parked: int = 0
    problem: str | None = None


def summarize_all(spool: Path) -> list[LaneSummary]:
    """Return a summary of each lane in `spool`, by name; none if there is no such directory.

    Raises:
        LaneError: the directory cannot be listed.
    """
    return [summarize(lane) for lane in lane_directories(spool)]


def lane_directories(spool: Path) -> list[Path]:
    """Return the directories of lanes, and of parked messages alone, by name; none if there is no spool.

    Raises:
        LaneError: the spool cannot be listed.
    """
    with map_errors(spool, "list"):
        found = spool.iterdir() if spool.is_dir() else ()
        return sorted(path for path in found if path.is_dir() and path.name != PRESENCE_NAME)


def summarize(lane: Path) -> LaneSummary:
    """Look at one lane. Never raises for what is wrong with it: that is `problem`."""
    target, parked = "", 0
    try:
        parked = count_parked(lane)
        info = read_info(lane)
        if info is None and not list_segments(lane):
            return LaneSummary(lane.name, "", parked=parked)
        target = info.target if info else ""
        messages, size, oldest = _again(lane)
    except LaneError as error:
        return LaneSummary(lane.name, target, parked=parked, problem=str(error))
    return LaneSummary(lane.name, target, messages, size, oldest, parked)


def _again(lane: Path) -> tuple[int, int, int | None]:
    for pause in _PAUSES:
        # A segment that was deleted, or got its header, between two looks. Damage is there the next time too.
        with contextlib.suppress(LaneError):
            return _measure(lane)
        time.sleep(pause)
    return _measure(lane)


def _cursor(lane: Path) -> tuple[int | None, Head | None]:
    info = read_info(lane)
    if info is None:
        return None, None
    stored, _ = read_cursor(lane, info.created_us)
    return info.created_us, stored


def _measure(lane: Path) -> tuple[int, int, int | None]:
    """Return messages, bytes and the oldest one's time."""
    created_us, stored = _cursor(lane)
    chain = read_chain(lane, created_us=created_us, boot_id=Machine().boot_id, stored=stored)
    if not chain.segments:
        return 0, 0, None
    head, _ = find_head(chain, stored)
    messages, size = unsettled(chain.segments, head)
    first = next(read_entries(lane), None) if messages else None
    return messages, size, first.frame.accepted_us if first else None


def read_entries(lane: Path) -> Iterator[Entry]:
    """Yield the messages from the stored cursor to the end as it is now.

    Raises:
        LaneCorruptError: a damaged frame, after all before it were yielded; the text names file and byte.
        LaneError: a file cannot be read.
    """
    _, stored = _cursor(lane)
    paths = list_segments(lane)
    for path in paths:
        if stored is None or int(path.stem) >= stored.segment:
            yield from _read_segment(path, stored, is_last=path == paths[-1])


def _read_segment(path: Path, stored: Head | None, *, is_last: bool) -> Iterator[Entry]:
    with map_errors(path, "read"):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
    offset, position = base_of(path), HEADER_BYTES
    if stored is not None and stored.segment == offset and HEADER_BYTES <= stored.position <= len(data):
        offset, position = stored.offset, stored.position
    while True:
        frames, ends = codec.decode_frames(data, position, max_frames=_STEP_MESSAGES)
        if not frames:
            break
        # Where the cursor points may be lost with what stood there.
        settled = max(0, stored.offset - offset) if stored is not None else 0
        yield from map(Entry, range(offset + settled, offset + len(frames)), frames[settled:])
        offset, position = offset + len(frames), ends[-1]
    problem = codec.problem_at(data, position)
    # The last one may end in a write that is under way, or that a crash cut off.
    if (problem is not None or (not is_last and position < len(data))) and not _is_end(path, position):
        raise LaneCorruptError(f"{path}: byte {position}: {problem or 'frame cut off'}")


def _is_end(path: Path, position: int) -> bool:
    """Whether a loss of power explains what comes after `position`; raises as `read_chain`."""
    created_us, stored = _cursor(path.parent)
    chain = read_chain(path.parent, created_us=created_us, boot_id=Machine().boot_id, stored=stored)
    ends = {segment.path: segment.size for segment in chain.segments}
    return position >= ends.get(path, HEADER_BYTES)
