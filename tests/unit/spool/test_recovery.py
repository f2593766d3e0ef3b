"""Opening a lane after a crash: what is cut, what is kept, and what is refused because no crash explains it."""

import os
import struct
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from mq2mqtt.errors import LaneCorruptError
from mq2mqtt.message import MqttMessage
from mq2mqtt.spool import frame as codec
from mq2mqtt.spool.frame import encode_publish
from mq2mqtt.spool.inspect import read_entries, summarize
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.spool.segment import HEADER_BYTES
from tests.unit.spool.lanes import MACHINE, REBOOTED, START_US, fill, frame_of, numbers, open_lane, segment_files

COUNT = 5
FRAME_BYTES = len(frame_of(0))
FILE_OF_TWO = HEADER_BYTES + 2 * FRAME_BYTES
FILE_BYTES = HEADER_BYTES + COUNT * FRAME_BYTES
NO_BOOT_ID = replace(MACHINE, boot_id=bytes(16))


@pytest.fixture
def lane_path(tmp_path: Path) -> Path:
    """A closed lane of `COUNT` messages in one segment."""
    lane = open_lane(tmp_path)
    fill(lane, COUNT)
    lane.close()
    assert lane.last.path.stat().st_size == FILE_BYTES
    return lane.path


def segment_of(lane_path: Path) -> Path:
    (path,) = segment_files(lane_path)
    return path


def reopen_and_read(lane_path: Path, machine: Machine = MACHINE) -> list[int]:
    """Open, append one more, read all, and see that the files can be opened once again."""
    lane = open_lane(lane_path.parent, machine=machine)
    count = lane.messages
    fill(lane, 1, first=99)
    reader = LaneReader(lane)
    found = numbers(reader)
    assert found[-1] == 99
    assert len(found) == count + 1
    reader.close()
    lane.close()
    again = open_lane(lane_path.parent, machine=machine)
    assert again.messages == count + 1
    again.close()
    return found[:-1]


@pytest.mark.parametrize("machine", [MACHINE, REBOOTED, NO_BOOT_ID], ids=["same boot", "other boot", "unknown boot"])
@pytest.mark.parametrize("size", range(FILE_BYTES + 1))
def test_a_file_cut_at_any_byte_keeps_every_whole_frame(size: int, machine: Machine, lane_path: Path) -> None:
    os.truncate(segment_of(lane_path), size)
    assert reopen_and_read(lane_path, machine) == list(range(max(0, (size - HEADER_BYTES) // FRAME_BYTES)))


@pytest.mark.parametrize("position", range(FILE_BYTES))
def test_a_flipped_bit_is_never_skipped(position: int, lane_path: Path) -> None:
    path = segment_of(lane_path)
    data = bytearray(path.read_bytes())
    data[position] ^= 0x04
    path.write_bytes(data)
    damaged = max(0, (position - HEADER_BYTES) // FRAME_BYTES)
    start = HEADER_BYTES + damaged * FRAME_BYTES if position >= HEADER_BYTES else r"\d+"
    with pytest.raises(LaneCorruptError, match=rf"{path}: byte {start}: "):
        open_lane(lane_path.parent)
    assert path.read_bytes() == data


@pytest.mark.parametrize("position", range(HEADER_BYTES, FILE_BYTES - FRAME_BYTES))
def test_a_flipped_bit_before_the_last_frame_is_never_skipped_in_another_boot(position: int, lane_path: Path) -> None:
    path = segment_of(lane_path)
    data = bytearray(path.read_bytes())
    data[position] ^= 0x04
    path.write_bytes(data)
    start = HEADER_BYTES + (position - HEADER_BYTES) // FRAME_BYTES * FRAME_BYTES
    with pytest.raises(LaneCorruptError, match=rf"{path}: byte {start}: .*truncate -s {start} {path}"):
        open_lane(lane_path.parent, machine=REBOOTED)


@pytest.mark.parametrize("tail", [bytes(5000), b"\xff" * 300, os.urandom(3000)], ids=["zeros", "ones", "noise"])
class TestGarbageAfterTheFrames:
    def test_is_what_a_loss_of_power_leaves(self, tail: bytes, lane_path: Path) -> None:
        path = segment_of(lane_path)
        path.write_bytes(path.read_bytes() + tail)
        assert reopen_and_read(lane_path, REBOOTED) == list(range(COUNT))

    def test_is_damage_without_one(self, tail: bytes, lane_path: Path) -> None:
        path = segment_of(lane_path)
        path.write_bytes(path.read_bytes() + tail)
        with pytest.raises(LaneCorruptError, match=rf"{path}: byte {FILE_BYTES}: "):
            open_lane(lane_path.parent)

    def test_with_a_frame_behind_it_is_damage_unless_it_is_zeros(self, tail: bytes, lane_path: Path) -> None:
        path = segment_of(lane_path)
        path.write_bytes(path.read_bytes() + tail + frame_of(7))
        if not any(tail):
            # A disk writes sectors in any order.
            assert reopen_and_read(lane_path, REBOOTED) == list(range(COUNT))
            return
        with pytest.raises(LaneCorruptError, match=f"a sound frame at byte {FILE_BYTES + len(tail)}"):
            open_lane(lane_path.parent, machine=REBOOTED)


@pytest.mark.parametrize("machine", [MACHINE, REBOOTED], ids=["same boot", "other boot"])
def test_a_torn_frame_whose_payload_holds_frames_is_only_torn(machine: Machine, lane_path: Path) -> None:
    # Payloads are a device's: whole frames in one must not stop the start after a crash.
    payload = b"".join(map(frame_of, range(20)))
    frame = encode_publish(MqttMessage("sensors/a", payload, client_id="dev"), accepted_us=1)
    path = segment_of(lane_path)
    path.write_bytes(path.read_bytes() + frame[: len(frame) - 30])
    assert reopen_and_read(lane_path, machine) == list(range(COUNT))


@pytest.mark.parametrize("machine", [MACHINE, REBOOTED], ids=["same boot", "other boot"])
@pytest.mark.parametrize("damaged", [0, 2, COUNT - 1])
def test_a_size_field_that_points_past_the_end_is_not_a_torn_write(
    damaged: int, machine: Machine, lane_path: Path
) -> None:
    path = segment_of(lane_path)
    data = bytearray(path.read_bytes())
    start = HEADER_BYTES + damaged * FRAME_BYTES
    data[start + 2] ^= 0x01
    path.write_bytes(data)
    with pytest.raises(LaneCorruptError, match=rf"{path}: byte {start}: damaged frame size"):
        open_lane(lane_path.parent, machine=machine)


def test_the_remedy_in_the_text_works(lane_path: Path) -> None:
    path = segment_of(lane_path)
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 2 * FRAME_BYTES + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(LaneCorruptError, match="truncate") as caught:
        open_lane(lane_path.parent)
    command = str(caught.value).rpartition("truncate -s ")[2].split()
    os.truncate(command[1], int(command[0]))
    assert reopen_and_read(lane_path) == [0, 1]


def test_damage_behind_the_cursor_does_not_matter(lane_path: Path) -> None:
    lane = open_lane(lane_path.parent)
    reader = LaneReader(lane)
    reader.read(max_messages=3)
    reader.settle_to(START_US + 3)
    reader.close()
    lane.close()
    path = segment_of(lane_path)
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 50] ^= 1
    path.write_bytes(data)
    assert reopen_and_read(lane_path) == [3, 4]


class TestSeveralSegments:
    @pytest.fixture
    def lane_path(self, tmp_path: Path) -> Path:
        """A closed lane of 20 messages, two in each segment."""
        lane = open_lane(tmp_path, max_bytes=8 * (HEADER_BYTES + 2 * FRAME_BYTES))
        for number in range(20):
            lane.append(frame_of(number % 10))
        lane.close()
        assert len(segment_files(lane.path)) == 10
        return lane.path

    def settle(self, lane_path: Path, count: int) -> None:
        lane = open_lane(lane_path.parent)
        reader = LaneReader(lane)
        reader.read(max_messages=count)
        reader.settle_to(START_US + count)
        reader.close()
        lane.close()

    def test_without_a_cursor_everything_is_read(self, lane_path: Path) -> None:
        self.settle(lane_path, 5)
        (lane_path / "cursor").unlink()
        lane = open_lane(lane_path.parent)
        # The two segments behind the cursor are gone, the message before it is read again.
        assert (lane.head.offset, lane.messages) == (START_US + 4, 16)
        lane.close()

    @pytest.mark.parametrize("count", range(21))
    def test_the_cursor_is_found_again(self, count: int, lane_path: Path) -> None:
        self.settle(lane_path, count)
        lane = open_lane(lane_path.parent)
        assert (lane.head.offset, lane.messages) == (START_US + count, 20 - count)
        assert lane.unsent_bytes == (20 - count) * FRAME_BYTES
        reader = LaneReader(lane)
        assert [entry.offset for entry in reader.read(max_messages=99)] == list(range(START_US + count, START_US + 20))
        reader.close()
        lane.close()

    def test_a_missing_segment_is_named(self, lane_path: Path) -> None:
        missing = segment_files(lane_path)[4]
        missing.unlink()
        with pytest.raises(LaneCorruptError, match=f"{missing}: missing, between"):
            open_lane(lane_path.parent)

    @pytest.mark.parametrize("change", [-1, 1])
    def test_a_segment_of_another_length_is_named(self, change: int, lane_path: Path) -> None:
        path = segment_files(lane_path)[4]
        os.truncate(path, path.stat().st_size + change)
        with pytest.raises(LaneCorruptError, match=rf"{path}: byte \d+: \d+ bytes, but \d+ were written"):
            open_lane(lane_path.parent)

    def test_removing_the_oldest_segments_gives_them_up_with_a_remark(self, lane_path: Path) -> None:
        self.settle(lane_path, 1)
        for path in segment_files(lane_path)[:3]:
            path.unlink()
        lane = open_lane(lane_path.parent)
        assert (lane.head.offset, lane.messages) == (START_US + 6, 14)
        lane.close()

    def test_damage_in_an_earlier_segment_stops_the_reader_there(self, lane_path: Path) -> None:
        path = segment_files(lane_path)[4]
        data = bytearray(path.read_bytes())
        data[HEADER_BYTES + FRAME_BYTES + 30] ^= 1
        path.write_bytes(data)
        lane = open_lane(lane_path.parent)
        reader = LaneReader(lane)
        assert len(reader.read(max_messages=99)) == 9
        for _ in range(2):
            with pytest.raises(LaneCorruptError, match=rf"{path}: byte {HEADER_BYTES + FRAME_BYTES}: CRC mismatch"):
                reader.read(max_messages=99)
        # New messages are still taken.
        fill(lane, 1)
        reader.settle_to(reader.position)
        reader.close()
        lane.close()
        # The remedy: everything before it is sent, so the file can be moved away.
        path.unlink()
        lane = open_lane(lane_path.parent)
        assert lane.messages == 11
        lane.close()

    def test_a_cursor_whose_byte_position_is_of_no_use_is_found_by_counting(self, lane_path: Path) -> None:
        self.settle(lane_path, 5)
        lane = open_lane(lane_path.parent)
        reader = LaneReader(lane)
        # As another writer might leave it: the right offset, the place not worked out.
        reader._cursor_file.store(lane.head._replace(offset=START_US + 7, position=0))  # noqa: SLF001
        reader.close()
        lane.close()
        lane = open_lane(lane_path.parent)
        assert (lane.head.offset, lane.head.position, lane.messages) == (
            START_US + 7,
            HEADER_BYTES + FRAME_BYTES,
            13,
        )
        lane.close()

    @pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1])
    def test_a_segment_that_got_no_header_is_removed(self, size: int, lane_path: Path) -> None:
        os.truncate(segment_files(lane_path)[-1], size)
        lane = open_lane(lane_path.parent)
        assert lane.messages == 18
        reader = LaneReader(lane)
        fill(lane, 3)
        assert len(reader.read(max_messages=99)) == 21
        reader.close()
        lane.close()

    def test_a_segment_of_zeros_is_removed(self, lane_path: Path) -> None:
        segment_files(lane_path)[-1].write_bytes(bytes(3_000_000))
        lane = open_lane(lane_path.parent, machine=REBOOTED)
        assert lane.messages == 18
        lane.close()

    def test_a_lost_header_before_frames_is_damage(self, lane_path: Path) -> None:
        path = segment_files(lane_path)[-1]
        path.write_bytes(bytes(HEADER_BYTES) + path.read_bytes()[HEADER_BYTES:])
        with pytest.raises(LaneCorruptError, match=f"{path}: byte 0: "):
            open_lane(lane_path.parent, machine=REBOOTED)


def test_a_leftover_of_an_atomic_write_is_harmless(lane_path: Path) -> None:
    (lane_path / "lane.json.tmp").write_text("{")
    assert reopen_and_read(lane_path) == list(range(COUNT))


def test_many_restarts_of_the_machine_leave_no_empty_segments(lane_path: Path) -> None:
    lane = open_lane(lane_path.parent)
    reader = LaneReader(lane)
    reader.read(max_messages=99)
    reader.settle_to(reader.position)
    reader.close()
    lane.close()
    for boot in range(5):
        lane = open_lane(lane_path.parent, machine=replace(MACHINE, boot_id=bytes([boot + 1] * 16)))
        assert (lane.messages, lane.unsent_bytes) == (0, 0)
        lane.close()
    assert len(segment_files(lane_path)) == 1


class TestLossOfPower:
    """A disk writes what was not synced in any order, and a start must not need anybody's help after that."""

    @pytest.fixture
    def lane_path(self, tmp_path: Path) -> Path:
        """A closed lane of six messages, two in each segment."""
        lane = open_lane(tmp_path, max_bytes=8 * (HEADER_BYTES + 2 * FRAME_BYTES))
        fill(lane, 6)
        lane.close()
        assert len(segment_files(lane.path)) == 3
        return lane.path

    @pytest.mark.parametrize(
        ("damage", "left"),
        [
            pytest.param({0: FILE_OF_TWO - 1}, [0, 2, 3, 4, 5], id="the end of an earlier segment"),
            pytest.param({0: HEADER_BYTES, 1: HEADER_BYTES}, [4, 5], id="all frames of earlier segments"),
            pytest.param({1: 0, 2: 0}, [0, 1], id="all of two segments"),
            pytest.param({1: 0}, [0, 1, 4, 5], id="all of a segment between"),
            pytest.param({0: 0}, [2, 3, 4, 5], id="all of the first segment"),
            pytest.param({0: 40, 1: 40, 2: 40}, [], id="everything but half the headers"),
        ],
    )
    @pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "cut"])
    def test_keeps_what_is_left(self, zeros: bool, damage: dict[int, int], left: list[int], lane_path: Path) -> None:  # noqa: FBT001
        paths = segment_files(lane_path)
        for index, size in damage.items():
            os.truncate(paths[index], size)
            if zeros:
                os.truncate(paths[index], FILE_OF_TWO)
        assert summarize(lane_path).problem is None
        assert [entry.frame.accepted_us - START_US for entry in read_entries(lane_path)] == left
        assert reopen_and_read(lane_path, REBOOTED) == left
        # What was lost stays lost, whoever looks again.
        for machine in (REBOOTED, replace(MACHINE, boot_id=b"d" * 16)):
            lane = open_lane(lane_path.parent, machine=machine)
            reader = LaneReader(lane)
            assert numbers(reader) == [*left, 99]
            reader.close()
            lane.close()

    @pytest.mark.parametrize("damage", [{0: FILE_OF_TWO - 1}, {1: 0, 2: 0}, {1: 0}, {0: 0}])
    def test_is_no_excuse_in_the_same_boot(self, damage: dict[int, int], lane_path: Path) -> None:
        for index, size in damage.items():
            os.truncate(segment_files(lane_path)[index], size)
        with pytest.raises(LaneCorruptError):
            open_lane(lane_path.parent)

    def test_does_not_explain_a_flipped_bit_in_an_earlier_segment(self, lane_path: Path) -> None:
        path = segment_files(lane_path)[1]
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        lane = open_lane(lane_path.parent, machine=REBOOTED)
        reader = LaneReader(lane)
        assert numbers(reader) == [0, 1, 2]
        with pytest.raises(LaneCorruptError, match=rf"{path}: byte {HEADER_BYTES + FRAME_BYTES}: CRC mismatch"):
            reader.read(max_messages=1)
        reader.close()
        lane.close()

    def test_of_the_newest_segment_gives_no_offset_out_again(self, lane_path: Path) -> None:
        # A machine whose clock starts at the same time at each boot.
        used: list[int] = []
        for boot in range(3):
            lane = open_lane(lane_path.parent, machine=replace(MACHINE, boot_id=bytes([boot + 1]) * 16))
            used += fill(lane, 3)
            lane.close()
            os.truncate(lane.last.path, HEADER_BYTES)
        assert used == sorted(set(used))

    def test_lost_header_before_frames_is_damage_in_the_same_boot(self, lane_path: Path) -> None:
        path = segment_files(lane_path)[2]
        path.write_bytes(bytes(600) + frame_of(1))
        with pytest.raises(LaneCorruptError, match=f"{path}: byte 0: no segment"):
            open_lane(lane_path.parent)
        assert reopen_and_read(lane_path, REBOOTED) == [0, 1, 2, 3]


def test_a_payload_of_headers_is_not_read_for_hours(lane_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each of them announces a frame up to the end of the file.
    count = 4000
    headers = b"".join(struct.pack("<II4B16x", (count - number) * 28 - 8, 0, 1, 1, 0, 0) for number in range(count))
    path = segment_of(lane_path)
    path.write_bytes(path.read_bytes() + b"\xff" * 40 + headers)
    monkeypatch.setattr(codec, "MAX_SEARCH_BYTES", 10 * len(headers))
    judge = Mock(wraps=codec.frame_end)
    monkeypatch.setattr(codec, "frame_end", judge)
    assert reopen_and_read(lane_path, REBOOTED) == list(range(COUNT))
    assert 10 <= judge.call_count < 20
