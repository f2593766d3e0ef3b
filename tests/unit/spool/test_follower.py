"""Reading a lane that another process writes. What `test_reader` shows of a lane of one's own is shown here again."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mq2mqtt.errors import LaneCorruptError, LaneError
from mq2mqtt.spool import follower
from mq2mqtt.spool import frame as codec
from mq2mqtt.spool.follower import FollowedLane
from mq2mqtt.spool.info import INFO_NAME, read_info
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.spool.recovery import base_of
from mq2mqtt.spool.segment import HEADER_BYTES
from mq2mqtt.spool.watching import Watcher
from tests.unit.spool import test_reader
from tests.unit.spool.followed import Pair, follow
from tests.unit.spool.lanes import MACHINE, REBOOTED, START_US, fill, frame_of, numbers, open_lane, segment_files
from tests.unit.spool.test_reader import (  # noqa: F401 - collected here once more
    FRAME_BYTES,
    TestSettling,
    TestWaiting,
    test_a_cursor_that_cannot_be_opened_is_named_and_nothing_stays_locked,
    test_a_frame_longer_than_a_read_is_read_whole,
    test_any_mix_of_steps_neither_loses_nor_repeats,
    test_max_bytes_is_kept_over_several_segments_and_chunks,
    test_reads_at_most_so_many_ahead,
    test_reads_in_order_across_segments,
)


@pytest.fixture(scope="module", autouse=True)
def _their_lanes_are_followed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_reader, "open_lane", Pair)
        yield


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    watcher = Watcher()
    yield watcher
    watcher.close()


def append_bytes(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_a_lane_that_is_not_begun(tmp_path: Path, watcher: Watcher) -> None:
    path = tmp_path / "rule-a"

    def opened() -> FollowedLane | None:
        return FollowedLane.open(path, max_bytes=1 << 20, target="mq_a", watcher=watcher, machine=MACHINE)

    assert opened() is None
    path.mkdir()
    assert opened() is None
    (path / "writer.lock").touch()
    assert opened() is None
    writer = open_lane(tmp_path)
    (path / INFO_NAME).unlink()
    lane = opened()
    assert lane is not None
    # It is the reader that knows the target.
    assert read_info(path) == lane.info == writer.info
    lane.retarget("mq_b")
    assert (found := read_info(path)) is not None
    assert found.target == "mq_b"
    lane.close()
    writer.close()


def test_a_frame_that_is_being_written(tmp_path: Path, watcher: Watcher) -> None:
    writer = open_lane(tmp_path)
    fill(writer, 2)
    lane = follow(writer.path, watcher=watcher)
    reader = LaneReader(lane)
    assert numbers(reader) == [0, 1]
    frame = frame_of(2, payload_bytes=300)
    for size in range(len(frame)):
        append_bytes(writer.last.path, frame[size : size + 1])
        assert numbers(reader) == ([2] if size == len(frame) - 1 else []), size
        assert lane.messages == (3 if size == len(frame) - 1 else 2)
    reader.close()
    lane.close()
    writer.close()


def test_an_unfinished_write_that_is_taken_back(tmp_path: Path, watcher: Watcher) -> None:
    writer = open_lane(tmp_path)
    lane = follow(writer.path, watcher=watcher)
    reader = LaneReader(lane)
    for number in range(20):
        fill(writer, 1, first=number, payload_bytes=100)
        append_bytes(writer.last.path, frame_of(99, payload_bytes=400)[: 17 * number])
        assert numbers(reader) == [number]
        os.truncate(writer.last.path, writer.last.size)
    assert lane.messages == 20
    reader.close()
    lane.close()
    writer.close()


def test_garbage_that_stays_while_frames_follow_is_damage(
    tmp_path: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "_DAMAGE_SECONDS", 0.0)
    writer = open_lane(tmp_path)
    fill(writer, 1)
    lane = follow(writer.path, watcher=watcher)
    reader = LaneReader(lane)
    path, position = writer.last.path, writer.last.size
    append_bytes(path, b"x" * 100)
    # It may be what a read in the middle of truncation and writing sees.
    assert numbers(reader) == [0]
    assert numbers(reader) == []
    append_bytes(path, frame_of(1))
    with pytest.raises(LaneCorruptError, match=rf"{path}: byte {position}: impossible frame size"):
        numbers(reader)
    reader.close()
    lane.close()
    writer.close()


def test_garbage_before_a_new_segment_is_damage(tmp_path: Path, watcher: Watcher) -> None:
    writer = open_lane(tmp_path, max_bytes=80 * FRAME_BYTES)
    lane = follow(writer.path, max_bytes=80 * FRAME_BYTES, watcher=watcher)
    reader = LaneReader(lane)
    first = writer.last.path
    fill(writer, 12, payload_bytes=100)
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    assert numbers(reader) == [0, 1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(LaneCorruptError, match=rf"{first}: byte \d+: CRC mismatch"):
        numbers(reader)
    reader.close()
    lane.close()
    writer.close()


def test_a_segment_whose_header_is_being_written(tmp_path: Path, watcher: Watcher) -> None:
    writer = open_lane(tmp_path, max_bytes=80 * FRAME_BYTES)
    lane = follow(writer.path, max_bytes=80 * FRAME_BYTES, watcher=watcher)
    reader = LaneReader(lane)
    fill(writer, 10, payload_bytes=100)
    second = segment_files(lane.path)[1]
    data = second.read_bytes()
    second.write_bytes(data[:40])
    assert numbers(reader) == list(range(9))
    second.write_bytes(data)
    assert numbers(reader) == [9]
    assert lane.messages == 10
    reader.close()
    lane.close()
    writer.close()


def test_a_segment_that_is_taken_back(tmp_path: Path, watcher: Watcher) -> None:
    """With a full disk the writer makes a segment again and again."""
    writer = open_lane(tmp_path, max_bytes=80 * FRAME_BYTES)
    lane = follow(writer.path, max_bytes=80 * FRAME_BYTES, watcher=watcher)
    reader = LaneReader(lane)
    fill(writer, 10, payload_bytes=100)
    second = segment_files(lane.path)[1]
    data = second.read_bytes()
    for size in (0, 40, HEADER_BYTES):
        second.write_bytes(data[:size])
        assert numbers(reader) == (list(range(9)) if size == 0 else [])
        second.unlink()
        assert numbers(reader) == []
        assert lane.messages == 9
    second.write_bytes(data)
    assert numbers(reader) == [9]
    reader.close()
    lane.close()
    writer.close()


def test_a_writer_that_starts_again(tmp_path: Path, watcher: Watcher) -> None:
    """In the same boot it goes on in the last segment; in another one it skips offsets."""
    writer = open_lane(tmp_path)
    lane = follow(writer.path, watcher=watcher)
    reader = LaneReader(lane)
    fill(writer, 3)
    writer.close()
    append_bytes(writer.last.path, frame_of(9)[:20])
    assert numbers(reader) == [0, 1, 2]
    writer = open_lane(tmp_path)
    fill(writer, 3, first=3)
    assert numbers(reader) == [3, 4, 5]
    writer.close()
    writer = open_lane(tmp_path, machine=REBOOTED)
    fill(writer, 3, first=6)
    entries = reader.read(max_messages=10)
    assert [entry.offset for entry in entries] == list(range(writer.next_offset - 3, writer.next_offset))
    assert lane.messages == 9
    reader.settle_to(reader.position)
    assert (lane.messages, lane.unsent_bytes, lane.taken) == (0, 0, 9)
    assert segment_files(lane.path) == [writer.last.path]
    reader.close()
    lane.close()
    writer.close()


def test_opening_what_a_writer_left(tmp_path: Path, watcher: Watcher) -> None:
    writer = open_lane(tmp_path, max_bytes=80 * FRAME_BYTES)
    fill(writer, 30, payload_bytes=100)
    writer.close()
    append_bytes(writer.last.path, frame_of(9)[:20])
    for machine in (MACHINE, REBOOTED):
        lane = follow(writer.path, watcher=watcher, machine=machine)
        reader = LaneReader(lane)
        assert (lane.messages, lane.oldest_us) == (30, START_US)
        assert numbers(reader) == list(range(30))
        reader.close()
        lane.close()
    # Cutting is the writer's.
    assert writer.last.path.stat().st_size > writer.last.size


def test_gauges_count_what_is_not_read_yet(tmp_path: Path, watcher: Watcher) -> None:
    writer = open_lane(tmp_path, max_bytes=16 << 20)
    lane = follow(writer.path, max_bytes=16 << 20, watcher=watcher)
    sizes = [0, 3_000_000, 10, 100_000, 5_000_000, 1]
    for number, size in enumerate(sizes):
        fill(writer, 1, first=number, payload_bytes=size)
        assert (lane.messages, lane.unsent_bytes) == (writer.messages, writer.unsent_bytes)
    fresh = follow(writer.path, max_bytes=16 << 20, watcher=watcher)
    assert (fresh.messages, fresh.unsent_bytes) == (writer.messages, writer.unsent_bytes)
    fresh.close()
    lane.close()
    writer.close()


async def test_a_file_that_cannot_be_looked_at_is_for_the_reader_to_meet(tmp_path: Path, watcher: Watcher) -> None:
    writer = open_lane(tmp_path)
    lane = follow(writer.path, watcher=watcher)
    (segment,) = segment_files(writer.path)
    segment.rename(tmp_path / "away")
    woken: list[bool] = []
    lane.watch(lambda: woken.append(True))
    assert woken
    with pytest.raises(LaneError):
        lane.look()
    lane.close()
    writer.close()


def test_only_one_of_two_writers_can_have_it(tmp_path: Path, watcher: Watcher) -> None:
    writer = open_lane(tmp_path)
    lane = follow(writer.path, watcher=watcher)
    assert not lane.is_released()
    writer.close()
    assert lane.is_released()
    assert lane.is_released()
    with pytest.raises(Exception, match="already its writer"):
        open_lane(tmp_path)
    lane.close()
    open_lane(tmp_path).close()


def test_files_are_the_groups_where_the_directory_is(tmp_path: Path, watcher: Watcher) -> None:
    for group_bits, expected in ((0, 0o600), (0o070, 0o660)):
        spool = tmp_path / str(group_bits)
        path = spool / "rule-a"
        path.mkdir(parents=True)
        path.chmod(0o700 | group_bits)
        writer = open_lane(spool)
        lane = follow(path, watcher=watcher)
        LaneReader(lane).close()
        modes = {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
        assert modes == {expected}
        lane.close()
        writer.close()


@settings(max_examples=40)
@given(data=st.data())
def test_whatever_a_writer_does_every_message_is_read_once(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spool = tmp_path_factory.mktemp("spool")
    max_bytes = 40 * FRAME_BYTES
    pair = Pair(spool, max_bytes=max_bytes)
    reader = LaneReader(pair)
    appended: list[int] = []
    read: list[int] = []
    machines = [MACHINE, REBOOTED]
    for step in data.draw(
        st.lists(st.sampled_from(["append", "torn", "restart", "reboot", "read", "gauge"]), max_size=40)
    ):
        if step == "append" and len(appended) - len(read) < 12:
            size = data.draw(st.integers(0, 300))
            appended.append(pair.append(frame_of(0, payload_bytes=size)))
        elif step == "torn":
            frame = frame_of(0, payload_bytes=data.draw(st.integers(0, 300)))
            append_bytes(pair.writer.last.path, frame[: data.draw(st.integers(0, len(frame) - 1))])
            if data.draw(st.booleans()):
                read += settle_all(reader)
            os.truncate(pair.writer.last.path, pair.writer.last.size)
        elif step in {"restart", "reboot"}:
            if step == "reboot":
                machines.reverse()
            pair.writer.close()
            pair.open_writer(spool / "rule-a", max_bytes=max_bytes, machine=machines[0])
        elif step == "read":
            read += settle_all(reader)
        else:
            assert pair.messages == len(appended) - len(read)
    read += settle_all(reader)
    assert read == appended
    assert (pair.messages, pair.unsent_bytes, pair.taken) == (0, 0, len(appended))
    reader.close()
    pair.close()


def settle_all(reader: LaneReader) -> list[int]:
    offsets = [entry.offset for entry in reader.read(max_messages=1000)]
    reader.settle(offsets)
    return offsets


# -- a real process --

WRITER = """
import os, pathlib, sys
from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.frame import encode_publish
from tests.unit.spool.followed import Writer, learn_from_cursor

lane = Writer.open(pathlib.Path(sys.argv[1]), max_bytes=8_000_000, target="t")
number = int(sys.argv[2])
while True:
    payload = b"%d " % number + b"." * (number * 7919 % 20000)
    frame = encode_publish(MqttMessage("s/a", payload, client_id="d"), accepted_us=number)
    while lane.unsent_bytes + len(frame) > lane.max_bytes - 100_000:
        learn_from_cursor(lane)
    offset = lane.append(frame)
    os.write(1, b"%d %d\\n" % (offset, number))
    number += 1
"""


def start_writer(path: Path, first: int, report: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[3]
    with report.open("ab") as out:
        return subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(first)], stdout=out, cwd=root)


async def opened(path: Path, watcher: Watcher) -> FollowedLane:
    while (lane := FollowedLane.open(path, max_bytes=8_000_000, target="t", watcher=watcher)) is None:
        await asyncio.sleep(0.01)
    return lane


async def read_until(reader: LaneReader, found: list[tuple[int, int]], enough: int) -> None:
    """Read and settle, waiting as a bridge does, until `enough` are found."""
    async with asyncio.timeout(60):
        while len(found) < enough:
            entries = reader.read(max_messages=256)
            found += [(entry.offset, entry.frame.accepted_us) for entry in entries]
            reader.settle([entry.offset for entry in entries])
            if not entries:
                await reader.wait()


async def test_a_process_that_writes_and_is_killed_again_and_again(tmp_path: Path, watcher: Watcher) -> None:
    path, report = tmp_path / "rule-a", tmp_path / "report"
    found: list[tuple[int, int]] = []
    lane: FollowedLane | None = None
    reader: LaneReader | None = None
    for _ in range(4):
        first = found[-1][1] + 1 if found else 0
        process = start_writer(path, first, report)
        try:
            if reader is None:
                lane = await opened(path, watcher)
                reader = LaneReader(lane)
            await read_until(reader, found, len(found) + 2000)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        # What it wrote before it died is still to be read.
        assert lane is not None
        while lane.messages:
            entries = reader.read(max_messages=256)
            found += [(entry.offset, entry.frame.accepted_us) for entry in entries]
            reader.settle([entry.offset for entry in entries])
    assert reader is not None
    assert lane is not None
    assert [number for _, number in found] == list(range(len(found)))
    acknowledged = [tuple(map(int, line.split())) for line in report.read_text().splitlines()]
    assert set(acknowledged) <= set(found)
    assert lane.messages == 0
    assert lane.taken == len(found)
    assert base_of(segment_files(path)[0]) > START_US
    reader.close()
    lane.close()


def test_counts_are_of_one_moment(tmp_path: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_lane(tmp_path)
    lane = follow(writer.path, watcher=watcher)
    look = lane._look_for_gauges  # noqa: SLF001 - when the writer comes in between

    def look_and_go_on() -> None:
        look()
        fill(writer, 1, payload_bytes=10)

    monkeypatch.setattr(lane, "_look_for_gauges", look_and_go_on)
    assert [lane.counts() for _ in range(3)] == [(0, 0), (1, 1), (2, 2)]
    assert (lane.taken, lane.messages) == (3, 4)
    lane.close()
    writer.close()


async def test_a_waiting_reader_is_woken_at_once(
    tmp_path: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the first message of a new segment; looking now and then would take longer."""
    monkeypatch.setattr(follower, "_LOOK_SECONDS", 3600.0)
    writer = open_lane(tmp_path, max_bytes=80 * FRAME_BYTES)
    lane = follow(writer.path, max_bytes=80 * FRAME_BYTES, watcher=watcher)
    reader = LaneReader(lane)
    for number in range(60):
        waiting = asyncio.create_task(reader.wait(), name="wait")
        await asyncio.sleep(0)
        assert not waiting.done()
        began = time.monotonic()
        fill(writer, 1, first=number, payload_bytes=100)
        await asyncio.wait_for(waiting, 20)
        assert time.monotonic() - began < 20
        assert numbers(reader) == [number]
        reader.settle_to(reader.position)
    reader.close()
    lane.close()
    writer.close()


async def test_news_that_follows_closely_waits_for_more(
    tmp_path: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "_LINGER_SECONDS", 20.0)
    writer = open_lane(tmp_path, max_bytes=1 << 20)
    lane = follow(writer.path, watcher=watcher)
    reader = LaneReader(lane)
    for number, is_woken in ((0, True), (1, False)):
        waiting = asyncio.create_task(reader.wait(), name="wait")
        await asyncio.sleep(0)
        fill(writer, 1, first=number, payload_bytes=100)
        await asyncio.wait([waiting], timeout=20 if is_woken else 0.1)
        assert waiting.done() is is_woken
        waiting.cancel()
        assert numbers(reader) == [number]
    reader.close()
    lane.close()
    writer.close()


async def test_without_news_it_is_found_soon(tmp_path: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "_watch", lambda *_: None)
    writer = open_lane(tmp_path, max_bytes=80 * FRAME_BYTES)
    lane = follow(writer.path, max_bytes=80 * FRAME_BYTES, watcher=watcher)
    reader = LaneReader(lane)
    assert numbers(reader) == []
    fill(writer, 20, payload_bytes=100)
    found: list[int] = []
    async with asyncio.timeout(20):
        while len(found) < 20:
            found += numbers(reader)
            await asyncio.sleep(0.05)
    reader.close()
    lane.close()
    writer.close()


def test_reading_is_not_slower_for_it(tmp_path: Path, watcher: Watcher) -> None:
    """Nothing is looked at twice: the frames are counted for the gauges alone."""
    writer = open_lane(tmp_path, max_bytes=64 << 20)
    fill(writer, 20_000, payload_bytes=64)
    lane = follow(writer.path, max_bytes=64 << 20, watcher=watcher)
    counted: list[int] = []
    walk = codec.count_frames

    def count(buffer: bytes, start: int) -> tuple[int, int]:
        counted.append(len(buffer))
        return walk(buffer, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "count_frames", count)
        fill(writer, 20_000, payload_bytes=64)
        reader = LaneReader(lane)
        while entries := reader.read(max_messages=256):
            reader.settle([entry.offset for entry in entries])
        assert lane.messages == 0
    assert counted == []
    assert lane.last.size == writer.last.size > HEADER_BYTES
    reader.close()
    lane.close()
    writer.close()
