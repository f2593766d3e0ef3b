"""The hook's writing end of a lane: what it writes the spool in Python reads, and what it refuses."""

import os
import resource
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mq2mqtt.errors import LaneLockedError
from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.frame import Frame, decode_frames, encode_publish
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.spool.segment import HEADER_BYTES
from tests.unit.hook.driver import Driver
from tests.unit.hook.twins import contents
from tests.unit.spool.lanes import MACHINE, REBOOTED, START_US, fill, frame_of, numbers, open_lane, segment_files

FRAME_BYTES = len(frame_of(0, payload_bytes=100))


@pytest.fixture
def lane_path(tmp_path: Path) -> Path:
    return tmp_path / "rule-a"


def decoded(frame: bytes) -> Frame:
    (found,), _ = decode_frames(frame, 0, max_frames=1)
    return found


def message(number: int, *, payload_bytes: int = 0) -> Frame:
    return decoded(frame_of(number, payload_bytes=payload_bytes))


def test_both_write_the_same_lane(tmp_path: Path, driver: Driver) -> None:
    # Segments of two messages, one message in a segment of its own, over a restart.
    sizes = [100, 100, 100, 900, 100, 1, 100]
    max_bytes = 8 * (HEADER_BYTES + 2 * FRAME_BYTES)
    lane = open_lane(tmp_path / "python", max_bytes=max_bytes)
    (tmp_path / "c").mkdir()
    driver.be(MACHINE)
    for part in (sizes, sizes[:2]):
        assert not isinstance(driver.open(tmp_path / "c" / "rule-a", max_bytes=max_bytes), str)
        for number, size in enumerate(part):
            fill(lane, 1, first=number, payload_bytes=size)
            assert driver.append(message(number, payload_bytes=size)) == (lane.next_offset, lane.unsent_bytes)
        driver.close_lane()
    lane.close()
    assert contents(tmp_path / "c" / "rule-a") == contents(lane.path)
    assert len(segment_files(lane.path)) > 4


def test_one_takes_over_from_the_other(lane_path: Path, driver: Driver) -> None:
    # The boundary between segments falls into the hands of each of them.
    max_bytes = 8 * (HEADER_BYTES + 3 * FRAME_BYTES)
    driver.be(MACHINE)
    for turn in range(6):
        driver.open(lane_path, max_bytes=max_bytes)
        assert not isinstance(driver.append(message(2 * turn, payload_bytes=100)), str)
        driver.close_lane()
        lane = open_lane(lane_path.parent, max_bytes=max_bytes)
        fill(lane, 1, first=2 * turn + 1, payload_bytes=100)
        lane.close()
    lane = open_lane(lane_path.parent, max_bytes=max_bytes)
    reader = LaneReader(lane)
    entries = reader.read(max_messages=99)
    assert [entry.frame.accepted_us - START_US for entry in entries] == list(range(12))
    assert [entry.offset for entry in entries] == list(range(START_US, START_US + 12))
    reader.close()
    lane.close()


@pytest.mark.parametrize(("spool_mode", "directory", "file"), [(0o2770, 0o2770, 0o660), (0o700, 0o700, 0o600)])
def test_files_are_as_open_as_the_spool(
    spool_mode: int, directory: int, file: int, lane_path: Path, driver: Driver
) -> None:
    lane_path.parent.chmod(spool_mode)
    driver.be(MACHINE)
    driver.open(lane_path)
    driver.close_lane()
    assert stat.S_IMODE(lane_path.stat().st_mode) == directory
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in lane_path.iterdir()} == {
        "00001700000000000000.seg": file,
        "writer.lock": file,
    }


def test_there_is_one_writer(lane_path: Path, driver: Driver, program: Path) -> None:
    lane = open_lane(lane_path.parent)
    driver.be(MACHINE)
    assert f"process {os.getpid()} is already its writer" in str(driver.open(lane_path))
    lane.close()
    assert not isinstance(driver.open(lane_path), str)
    with pytest.raises(LaneLockedError):
        open_lane(lane_path.parent)
    with Driver(program) as second:
        second.be(MACHINE)
        assert "is already its writer" in str(second.open(lane_path))
    driver.close_lane()


def test_a_full_lane_takes_again_when_its_reader_has_settled(lane_path: Path, driver: Driver) -> None:
    max_bytes = 20 * FRAME_BYTES
    driver.be(MACHINE)
    driver.open(lane_path, max_bytes=max_bytes)
    for number in range(20):
        assert not isinstance(driver.append(message(number, payload_bytes=100)), str)
    full = driver.append(message(20, payload_bytes=100))
    assert isinstance(full, str)
    assert full.startswith(f"full lane {lane_path}: {max_bytes} bytes are unsent, max_bytes is {max_bytes}")
    driver.close_lane()
    # Nothing was written of the one that was refused; a start knows the lane as full too.
    driver.open(lane_path, max_bytes=max_bytes)
    assert driver.trouble() == "none"
    assert str(driver.append(message(20, payload_bytes=100))).startswith("full")
    assert "bytes are unsent" in driver.trouble()
    settle_as_the_sidecar_does(lane_path, 7)
    assert driver.trouble() == "none"
    answer = driver.append(message(20, payload_bytes=100))
    assert answer == (START_US + 21, 14 * FRAME_BYTES)
    driver.close_lane()


def settle_as_the_sidecar_does(lane_path: Path, count: int) -> None:
    """Move the cursor while the hook has the lane open; segments behind it go."""
    copy = lane_path.parent / "copy" / lane_path.name
    subprocess.run(["cp", "-r", lane_path, copy.parent.parent / "copy-of-it"], check=True)
    copy.parent.mkdir()
    (copy.parent.parent / "copy-of-it").rename(copy)
    lane = open_lane(copy.parent)
    reader = LaneReader(lane)
    reader.read(max_messages=count)
    reader.settle_to(START_US + count)
    reader.close()
    lane.close()
    (lane_path / "cursor").write_bytes((copy / "cursor").read_bytes())
    for path in segment_files(lane_path):
        if not (copy / path.name).exists():
            path.unlink()


def test_a_cursor_that_cannot_be_read_is_in_the_text(lane_path: Path, driver: Driver) -> None:
    driver.be(MACHINE)
    driver.open(lane_path, max_bytes=1000)
    (lane_path / "cursor").symlink_to("cursor")
    full = str(driver.many(99, 100))
    assert full.startswith("full")
    assert full.endswith("what is sent cannot be known, cursor: Too many levels of symbolic links")


@pytest.mark.parametrize("durability", ["process", "power"])
def test_many_messages(durability: str, lane_path: Path, driver: Driver) -> None:
    driver.be(MACHINE)
    driver.open(lane_path, max_bytes=1 << 18, durability=durability)
    count = 1000
    assert not isinstance(driver.many(count, 100), str)
    driver.close_lane()
    assert len(segment_files(lane_path)) == 5
    lane = open_lane(lane_path.parent, max_bytes=1 << 18)
    reader = LaneReader(lane)
    assert numbers(reader) == list(range(count))
    reader.close()
    lane.close()


def test_a_message_longer_than_the_lane_never_fits(lane_path: Path, driver: Driver) -> None:
    driver.be(MACHINE)
    driver.open(lane_path, max_bytes=1000)
    assert str(driver.append(message(1, payload_bytes=1000))).startswith("large")
    long_id = decoded(encode_publish(MqttMessage("t", b"x", client_id="c" * 971), accepted_us=1))
    assert str(driver.append(long_id)).startswith("large")
    assert not isinstance(driver.append(message(1, payload_bytes=800)), str)
    driver.close_lane()


def test_a_write_cut_short_is_taken_back(lane_path: Path, program: Path) -> None:
    # A limit on file sizes cuts a write as a full disk does.
    limit = HEADER_BYTES + 3 * FRAME_BYTES + 20
    with Driver(program) as driver:
        driver.be(MACHINE)
        driver.open(lane_path)
        resource.prlimit(driver.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for number in range(3):
            assert not isinstance(driver.append(message(number, payload_bytes=100)), str)
        assert str(driver.append(message(3, payload_bytes=100))).startswith("full")
        assert segment_files(lane_path)[0].stat().st_size == HEADER_BYTES + 3 * FRAME_BYTES
        resource.prlimit(driver.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert driver.append(message(3, payload_bytes=100)) == (START_US + 4, 4 * FRAME_BYTES)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a file system")
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def test_a_full_disk_refuses_and_takes_again(small_disk: Path, driver: Driver) -> None:
    lane_path = small_disk / "rule-a"
    driver.be(MACHINE)
    driver.open(lane_path, durability="power")
    refused = str(driver.many(10_000, 100))
    assert refused.startswith("full")
    assert "No space left on device" in refused
    assert "No space left on device" in driver.trouble()
    driver.close_lane()
    # After a restart of the machine too: the new segment has to wait.
    driver.be(REBOOTED)
    assert not isinstance(driver.open(lane_path), str)
    assert str(driver.append(message(0))).startswith("full")
    taken = sum(path.stat().st_size for path in segment_files(lane_path))
    assert taken > 40_000
    assert "No space left on device" in driver.trouble()
    subprocess.run(["mount", "-o", "remount,size=128k", small_disk], check=True)
    assert driver.trouble() == "none"
    assert not isinstance(driver.append(message(99)), str)
    driver.close_lane()
    lane = open_lane(lane_path.parent, machine=REBOOTED)
    reader = LaneReader(lane)
    found = numbers(reader)
    assert found == [*range(len(found) - 1), 99]
    reader.close()
    lane.close()
