"""`durability: power`: who waits is answered only by an fdatasync that began after the append."""

import asyncio
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from mq2mqtt.errors import LaneError
from mq2mqtt.spool.lane import Lane
from tests.unit.spool.lanes import MACHINE, fill, frame_of, open_lane

FRAME_BYTES = len(frame_of(0, payload_bytes=100))


class Disk:
    """An fdatasync that waits to be let go, one call after another, and records the sizes it saw."""

    def __init__(self, *, gated: bool = True) -> None:
        self.began = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.sizes: list[int] = []
        self.error: OSError | None = None
        self.gated = gated

    def sync(self, descriptor: int) -> None:
        self.sizes.append(os.fstat(descriptor).st_size)
        self.began.release()
        if self.gated and not self.go.acquire(timeout=30):
            raise TimeoutError
        if self.error is not None:
            raise self.error
        os.fdatasync(descriptor)

    async def wait_for_a_round(self) -> None:
        assert await asyncio.to_thread(self.began.acquire, timeout=30)


def open_power(spool: Path, disk: Disk, *, max_bytes: int = 1 << 20) -> Lane:
    return open_lane(spool, max_bytes=max_bytes, durability="power", machine=replace(MACHINE, sync=disk.sync))


def wait_for(lane: Lane) -> asyncio.Future[None]:
    future = lane.durable()
    assert future is not None
    return future


def is_open(path: Path) -> bool:
    return path in {link.resolve() for link in Path("/proc/self/fd").iterdir()}


async def test_process_durability_has_nothing_to_wait_for(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    fill(lane, 1)
    assert lane.durable() is None
    lane.close()


async def test_a_round_answers_only_those_who_came_before_it_began(tmp_path: Path) -> None:
    disk = Disk()
    lane = open_power(tmp_path, disk)
    fill(lane, 1)
    first = wait_for(lane)
    await disk.wait_for_a_round()
    fill(lane, 1, first=1)
    late = [wait_for(lane)]
    fill(lane, 1, first=2)
    late.append(wait_for(lane))
    assert not first.done()
    disk.go.release()
    await first
    assert not any(future.done() for future in late)
    await disk.wait_for_a_round()
    disk.go.release()
    await asyncio.gather(*late)
    # The second round saw both appends, and one fdatasync served both.
    assert disk.sizes[1:] == [lane.last.size]
    assert disk.sizes[0] < disk.sizes[1]
    assert lane.durable() is None
    lane.close()


async def test_cancelling_one_waiter_leaves_the_others(tmp_path: Path) -> None:
    disk = Disk()
    lane = open_power(tmp_path, disk)
    fill(lane, 1)
    futures = [wait_for(lane) for _ in range(3)]
    await disk.wait_for_a_round()
    futures[1].cancel()
    disk.go.release()
    await asyncio.gather(futures[0], futures[2])
    lane.close()


async def test_every_segment_that_was_written_is_synced(tmp_path: Path) -> None:
    disk = Disk(gated=False)
    lane = open_power(tmp_path, disk, max_bytes=80 * FRAME_BYTES)
    fill(lane, 35, payload_bytes=100)
    await wait_for(lane)
    assert sorted(disk.sizes) == sorted(segment.size for segment in lane.segments())
    assert len(disk.sizes) == 4
    fill(lane, 1, first=35, payload_bytes=100)
    await wait_for(lane)
    # Finished segments are synced once.
    assert disk.sizes[4:] == [lane.last.size]
    assert [is_open(segment.path) for segment in lane.segments()] == [False, False, False, True]
    lane.close()


async def test_appends_between_rounds_while_segments_change(tmp_path: Path) -> None:
    disk = Disk(gated=False)
    lane = open_power(tmp_path, disk, max_bytes=400 * FRAME_BYTES)
    answered = 0

    async def publish(number: int) -> None:
        nonlocal answered
        fill(lane, 1, first=number, payload_bytes=100)
        future = lane.durable()
        if future is not None:
            await future
        answered += 1
        await asyncio.sleep(0)

    for start in range(0, 360, 20):
        await asyncio.gather(*map(publish, range(start, start + 20)))
    assert answered == 360
    assert len(disk.sizes) < 100
    lane.close()


async def test_a_failed_fdatasync_fails_the_waiters_and_the_lane(tmp_path: Path) -> None:
    disk = Disk()
    lane = open_power(tmp_path, disk)
    fill(lane, 1)
    first = wait_for(lane)
    await disk.wait_for_a_round()
    fill(lane, 1, first=1)
    second = wait_for(lane)
    disk.error = OSError(5, "Input/output error")
    disk.go.release()
    for future in (first, second):
        with pytest.raises(LaneError, match="fdatasync failed, restart the bridge: Input/output error"):
            await future
    # It never says yes again, whatever a second fdatasync would say.
    disk.error = None
    disk.gated = False
    with pytest.raises(LaneError, match="fdatasync failed"):
        fill(lane, 1, first=2)
    with pytest.raises(LaneError, match="fdatasync failed"):
        await wait_for(lane)
    lane.close()


async def test_closing_answers_who_still_waits(tmp_path: Path) -> None:
    disk = Disk()
    lane = open_power(tmp_path, disk)
    fill(lane, 1)
    first = wait_for(lane)
    await disk.wait_for_a_round()
    fill(lane, 1, first=1)
    second = wait_for(lane)
    disk.gated = False
    disk.go.release()
    lane.close()
    await asyncio.gather(first, second)
    assert disk.sizes[-1] == lane.last.size
    lane.close()
    await asyncio.sleep(0)


async def test_closing_says_when_the_last_fdatasync_fails(tmp_path: Path) -> None:
    disk = Disk(gated=False)
    lane = open_power(tmp_path, disk)
    fill(lane, 1)
    future = wait_for(lane)
    disk.error = OSError(5, "Input/output error")
    lane.close()
    with pytest.raises(LaneError, match="last fdatasync failed"):
        await future


async def test_a_reopened_lane_syncs_what_it_appends(tmp_path: Path) -> None:
    disk = Disk(gated=False)
    lane = open_power(tmp_path, disk)
    fill(lane, 2)
    await wait_for(lane)
    lane.close()
    lane = open_power(tmp_path, disk)
    fill(lane, 1, first=2)
    await wait_for(lane)
    assert disk.sizes[-1] == lane.last.size
    lane.close()
