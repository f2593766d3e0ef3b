import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mq2mqtt.errors import FrameTooLargeError, LaneCorruptError, LaneError, LaneFullError, LaneLockedError
from mq2mqtt.spool.lane import MAX_SEGMENT_BYTES, Durability, Lane
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.spool.segment import HEADER_BYTES, SegmentHeader
from tests.unit.spool.lanes import MACHINE, REBOOTED, START_US, fill, frame_of, numbers, open_lane, segment_files

HOLDER = """
import pathlib, sys
from mq2mqtt.spool.lane import Lane

lane = Lane.open(pathlib.Path(sys.argv[1]), max_bytes=1000, target="t")
print("held", flush=True)
sys.stdin.read()
"""
FRAME_BYTES = len(frame_of(0, payload_bytes=100))


def test_the_first_offset_is_the_creation_time_and_each_next_one_more(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    assert fill(lane, 3) == [START_US, START_US + 1, START_US + 2]
    assert lane.next_offset == START_US + 3
    lane.close()


def test_the_directory_is_private_and_says_whose_it_is(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    assert lane.path.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in lane.path.iterdir()} == {0o600}
    assert json.loads((lane.path / "lane.json").read_bytes()) == {
        "version": 1,
        "rule": "rule-a",
        "target": "mq_a",
        "created_us": START_US,
    }
    lane.close()


def test_a_new_target_is_noted(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    lane.retarget("mq_b")
    assert json.loads((lane.path / "lane.json").read_bytes())["target"] == "mq_b"
    lane.close()
    lane = Lane.open(lane.path, max_bytes=1000, target="mq_c", machine=MACHINE)
    assert json.loads((lane.path / "lane.json").read_bytes())["target"] == "mq_c"
    assert lane.info.created_us == START_US
    lane.close()


def test_segments_are_an_eighth_of_the_lane_and_at_most_64_mib(tmp_path: Path) -> None:
    lane = open_lane(tmp_path, max_bytes=80 * FRAME_BYTES)
    fill(lane, 40, payload_bytes=100)
    files = segment_files(lane.path)
    assert len(files) == 5
    assert all(path.stat().st_size <= 10 * FRAME_BYTES for path in files)
    headers = [SegmentHeader.unpack(path.read_bytes(), path) for path in files]
    assert [header.previous_bytes for header in headers[1:]] == [path.stat().st_size for path in files[:-1]]
    assert [header.previous_end for header in headers[1:]] == [header.base for header in headers[1:]]
    lane.close()
    assert MAX_SEGMENT_BYTES == 64 * 1024 * 1024


def test_a_frame_longer_than_a_segment_gets_its_own(tmp_path: Path) -> None:
    lane = open_lane(tmp_path, max_bytes=8000)
    fill(lane, 1)
    fill(lane, 2, first=1, payload_bytes=3000)
    fill(lane, 1, first=3)
    reader = LaneReader(lane)
    assert numbers(reader) == [0, 1, 2, 3]
    assert len(segment_files(lane.path)) == 4
    reader.close()
    lane.close()


def test_a_frame_longer_than_the_lane_never_fits(tmp_path: Path) -> None:
    lane = open_lane(tmp_path, max_bytes=1000)
    with pytest.raises(FrameTooLargeError, match=r"raise spool\.max_bytes"):
        lane.append(frame_of(0, payload_bytes=1000))
    assert not FrameTooLargeError.retriable
    assert not lane.full
    fill(lane, 1)
    lane.close()


def test_a_full_lane_refuses_and_goes_on_when_something_is_settled(tmp_path: Path) -> None:
    lane = open_lane(tmp_path, max_bytes=10 * FRAME_BYTES)
    reader = LaneReader(lane)
    told: list[int] = []
    lane.on_space = lambda: told.extend(fill(lane, 1, first=10, payload_bytes=100))
    fill(lane, 10, payload_bytes=100)
    with pytest.raises(LaneFullError, match="max_bytes"):
        lane.append(frame_of(10, payload_bytes=100))
    assert lane.full
    assert (lane.messages, lane.unsent_bytes) == (10, 10 * FRAME_BYTES)
    entries = reader.read(max_messages=4)
    reader.settle([entries[1].offset])
    assert told == []
    reader.settle([entries[0].offset])
    assert told == [START_US + 10]
    assert not lane.full
    assert (lane.messages, lane.unsent_bytes) == (9, 9 * FRAME_BYTES)
    assert numbers(reader) == [4, 5, 6, 7, 8, 9, 10]
    reader.close()
    lane.close()


def test_the_oldest_time_follows_the_head(tmp_path: Path) -> None:
    lane = open_lane(tmp_path, max_bytes=16 * FRAME_BYTES)
    reader = LaneReader(lane)
    assert lane.oldest_us is None
    fill(lane, 5, payload_bytes=100)
    for number, entry in enumerate(reader.read(max_messages=10)):
        assert lane.oldest_us == START_US + number
        assert lane.oldest_us == START_US + number
        reader.settle([entry.offset])
    assert lane.oldest_us is None
    fill(lane, 6, first=5, payload_bytes=100)
    assert lane.oldest_us == START_US + 5
    reader.close()
    lane.close()


def test_a_second_writer_and_a_second_reader_are_told_who_holds_the_lane(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    reader = LaneReader(lane)
    with pytest.raises(LaneLockedError, match=rf"rule-a: process {os.getpid()} is already its writer; .*spool\.path"):
        open_lane(tmp_path)
    with pytest.raises(LaneLockedError, match="already its reader"):
        LaneReader(lane)
    fill(lane, 1)
    lane.close()
    reader.close()
    open_lane(tmp_path).close()


def test_another_process_is_locked_out_until_the_holder_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLDER,
            str(tmp_path / "rule-a"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder.stdin, holder.stdout:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LaneLockedError, match=str(holder.pid)):
            open_lane(tmp_path)
        holder.kill()
        holder.wait()
    open_lane(tmp_path).close()


def test_appending_to_a_closed_lane_is_an_error(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    lane.close()
    lane.close()
    with pytest.raises(LaneError, match="is closed"):
        fill(lane, 1)
    with pytest.raises(LaneError, match="is closed"):
        fill(lane, 1, payload_bytes=lane.max_bytes)


def test_max_bytes_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        open_lane(tmp_path, max_bytes=0)


class TestOffsetsAreNeverUsedTwice:
    def test_when_the_process_restarts(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        fill(lane, 3)
        lane.close()
        # The clock went backwards meanwhile.
        lane = open_lane(tmp_path, machine=replace(MACHINE, now_us=lambda: START_US - 1_000_000))
        assert fill(lane, 1) == [START_US + 3]
        lane.close()

    @pytest.mark.parametrize("now_us", [START_US + 10**12, START_US - 10**12])
    def test_when_the_machine_restarts_and_power_took_the_newest(self, now_us: int, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        used = fill(lane, 10)
        lane.close()
        size = lane.last.size - 3 * len(frame_of(0))
        os.truncate(lane.last.path, size)
        lane = open_lane(tmp_path, machine=replace(REBOOTED, now_us=lambda: now_us))
        assert lane.messages == 7
        new = fill(lane, 2, first=10)
        assert min(new) > max(used)
        assert new[0] >= now_us
        reader = LaneReader(lane)
        entries = reader.read(max_messages=100)
        assert [entry.offset for entry in entries] == used[:7] + new
        reader.settle_to(new[0])
        assert (reader.cursor, reader.ahead, lane.messages) == (new[0], 2, 2)
        reader.settle([new[1]])
        reader.settle([new[0]])
        assert (reader.cursor, reader.ahead, lane.messages) == (new[1] + 1, 0, 0)
        reader.close()
        lane.close()

    def test_when_power_took_what_the_cursor_has_passed(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        used = fill(lane, 10)
        reader = LaneReader(lane)
        reader.read(max_messages=9)
        reader.settle_to(used[8])
        reader.close()
        lane.close()
        os.truncate(lane.last.path, lane.last.size - 5 * len(frame_of(0)))
        for machine in (REBOOTED, MACHINE):
            lane = open_lane(tmp_path, machine=machine)
            assert lane.messages == 0
            assert lane.next_offset >= used[8]
            reader = LaneReader(lane)
            assert fill(lane, 1, first=10)[0] > used[7]
            assert numbers(reader) == [10]
            reader.settle_to(reader.position)
            reader.close()
            lane.close()

    def test_when_every_segment_was_removed(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        used = fill(lane, 5)
        reader = LaneReader(lane)
        reader.read(max_messages=2)
        reader.settle_to(used[2])
        reader.close()
        lane.close()
        lane.last.path.unlink()
        lane = open_lane(tmp_path)
        assert fill(lane, 1)[0] > used[-1]
        lane.close()


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size`: a way to have real writes fail or be cut."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestDiskFull:
    @pytest.mark.parametrize("missing", [1, FRAME_BYTES - 1, FRAME_BYTES])
    def test_a_frame_that_does_not_fit_leaves_no_trace(self, missing: int, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        reader = LaneReader(lane)
        fill(lane, 3, payload_bytes=100)
        size = lane.last.size
        with file_size_limit(size + FRAME_BYTES - missing):
            for _ in range(2):
                with pytest.raises(LaneFullError):
                    lane.append(frame_of(3, payload_bytes=100))
                assert lane.last.path.stat().st_size == size
        assert lane.full
        assert numbers(reader) == [0, 1, 2]
        fill(lane, 2, first=3, payload_bytes=100)
        assert not lane.full
        assert numbers(reader) == [3, 4]
        reader.close()
        lane.close()
        lane = open_lane(tmp_path)
        assert lane.messages == 5
        lane.close()

    def test_a_segment_that_cannot_begin_leaves_no_trace(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path, max_bytes=16 * FRAME_BYTES)
        fill(lane, 1, payload_bytes=100)
        before = segment_files(lane.path)
        for limit in (0, HEADER_BYTES - 1):
            with file_size_limit(limit), pytest.raises(LaneFullError):
                lane.append(frame_of(1, payload_bytes=100))
            assert segment_files(lane.path) == before
        fill(lane, 1, first=1, payload_bytes=100)
        reader = LaneReader(lane)
        assert numbers(reader) == [0, 1]
        reader.close()
        lane.close()

    def test_a_lane_can_be_opened_and_drained_after_a_restart_of_the_machine(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        fill(lane, 3, payload_bytes=100)
        lane.close()
        with file_size_limit(0):
            lane = open_lane(tmp_path, machine=REBOOTED)
            reader = LaneReader(lane)
            assert numbers(reader) == [0, 1, 2]
            # The cursor cannot be stored now; settling goes on.
            reader.settle_to(reader.position)
            assert lane.messages == 0
            with pytest.raises(LaneFullError):
                lane.append(frame_of(3, payload_bytes=100))
        assert fill(lane, 1, first=3, payload_bytes=100)[0] > START_US + 3
        assert numbers(reader) == [3]
        reader.settle_to(reader.position)
        assert len(segment_files(lane.path)) == 1
        reader.close()
        lane.close()

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
    def test_a_really_full_file_system(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot mount a tmpfs: {error}")
        try:
            self.fill_and_drain(disk)
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def fill_and_drain(self, disk: Path) -> None:
        lane = open_lane(disk, max_bytes=400_000)
        reader = LaneReader(lane)
        accepted: list[int] = []
        with contextlib.suppress(LaneFullError):
            for number in range(1000):
                lane.append(frame_of(number, payload_bytes=1000))
                accepted.append(number)
        assert lane.full
        assert 100 < len(accepted) < 256
        told: list[bool] = []
        lane.on_space = lambda: told.append(True)
        read = numbers(reader)
        assert read == accepted
        reader.settle_to(reader.position)
        assert told
        count = len(accepted)
        fill(lane, 50, first=count, payload_bytes=1000)
        assert numbers(reader) == list(range(count, count + 50))
        reader.close()
        lane.close()

    def test_a_description_that_cannot_be_written_leaves_the_old_one(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        with file_size_limit(0), pytest.raises(LaneError, match=r"cannot write .*lane\.json"):
            lane.retarget("mq_b")
        assert json.loads((lane.path / "lane.json").read_bytes())["target"] == lane.info.target == "mq_a"
        assert not list(lane.path.glob("*.tmp"))
        lane.close()

    @pytest.mark.parametrize("durability", ["process", "power"])
    async def test_a_cut_write_that_cannot_be_taken_back(self, durability: Durability, tmp_path: Path) -> None:
        lane = open_lane(tmp_path, durability=durability)
        fill(lane, 3)
        # A pipe takes a part of a long write, and cannot be truncated.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        os.dup2(write_end, lane._descriptor)  # noqa: SLF001
        os.close(write_end)
        with pytest.raises(LaneFullError):
            lane.append(frame_of(3, payload_bytes=100_000))
        # The next append opens the file anew.
        with file_size_limit(1), pytest.raises(LaneFullError):
            lane.append(frame_of(3))
        fill(lane, 1, first=3)
        reader = LaneReader(lane)
        assert numbers(reader) == [0, 1, 2, 3]
        reader.close()
        lane.close()
        os.close(read_end)
        lane = open_lane(tmp_path)
        assert lane.messages == 4
        lane.close()


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    # Somebody closes the file under us.
    os.close(lane._descriptor)  # noqa: SLF001
    with pytest.raises(LaneError) as caught:
        lane.append(frame_of(0))
    assert not isinstance(caught.value, LaneFullError)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EBADF
    lane._descriptor = -1  # noqa: SLF001
    lane.close()


class TestDirectoryThatIsNotALane:
    def test_foreign_file(self, tmp_path: Path) -> None:
        open_lane(tmp_path).close()
        (tmp_path / "rule-a/notes.txt").write_text("mine")
        with pytest.raises(LaneCorruptError, match=r"rule-a/notes\.txt: no file of a lane; move it away"):
            open_lane(tmp_path)

    def test_foreign_segment(self, tmp_path: Path) -> None:
        open_lane(tmp_path).close()
        foreign = tmp_path / "rule-a" / f"{START_US + 9:020d}.seg"
        foreign.write_bytes(b"#!/bin/sh\n" * 20)
        with pytest.raises(LaneCorruptError, match=rf"{foreign}: byte 0: no segment"):
            open_lane(tmp_path)

    def test_a_segment_of_another_lane(self, tmp_path: Path) -> None:
        open_lane(tmp_path).close()
        other = open_lane(tmp_path / "other", machine=replace(MACHINE, now_us=lambda: START_US + 5))
        other.close()
        other.last.path.rename(tmp_path / "rule-a" / other.last.path.name)
        with pytest.raises(LaneCorruptError, match="a segment of another lane"):
            open_lane(tmp_path)

    @pytest.mark.parametrize(
        ("content", "error"),
        [
            (b"{", "not a lane's description"),
            (b"[]", "not a lane's description"),
            (b"{}", "not a lane's description"),
            (b"[" * 100_000, "not a lane's description"),
            (b'{"version": 1, "rule": "rule-a", "target": "t", "created_us": "1"}', "not a lane's description"),
            (b'{"version": 1, "rule": "rule-a", "target": "t", "created_us": 1e300}', "not a lane's description"),
            (b'{"version": 1, "rule": "rule-a", "target": 1, "created_us": 1}', "not a lane's description"),
            (b'{"version": 2, "rule": "rule-a", "target": "t", "created_us": 1}', "lane version 2"),
            (b'{"version": 1, "rule": "rule-b", "target": "t", "created_us": 1}', "the lane of rule rule-b"),
        ],
    )
    def test_a_wrong_description(self, content: bytes, error: str, tmp_path: Path) -> None:
        open_lane(tmp_path).close()
        (tmp_path / "rule-a/lane.json").write_bytes(content)
        with pytest.raises(LaneError, match=rf"rule-a/lane\.json: .*{error}"):
            open_lane(tmp_path)

    @pytest.mark.parametrize("content", [None, b"", bytes(100)], ids=["missing", "empty", "zeros"])
    def test_a_lost_description_is_made_anew(self, content: bytes | None, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        fill(lane, 3)
        lane.close()
        (lane.path / "lane.json").unlink()
        if content is not None:
            (lane.path / "lane.json").write_bytes(content)
        lane = open_lane(tmp_path, machine=replace(MACHINE, now_us=lambda: START_US + 99))
        assert (lane.info.created_us, lane.messages) == (START_US, 3)
        assert json.loads((lane.path / "lane.json").read_bytes())["created_us"] == START_US
        lane.close()

    def test_the_path_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "rule-a").write_text("")
        with pytest.raises(LaneError, match=r"cannot create .*rule-a"):
            open_lane(tmp_path)

    def test_what_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        lane.close()
        (lane.path / "cursor").mkdir()
        with pytest.raises(LaneError, match=r"cannot read .*cursor: Is a directory"):
            open_lane(tmp_path)

    def test_no_permission(self, tmp_path: Path) -> None:
        lane = open_lane(tmp_path)
        lane.close()
        lane.last.path.chmod(0)
        user = os.geteuid()
        if user == 0:
            # Root may read everything: be nobody for a moment.
            os.seteuid(65534)
        try:
            with pytest.raises(LaneError, match=r"cannot .*rule-a.*: Permission denied"):
                open_lane(tmp_path)
        finally:
            os.seteuid(user)
