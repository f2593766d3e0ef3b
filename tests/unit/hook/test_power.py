"""`durability: power` in the hook: a sync before each acknowledgement, or by a thread every so often."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mq2mqtt.spool.reader import LaneReader
from tests.unit.hook.driver import Driver, build
from tests.unit.spool.lanes import MACHINE, numbers, open_lane, segment_files
from tests.waiting import until

MAX_BYTES = 1 << 18


@pytest.fixture(scope="module")
def race_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ThreadSanitizer: what two threads touch without a lock ends it."""
    return build("race", tmp_path_factory.mktemp("race")) / "race" / "driver"


@pytest.fixture
def racing(race_program: Path) -> Iterator[Driver]:
    with Driver(race_program) as running:
        yield running


def syncs(driver: Driver) -> int:
    return int(driver.ask("syncs"))


def test_a_thread_syncs_what_was_written_over_many_segments(tmp_path: Path, racing: Driver) -> None:
    racing.be(MACHINE)
    racing.open(tmp_path / "rule-a", max_bytes=MAX_BYTES, durability="1")
    for _ in range(10):
        assert not isinstance(racing.many(100, 100), str)
    racing.close_lane()
    assert len(segment_files(tmp_path / "rule-a")) == 5
    lane = open_lane(tmp_path, max_bytes=MAX_BYTES)
    reader = LaneReader(lane)
    assert numbers(reader) == list(range(100)) * 10
    reader.close()
    lane.close()


async def test_the_thread_leaves_a_file_alone_that_nobody_writes(tmp_path: Path, driver: Driver) -> None:
    driver.be(MACHINE)
    driver.open(tmp_path / "rule-a", durability="1")
    opened = syncs(driver)
    driver.many(1, 100)
    await until(lambda: syncs(driver) > opened, what="the thread's sync")
    driver.close_lane()
    # None for the end: all was on the disk.
    assert syncs(driver) == opened + 1


def test_without_a_thread_each_message_is_synced(tmp_path: Path, driver: Driver) -> None:
    driver.be(MACHINE)
    driver.open(tmp_path / "rule-a", durability="power")
    opened = syncs(driver)
    driver.many(7, 100)
    assert syncs(driver) == opened + 7


def test_what_was_written_is_synced_when_the_lane_is_closed(tmp_path: Path, driver: Driver) -> None:
    driver.be(MACHINE)
    driver.open(tmp_path / "rule-a", durability="600000")
    opened = syncs(driver)
    driver.many(7, 100)
    assert syncs(driver) == opened
    driver.close_lane()
    assert syncs(driver) == opened + 1


def test_after_a_failed_sync_nothing_is_taken(tmp_path: Path, driver: Driver) -> None:
    driver.be(MACHINE)
    driver.open(tmp_path / "rule-a", durability="power")
    driver.ask("break")
    failure = f"lane {tmp_path}/rule-a: fdatasync failed, restart the broker: Input/output error"
    assert driver.many(1, 100) == f"failed {failure}"
    assert driver.many(1, 100) == f"failed {failure}"
    assert driver.trouble() == failure


async def test_after_a_failed_sync_of_the_thread_nothing_is_taken(tmp_path: Path, racing: Driver) -> None:
    racing.be(MACHINE)
    racing.open(tmp_path / "rule-a", durability="1")
    racing.ask("break")
    racing.many(1, 100)
    failure = f"lane {tmp_path}/rule-a: fdatasync failed, restart the broker: Input/output error"
    # Known before anybody publishes again.
    await until(lambda: racing.trouble() == failure, what="the failure")
    assert racing.many(1, 100) == f"failed {failure}"
