import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mq2mqtt.errors import LaneCorruptError, LaneError
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.reader import MAX_AHEAD, LaneReader
from tests.unit.spool.lanes import START_US, fill, frame_of, numbers, open_lane, segment_files

FRAME_BYTES = len(frame_of(0, payload_bytes=100))


def reopen(lane: Lane, reader: LaneReader) -> tuple[Lane, LaneReader]:
    reader.close()
    lane.close()
    lane = open_lane(lane.path.parent, max_bytes=lane.max_bytes)
    return lane, LaneReader(lane)


def test_reads_in_order_across_segments(tmp_path: Path) -> None:
    lane = open_lane(tmp_path, max_bytes=320 * FRAME_BYTES)
    reader = LaneReader(lane)
    fill(lane, 300, payload_bytes=100)
    entries = reader.read(max_messages=7)
    assert [entry.offset for entry in entries] == list(range(START_US, START_US + 7))
    assert numbers(reader) == list(range(7, 300))
    assert numbers(reader) == []
    fill(lane, 5, first=300)
    assert numbers(reader) == list(range(300, 305))
    assert reader.position == lane.next_offset == START_US + 305
    reader.close()
    lane.close()


def test_max_bytes_is_kept_over_several_segments_and_chunks(tmp_path: Path) -> None:
    lane = open_lane(tmp_path, max_bytes=800 * 1024)
    reader = LaneReader(lane)
    fill(lane, 70, payload_bytes=10_000)
    size = len(frame_of(0, payload_bytes=10_000))
    seen = 0
    for count in (1, 2, 3, 13, 50):
        assert len(reader.read(max_messages=100, max_bytes=count * size + size // 2)) == count
        seen += count
    assert seen == 69
    # One message is returned even if it is longer.
    assert len(reader.read(max_messages=100, max_bytes=1)) == 1
    assert reader.read(max_messages=100, max_bytes=0) == []
    assert reader.read(max_messages=0) == []
    reader.close()
    lane.close()


def test_a_frame_longer_than_a_read_is_read_whole(tmp_path: Path) -> None:
    lane = open_lane(tmp_path, max_bytes=32 << 20)
    reader = LaneReader(lane)
    fill(lane, 1)
    fill(lane, 1, first=1, payload_bytes=3_000_000)
    fill(lane, 1, first=2)
    assert numbers(reader) == [0, 1, 2]
    reader.close()
    lane.close()


def test_reads_at_most_so_many_ahead(tmp_path: Path) -> None:
    lane = open_lane(tmp_path, max_bytes=16 << 20)
    reader = LaneReader(lane)
    fill(lane, MAX_AHEAD + 5)
    assert len(reader.read(max_messages=MAX_AHEAD + 5)) == MAX_AHEAD == reader.ahead
    assert reader.read(max_messages=1) == []
    reader.settle([START_US + 1])
    assert reader.read(max_messages=1) == []
    reader.settle([START_US])
    assert numbers(reader) == [MAX_AHEAD, MAX_AHEAD + 1]
    reader.close()
    lane.close()


def test_a_cursor_that_cannot_be_opened_is_named_and_nothing_stays_locked(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    (lane.path / "cursor").mkdir()
    with pytest.raises(LaneError, match=r"cannot open .*cursor"):
        LaneReader(lane)
    (lane.path / "cursor").rmdir()
    LaneReader(lane).close()
    lane.close()


class TestSettling:
    def test_the_cursor_follows_the_settled_prefix_and_survives(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        reader = LaneReader(lane)
        fill(lane, 10)
        reader.read(max_messages=8)
        reader.settle([START_US + 1, START_US + 2, START_US + 5])
        assert (reader.cursor, lane.messages, reader.ahead) == (START_US, 7, 8)
        reader.settle([START_US])
        assert (reader.cursor, lane.messages, reader.ahead) == (START_US + 3, 6, 5)
        # After a crash what was settled out of order is read again: duplicates, never loss.
        lane, reader = reopen(lane, reader)
        assert lane.messages == 7
        assert numbers(reader) == [3, 4, 5, 6, 7, 8, 9]
        reader.close()
        lane.close()

    def test_settle_to_takes_what_is_before(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        reader = LaneReader(lane)
        fill(lane, 10)
        reader.read(max_messages=4)
        reader.read(max_messages=4)
        reader.settle([START_US + 2])
        reader.settle_to(START_US + 6)
        assert (reader.cursor, lane.messages) == (START_US + 6, 4)
        reader.settle_to(START_US + 3)
        assert (reader.cursor, lane.messages) == (START_US + 6, 4)
        with pytest.raises(ValueError, match="not read"):
            reader.settle_to(START_US + 9)
        reader.close()
        lane.close()

    def test_only_what_was_read_and_once(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        reader = LaneReader(lane)
        fill(lane, 10)
        reader.read(max_messages=5)
        reader.settle([START_US, START_US + 2])
        for offset in (START_US - 1, START_US, START_US + 2, START_US + 5):
            with pytest.raises(ValueError, match="not read, or is settled"):
                reader.settle([offset])
        reader.close()
        lane.close()

    def test_segments_behind_the_cursor_are_deleted(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path, max_bytes=80 * FRAME_BYTES)
        reader = LaneReader(lane)
        fill(lane, 75, payload_bytes=100)
        total = len(segment_files(lane.path))
        assert total == 9
        entries = reader.read(max_messages=75)
        last = segment_files(lane.path)[-1]
        for number, entry in enumerate(reversed(entries)):
            assert len(segment_files(lane.path)) == total, number
            reader.settle([entry.offset])
        assert segment_files(lane.path) == [last]
        assert (lane.messages, lane.unsent_bytes) == (0, 0)
        # Readers and writers go on, and deletion keeps pace.
        for number in range(75, 300):
            fill(lane, 1, first=number, payload_bytes=100)
            assert numbers(reader) == [number]
            reader.settle_to(reader.position)
            assert len(segment_files(lane.path)) <= 2
            assert (lane.messages, lane.unsent_bytes) == (0, 0)
        reader.close()
        lane.close()

    def test_a_segment_that_cannot_be_deleted_stops_nothing(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path, max_bytes=80 * FRAME_BYTES)
        reader = LaneReader(lane)
        fill(lane, 30, payload_bytes=100)
        first = segment_files(lane.path)[0]
        numbers(reader)
        first.unlink()
        first.mkdir()
        reader.settle_to(reader.position)
        assert first.is_dir()
        assert lane.messages == 0
        first.rmdir()
        fill(lane, 1, first=30)
        numbers(reader)
        reader.settle_to(reader.position)
        assert len(segment_files(lane.path)) == 1
        reader.close()
        lane.close()


@settings(max_examples=60)
@given(data=st.data())
def test_any_mix_of_steps_neither_loses_nor_repeats(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lane = open_lane(tmp_path_factory.mktemp("spool"), max_bytes=40 * FRAME_BYTES)
    reader = LaneReader(lane)
    appended: list[int] = []
    settled: set[int] = set()
    out: list[int] = []
    for _ in range(data.draw(st.integers(1, 30))):
        step = data.draw(st.sampled_from(["append", "read", "settle", "reopen"]))
        if step == "append" and len(appended) - len(settled) < 12:
            sizes = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=4))
            appended.extend([lane.append(frame_of(0, payload_bytes=size)) for size in sizes])
        elif step == "read":
            out.extend(entry.offset for entry in reader.read(max_messages=data.draw(st.integers(1, 6))))
        elif step == "settle" and out:
            chosen = data.draw(st.lists(st.sampled_from(out), unique=True, min_size=1))
            reader.settle(chosen)
            settled.update(chosen)
            out = [offset for offset in out if offset not in settled]
        elif step == "reopen":
            cursor = reader.cursor
            lane, reader = reopen(lane, reader)
            settled = {offset for offset in settled if offset < cursor}
            out = []
        unsettled = [offset for offset in appended if offset not in settled]
        assert lane.messages == len(unsettled)
        assert reader.cursor == (unsettled[0] if unsettled else lane.next_offset)
    out.extend(entry.offset for entry in reader.read(max_messages=1000))
    assert out == [offset for offset in appended if offset not in settled]
    reader.settle(out)
    assert (lane.messages, lane.unsent_bytes, reader.ahead) == (0, 0, 0)
    assert len(segment_files(lane.path)) == 1
    reader.close()
    lane.close()


class TestWaiting:
    async def test_ends_with_an_append(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        reader = LaneReader(lane)
        waiting = asyncio.create_task(reader.wait(), name="wait")
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        fill(lane, 1)
        await waiting
        await reader.wait()
        assert numbers(reader) == [0]
        reader.close()
        lane.close()

    async def test_ends_when_settling_makes_room(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path, max_bytes=16 << 20)
        reader = LaneReader(lane)
        fill(lane, MAX_AHEAD + 1)
        reader.read(max_messages=MAX_AHEAD)
        waiting = asyncio.create_task(reader.wait(), name="wait")
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        reader.settle([START_US])
        await waiting
        assert numbers(reader) == [MAX_AHEAD]
        reader.close()
        lane.close()

    async def test_ends_when_the_reader_is_closed(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        reader = LaneReader(lane)
        waiting = asyncio.create_task(reader.wait(), name="wait")
        await asyncio.sleep(0)
        reader.close()
        reader.close()
        await waiting
        lane.close()

    async def test_can_be_cancelled(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        reader = LaneReader(lane)
        waiting = asyncio.create_task(reader.wait(), name="wait")
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        fill(lane, 1)
        assert numbers(reader) == [0]
        reader.close()
        lane.close()


def test_a_file_cut_under_the_reader_is_damage(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    reader = LaneReader(lane)
    fill(lane, 3, payload_bytes=100)
    with lane.last.path.open("r+b") as file:
        file.truncate(lane.last.size - 10)
    assert len(reader.read(max_messages=10)) == 2
    with pytest.raises(LaneCorruptError, match=rf"{lane.last.path}: byte \d+: frame cut off"):
        reader.read(max_messages=10)
    reader.close()
    lane.close()


@pytest.mark.parametrize(("segment", "sound", "after"), [(0, 8, range(9, 15)), (-1, 14, ())])
def test_what_the_error_says_gives_up_the_damage_alone(
    tmp_path: Path, segment: int, sound: int, after: Sequence[int]
) -> None:
    lane = open_lane(tmp_path, max_bytes=80 * FRAME_BYTES)
    fill(lane, 15, payload_bytes=100)
    reader = LaneReader(lane)
    path = segment_files(lane.path)[segment]
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)
    assert len(reader.read(max_messages=100)) == sound
    with pytest.raises(LaneCorruptError) as damage:
        reader.read(max_messages=100)
    reader.settle_to(reader.position)
    reader.close()
    lane.close()

    if segment == 0:
        assert "is sent, stop the bridge (a Mosquitto beside it too) and move it away" in str(damage.value)
        path.rename(tmp_path / "moved")
    else:
        _, command, size = str(damage.value).removesuffix(f" {path}").rpartition(" truncate -s ")
        assert command
        os.truncate(path, int(size))
    lane = open_lane(tmp_path, max_bytes=80 * FRAME_BYTES)
    reader = LaneReader(lane)
    assert numbers(reader) == list(after)
    reader.close()
    lane.close()


def test_a_segment_with_fewer_frames_than_its_successor_says_is_damage(tmp_path: Path) -> None:
    lane = open_lane(tmp_path, max_bytes=80 * FRAME_BYTES)
    fill(lane, 15, payload_bytes=100)
    reader = LaneReader(lane)
    # Two frames became one of the same length: every CRC is right, a message is missing.
    path = segment_files(lane.path)[0]
    data = path.read_bytes()
    longer = frame_of(1, payload_bytes=100 + FRAME_BYTES)
    start = len(data) - 2 * FRAME_BYTES
    path.write_bytes(data[:start] + longer)
    assert len(longer) == 2 * FRAME_BYTES
    assert len(reader.read(max_messages=100)) == 8
    with pytest.raises(LaneCorruptError, match=rf"{path}: byte {len(data)}: 8 messages, but 9 were written"):
        reader.read(max_messages=100)
    reader.close()
    lane.close()
