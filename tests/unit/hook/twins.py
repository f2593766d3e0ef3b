"""A lane's directory, opened by the spool in Python and by the hook's in C: both must find the same."""

import shutil
from pathlib import Path

from mq2mqtt.errors import LaneCorruptError, LaneError, LaneFullError
from mq2mqtt.spool.frame import decode_frames
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.spool.segment import HEADER_BYTES
from tests.unit.hook.driver import Driver
from tests.unit.spool.lanes import START_US, frame_of, open_lane, segment_files

REFUSED = "refused"


def contents(lane: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in segment_files(lane)}


def twins_of(lane: Path) -> tuple[Path, Path]:
    """Return two copies of a lane, in spools of their own."""
    found = []
    for name in ("in-python", "in-c"):
        spool = lane.parent / name
        shutil.rmtree(spool, ignore_errors=True)
        shutil.copytree(lane, spool / lane.name)
        found.append(spool / lane.name)
    return found[0], found[1]


def open_both(lane: Path, driver: Driver, machine: Machine, *, max_bytes: int = 1 << 20) -> str | list[int]:
    """Open copies of `lane` with both, append a message, and compare what is on the disk after each step.

    Returns:
        `REFUSED` if both did, else what Python then reads from what C wrote: accepted times.
    """
    ours, theirs = twins_of(lane)
    driver.be(machine)
    found = driver.open(theirs, max_bytes=max_bytes)
    try:
        opened = open_lane(ours.parent, machine=machine, max_bytes=max_bytes)
    except LaneError as error:
        opened, refusal = None, error
    if opened is None:
        assert isinstance(found, str), f"Python refused, C did not: {refusal}"
        assert contents(theirs) == contents(ours) == contents(lane)
        return REFUSED
    try:
        assert not isinstance(found, str), f"Python took it, C refused: {found}"
        assert found[0] == opened.next_offset
        # Where the cursor's byte position is of no use, C counts from the beginning of that segment.
        assert found[1] >= opened.unsent_bytes
        assert found[1] == opened.unsent_bytes or opened.head.position != HEADER_BYTES
        compare(ours, theirs)
        append_to_both(opened, driver, found[1])
        compare(ours, theirs)
    finally:
        opened.close()
    driver.close_lane()
    return read(theirs, machine, max_bytes)


def append_to_both(lane: Lane, driver: Driver, unsent: int) -> None:
    frame = frame_of(99)
    (decoded,), _ = decode_frames(frame, 0, max_frames=1)
    answer = driver.append(decoded)
    try:
        offset = lane.append(frame)
    except LaneFullError:
        assert isinstance(answer, str)
        assert answer.startswith("full")
    else:
        assert answer == (offset + 1, unsent + len(frame))


def compare(ours: Path, theirs: Path) -> None:
    """See that both left the same segments; Python deletes those that are settled too."""
    in_c = contents(theirs)
    for name, content in contents(ours).items():
        assert in_c[name] == content, name
    kept = set(contents(ours))
    assert all(name < min(kept) for name in set(in_c) - kept)


def read(lane: Path, machine: Machine, max_bytes: int) -> list[int]:
    """Read all that Python finds in a lane, up to a damaged message."""
    opened = open_lane(lane.parent, machine=machine, max_bytes=max_bytes)
    reader = LaneReader(opened)
    found: list[int] = []
    try:
        while entries := reader.read(max_messages=1000):
            found += [entry.frame.accepted_us - START_US for entry in entries]
    except LaneCorruptError:
        pass
    finally:
        reader.close()
        opened.close()
    return found
