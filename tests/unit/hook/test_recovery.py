"""Every row of docs/spool.md, "Opening a lane": the hook finds, cuts and refuses what the spool in Python does."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.cursor import CursorFile, Head
from mq2mqtt.spool.frame import encode_publish
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.spool.segment import HEADER_BYTES
from tests.thorough import searching
from tests.unit.hook.driver import Driver
from tests.unit.hook.twins import REFUSED, open_both
from tests.unit.spool.lanes import MACHINE, REBOOTED, START_US, fill, frame_of, open_lane, segment_files

COUNT = 5
FRAME_BYTES = len(frame_of(0))
FILE_BYTES = HEADER_BYTES + COUNT * FRAME_BYTES
TWO_A_SEGMENT = 8 * (HEADER_BYTES + 2 * FRAME_BYTES)
NO_BOOT_ID = replace(MACHINE, boot_id=bytes(16))
MACHINES = [MACHINE, REBOOTED, NO_BOOT_ID]
IDS = ["same boot", "other boot", "unknown boot"]


@pytest.fixture
def lane_path(tmp_path: Path) -> Path:
    """A closed lane of `COUNT` messages in one segment."""
    lane = open_lane(tmp_path)
    fill(lane, COUNT)
    lane.close()
    return lane.path


@pytest.fixture
def long_path(tmp_path: Path) -> Path:
    """A closed lane of six messages, two in each segment."""
    lane = open_lane(tmp_path, max_bytes=TWO_A_SEGMENT)
    fill(lane, 6)
    lane.close()
    assert len(segment_files(lane.path)) == 3
    return lane.path


def segment_of(lane_path: Path) -> Path:
    (path,) = segment_files(lane_path)
    return path


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
def test_a_file_cut_at_any_byte_keeps_every_whole_frame(machine: Machine, lane_path: Path, driver: Driver) -> None:
    for size in range(FILE_BYTES, -1, -1):
        os.truncate(segment_of(lane_path), size)
        whole = max(0, (size - HEADER_BYTES) // FRAME_BYTES)
        assert open_both(lane_path, driver, machine) == [*range(whole), 99]


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
def test_a_flipped_bit_anywhere(machine: Machine, lane_path: Path, driver: Driver) -> None:
    path = segment_of(lane_path)
    sound = path.read_bytes()
    for position in range(FILE_BYTES):
        path.write_bytes(sound[:position] + bytes((sound[position] ^ 0x04,)) + sound[position + 1 :])
        found = open_both(lane_path, driver, machine)
        assert found == REFUSED or (machine != MACHINE and position >= FILE_BYTES - FRAME_BYTES)


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
@pytest.mark.parametrize("tail", [bytes(5000), b"\xff" * 300, os.urandom(3000)], ids=["zeros", "ones", "noise"])
@pytest.mark.parametrize("behind", [b"", frame_of(7)], ids=["nothing behind", "a frame behind"])
def test_garbage_after_the_frames(
    tail: bytes, behind: bytes, machine: Machine, lane_path: Path, driver: Driver
) -> None:
    path = segment_of(lane_path)
    path.write_bytes(path.read_bytes() + tail + behind)
    found = open_both(lane_path, driver, machine)
    kept = machine != MACHINE and (not behind or not any(tail))
    assert found == ([*range(COUNT), 99] if kept else REFUSED)


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
def test_a_torn_frame_whose_payload_holds_frames_is_only_torn(
    machine: Machine, lane_path: Path, driver: Driver
) -> None:
    payload = b"".join(map(frame_of, range(20)))
    frame = encode_publish(MqttMessage("sensors/a", payload, client_id="dev"), accepted_us=1)
    path = segment_of(lane_path)
    path.write_bytes(path.read_bytes() + frame[: len(frame) - 30])
    assert open_both(lane_path, driver, machine) == [*range(COUNT), 99]


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
@pytest.mark.parametrize("damaged", [0, 2, COUNT - 1])
def test_a_size_field_that_points_past_the_end(damaged: int, machine: Machine, lane_path: Path, driver: Driver) -> None:
    path = segment_of(lane_path)
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + damaged * FRAME_BYTES + 2] ^= 0x01
    path.write_bytes(data)
    assert open_both(lane_path, driver, machine) == REFUSED


def test_the_text_names_file_byte_and_remedy(lane_path: Path, driver: Driver) -> None:
    path = segment_of(lane_path)
    data = bytearray(path.read_bytes())
    at = HEADER_BYTES + 2 * FRAME_BYTES
    data[at + 40] ^= 1
    path.write_bytes(data)
    driver.be(MACHINE)
    problem = driver.open(lane_path)
    assert isinstance(problem, str)
    assert problem.startswith(
        f"{path}: byte {at}: CRC mismatch, with a sound frame at byte {at + FRAME_BYTES}; restore"
    )
    assert problem.endswith(f"truncate -s {at} {path}")


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
@pytest.mark.parametrize("zeros", [False, True], ids=["cut", "zeros"])
@pytest.mark.parametrize(
    "damage",
    [
        {0: HEADER_BYTES + 2 * FRAME_BYTES - 1},
        {0: HEADER_BYTES, 1: HEADER_BYTES},
        {1: 0, 2: 0},
        {1: 0},
        {0: 0},
        {0: 40, 1: 40, 2: 40},
        {2: 0},
        {2: HEADER_BYTES - 1},
    ],
)
def test_what_a_loss_of_power_takes(
    damage: dict[int, int],
    zeros: bool,  # noqa: FBT001
    machine: Machine,
    long_path: Path,
    driver: Driver,
) -> None:
    paths = segment_files(long_path)
    for index, size in damage.items():
        os.truncate(paths[index], size)
        if zeros:
            os.truncate(paths[index], HEADER_BYTES + 2 * FRAME_BYTES)
    found = open_both(long_path, driver, machine, max_bytes=TWO_A_SEGMENT)
    assert machine == MACHINE or found != REFUSED


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
def test_a_missing_or_longer_segment_and_a_foreign_file(machine: Machine, long_path: Path, driver: Driver) -> None:
    path = segment_files(long_path)[1]
    path.rename(long_path / "away.tmp")
    assert open_both(long_path, driver, machine) == REFUSED
    (long_path / "away.tmp").rename(path)
    (long_path / "note.txt").touch()
    assert open_both(long_path, driver, machine) == REFUSED
    (long_path / "note.txt").unlink()
    path.write_bytes(path.read_bytes() + b"x")
    found = open_both(long_path, driver, machine)
    assert found == REFUSED if machine == MACHINE else [0, 1, 2, 3, 4, 5, 99]


def test_a_lost_header_before_frames(long_path: Path, driver: Driver) -> None:
    path = segment_files(long_path)[2]
    path.write_bytes(bytes(600) + frame_of(1))
    assert open_both(long_path, driver, MACHINE) == REFUSED
    assert open_both(long_path, driver, REBOOTED) == [0, 1, 2, 3, 99]


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
@pytest.mark.parametrize("count", range(7))
def test_the_cursor_counts_what_is_unsent(count: int, machine: Machine, long_path: Path, driver: Driver) -> None:
    lane = open_lane(long_path.parent)
    reader = LaneReader(lane)
    reader.read(max_messages=count)
    if count:
        reader.settle_to(START_US + count)
    reader.close()
    lane.close()
    assert open_both(long_path, driver, machine, max_bytes=TWO_A_SEGMENT) == [*range(count, 6), 99]


def test_a_cursor_past_the_last_message_is_gone_on_from(lane_path: Path, driver: Driver) -> None:
    file = CursorFile(lane_path, START_US)
    file.store(Head(START_US + 100, START_US, FILE_BYTES))
    file.close()
    assert open_both(lane_path, driver, MACHINE) == [99]


def test_without_a_description_the_segments_tell_whose_lane_it_is(lane_path: Path, driver: Driver) -> None:
    (lane_path / "lane.json").unlink()
    assert open_both(lane_path, driver, MACHINE) == [*range(COUNT), 99]
    description = '{"rule": "rule-a", "target": "mq_a", "created_us": 1, "version": 1}'
    (lane_path / "lane.json").write_text(description)
    assert open_both(lane_path, driver, MACHINE) == REFUSED


# What may have happened to a segment file: its number, what, where, and how much.
damages = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from(["cut", "zero", "flip", "grow", "sector", "remove", "frame", "noise"]),
        st.integers(0, 3000),
        st.integers(1, 1200),
    ),
    max_size=3,
)
boots = st.lists(st.integers(0, 2), min_size=1, max_size=3)


def damage(lane: Path, number: int, what: str, at: int, size: int) -> None:
    paths = segment_files(lane)
    if not paths:
        return
    path = paths[number % len(paths)]
    data = bytearray(path.read_bytes())
    at %= len(data) + 1
    if what == "cut":
        del data[at:]
    elif what == "zero":
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif what == "flip" and at < len(data):
        data[at] ^= 1 << size % 8
    elif what == "grow":
        data += bytes(size)
    elif what == "sector":
        start = at // 512 * 512
        data[start : start + 512] = bytes(len(data[start : start + 512]))
    elif what == "frame":
        data += frame_of(7)
    elif what == "noise":
        data += os.urandom(size)
    if what == "remove":
        path.unlink()
    else:
        path.write_bytes(data)


def test_any_damage(tmp_path: Path, driver: Driver) -> None:
    # Each boot appends some messages and settles some; then files are damaged; then one more boot opens the lane.
    @searching(250)
    @given(
        boots=boots,
        messages=st.lists(st.sampled_from([0, 1, 40, 500, 900, 2000]), min_size=1, max_size=12),
        settled=st.integers(0, 12),
        damages=damages,
        last=st.integers(0, 3),
        without=st.sampled_from(["", "cursor", "lane.json"]),
    )
    def search(  # noqa: PLR0913, PLR0917 - drawn
        boots: list[int],
        messages: list[int],
        settled: int,
        damages: list[tuple[int, str, int, int]],
        last: int,
        without: str,
    ) -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        for boot in boots:
            machine = replace(MACHINE, boot_id=bytes([boot]) * 16)
            lane = open_lane(tmp_path, max_bytes=16384, machine=machine)
            for number, size in enumerate(messages):
                if lane.unsent_bytes + size + 100 < lane.max_bytes:
                    fill(lane, 1, first=number, payload_bytes=size)
            reader = LaneReader(lane)
            reader.settle([entry.offset for entry in reader.read(max_messages=settled)] if settled else [])
            reader.close()
            lane.close()
        for number, what, at, size in damages:
            damage(lane.path, number, what, at, size)
        if without:
            (lane.path / without).unlink(missing_ok=True)
        open_both(lane.path, driver, replace(MACHINE, boot_id=bytes([last]) * 16), max_bytes=16384)

    logger.disable("mq2mqtt")
    try:
        search()
    finally:
        logger.enable("mq2mqtt")
