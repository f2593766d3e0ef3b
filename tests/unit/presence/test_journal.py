"""The journal's file: what a start finds in it, what happens when it cannot be written, and how it stays short."""

import itertools
import os
import shutil
import threading
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from loguru import logger

from mq2mqtt.errors import LaneError
from mq2mqtt.message import ClientEvent, ClientEventType
from mq2mqtt.presence import Connection, Journal, Presence
from mq2mqtt.presence.records import encode_record
from mq2mqtt.presence.state import Came, Went
from mq2mqtt.rules import RuleSet, StatusRule
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.machine import Machine
from mq2mqtt.telemetry import Direction, RuleTelemetry
from tests.unit.spool.disk import Disk
from tests.waiting import until

A = "GID_dev@@@a"


def event(kind: ClientEventType, client_id: str = A, channel: str = "c1") -> ClientEvent:
    return ClientEvent(kind, client_id, channel, "192.0.2.1:1", 1)


def came(number: int) -> Came:
    return Came(Connection(f"c{number}", f"ch{number}", "ip", 1))


class Status:
    """Presence with the lane of one status rule."""

    def __init__(self, spool: Path, journal: Journal) -> None:
        self.presence = Presence(journal, node="n1")
        self.presence.apply(RuleSet([StatusRule(id="presence", type="status", source="GID_dev", target="t")]))
        self.lane = Lane.open(spool / "presence", max_bytes=1 << 20, target="t")
        self.telemetry = RuleTelemetry("presence", direction=Direction.UPLINK)
        self.presence.attach(self.lane, self.telemetry)
        self.presence.start(lives_on=False)

    def close(self) -> None:
        self.presence.close()
        self.lane.close()


class Refusing:
    """A disk that is full for the journal while `refuses`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.refuses = False
        self._write = os.write
        self._replace = Path.replace
        self._path = path
        monkeypatch.setattr(os, "write", self.write)
        # Not the method itself: `Path` would not bind it.
        monkeypatch.setattr(Path, "replace", lambda source, target: self.replace(source, target))  # noqa: PLW0108

    def write(self, descriptor: int, data: bytes) -> int:
        ours = os.fstat(descriptor).st_ino == self._path.stat().st_ino
        return self._write(descriptor, data[:10] if self.refuses and ours else data)

    def replace(self, source: Path, target: Path) -> Path:
        if self.refuses and target == self._path:
            raise OSError(28, os.strerror(28), str(target))
        return self._replace(source, target)


def test_a_new_journal_begins_with_the_clock_and_its_numbers_only_rise(tmp_path: Path) -> None:
    now = 1_700_000_000_000_000
    journal = Journal(tmp_path, machine=Machine(now_us=lambda: now))
    assert (journal.state.seq, journal.state.epoch, journal.state.source) == (now, now, -1)
    journal.close()
    for later in (now + 5, now - 5):
        journal = Journal(tmp_path, machine=Machine(now_us=lambda later=later: later))  # type: ignore[misc]
        assert journal.state.seq == now + 5
        assert journal.state.epoch == now
        journal.close()


@pytest.mark.parametrize("torn", [1, 7, 40])
def test_a_torn_end_is_left_out(torn: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(came(1))
    size = journal.path.stat().st_size
    journal.append(came(2))
    journal.close()
    os.truncate(journal.path, size + torn)
    journal = Journal(tmp_path)
    assert set(journal.state.connections) == {"c1"}
    journal.close()


def test_what_does_not_fit_ends_what_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(came(1))
    data = journal.path.read_bytes()
    journal.append(came(2))
    journal.close()
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    for strange in (b"x" * 100, encode_record(Went("nobody", 1)) + encode_record(came(3))):
        journal.path.write_bytes(data + strange)
        journal = Journal(tmp_path)
        assert set(journal.state.connections) == {"c1"}
        assert f"byte {len(data)}" in lines.pop()
        journal.close()
    logger.remove(sink)


def test_a_disk_that_is_full_at_the_start_stops_nothing_and_forgets_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Status(tmp_path, Journal(tmp_path / "journal"))
    first.presence.take(event(ClientEventType.CONNECT))
    first.close()
    disk = Refusing(monkeypatch, tmp_path / "journal" / "journal")
    disk.refuses = True
    second = Status(tmp_path, Journal(tmp_path / "journal"))
    second.presence.watch()
    told = second.lane.next_offset
    disk.refuses = False
    for _ in range(2):
        second.presence.watch()
    assert second.lane.next_offset > told
    assert not second.presence.connections
    second.close()


def test_a_directory_that_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "presence").write_text("a file")
    with pytest.raises(LaneError, match="presence"):
        Journal(tmp_path / "presence")


def test_it_is_written_anew_bit_by_bit_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq2mqtt.presence.journal._SURELY_WORTH", 500)
    journal = Journal(tmp_path)
    sizes = []
    for number in range(3000):
        record = came(number % 100)
        journal.append(record)
        journal.state.apply(record)
        sizes.append(journal.path.stat().st_size)
    assert max(sizes) < 700 * sizes[0]
    assert sum(after < before for before, after in pairwise(sizes)) == 5
    kept = dict(journal.state.connections)
    journal.close()
    journal = Journal(tmp_path)
    assert journal.state.connections == kept
    journal.close()
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


async def test_while_it_cannot_be_written_nothing_is_told_and_then_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / ".presence")
    status = Status(tmp_path, journal)
    disk = Refusing(monkeypatch, journal.path)
    status.presence.take(event(ClientEventType.CONNECT))
    assert status.lane.messages == 1
    disk.refuses = True
    status.presence.take(event(ClientEventType.TCPCLEAN))
    status.presence.take(event(ClientEventType.CONNECT, "GID_dev@@@b"))
    status.presence.watch()
    assert status.lane.messages == 1
    assert set(status.presence.connections) == {"GID_dev@@@b"}
    assert "cannot be written" in str(status.telemetry.reason)
    disk.refuses = False
    for _ in range(2):
        status.presence.watch()
    assert status.lane.messages == 3
    assert "cannot be written" not in str(status.telemetry.reason)
    status.close()
    again = Journal(tmp_path / ".presence")
    assert set(again.state.connections) == {"GID_dev@@@b"}
    assert set(again.state.rules["presence"].announced) == {"GID_dev@@@b"}
    again.close()


def test_while_the_disk_refuses_it_is_tried_ever_more_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = Status(tmp_path, Journal(tmp_path / ".presence"))
    disk = Refusing(monkeypatch, tmp_path / ".presence" / "journal")
    tries: list[Path] = []
    replace = disk.replace

    def counted(source: Path, target: Path) -> Path:
        tries.append(target)
        return replace(source, target)

    monkeypatch.setattr(disk, "replace", counted)
    disk.refuses = True
    status.presence.take(event(ClientEventType.CONNECT))
    for _ in range(62):
        status.presence.watch()
    # After 1, 2, 4, 8, 16 and 30.
    assert len(tries) == 6
    disk.refuses = False
    for _ in range(30):
        status.presence.watch()
    assert status.lane.messages == 1
    # From the beginning, the next time.
    disk.refuses = True
    status.presence.take(event(ClientEventType.TCPCLEAN))
    disk.refuses = False
    status.presence.watch()
    assert status.lane.messages == 2
    status.close()


async def test_a_new_journal_that_cannot_take_its_place_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mq2mqtt.presence.journal._SURELY_WORTH", 10)
    journal = Journal(tmp_path / ".presence")
    status = Status(tmp_path, journal)
    status.presence.take(event(ClientEventType.CONNECT))

    def refuse(*_: object) -> Path:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        for number in range(20):
            for kind in (ClientEventType.CONNECT, ClientEventType.TCPCLEAN):
                status.presence.take(event(kind, "GID_dev@@@b", f"b{number}"))
        assert "cannot be written" in str(status.telemetry.reason)
        at_this_point = shutil.copytree(tmp_path / ".presence", tmp_path / "copy")
    killed = Journal(at_this_point)
    assert A in killed.state.connections
    assert A in killed.state.rules["presence"].announced
    killed.close()
    status.presence.watch()
    assert "cannot be written" not in str(status.telemetry.reason)
    status.presence.take(event(ClientEventType.CONNECT, "GID_dev@@@c"))
    status.close()
    again = Journal(tmp_path / ".presence")
    assert set(again.state.connections) == set(again.state.rules["presence"].announced) == {A, "GID_dev@@@c"}
    again.close()


async def test_with_power_what_is_written_is_synced_soon(tmp_path: Path) -> None:
    synced: list[int] = []
    machine = Machine(sync=synced.append)
    journal = Journal(tmp_path, power=True, machine=machine)
    for number in range(10):
        journal.append(came(number))
    await until(lambda: synced)
    before = len(synced)
    journal.append(came(11))
    await until(lambda: len(synced) > before)
    journal.close()


async def test_with_power_the_loop_waits_for_no_disk_when_it_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mq2mqtt.presence.journal._SURELY_WORTH", 100)
    threads: list[threading.Thread] = []
    sync = os.fsync

    def observed(descriptor: int) -> None:
        threads.append(threading.current_thread())
        sync(descriptor)

    journal = Journal(tmp_path, power=True, machine=Machine(sync=observed))
    monkeypatch.setattr(os, "fsync", observed)
    files = {journal.path.stat().st_ino}
    numbers = itertools.count()

    def is_rewritten() -> bool:
        for number in itertools.islice(numbers, 50):
            record = came(number % 10)
            journal.append(record)
            journal.state.apply(record)
        files.add(journal.path.stat().st_ino)
        return len(files) > 2

    await until(is_rewritten)
    assert threading.main_thread() not in threads
    kept = dict(journal.state.connections)
    journal.close()
    again = Journal(tmp_path)
    assert again.state.connections == kept
    again.close()


@pytest.mark.parametrize("seed", range(30))
async def test_with_power_a_power_cut_just_after_it_was_written_anew_takes_only_what_is_new(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mq2mqtt.presence.journal._SURELY_WORTH", 40)
    disk = Disk(tmp_path)
    with disk.recording():
        journal = Journal(tmp_path / ".presence")
        for number in range(10):
            journal.append(came(number))
        journal.close()
        # What a start finds it puts on the disk.
        journal = Journal(tmp_path / ".presence", power=True, machine=Machine(sync=disk.sync))
        before = journal.path.stat().st_ino

        def is_rewritten() -> bool:
            for number in range(10):
                if journal.path.stat().st_ino != before:
                    return True
                record = came(10 + number % 3)
                journal.append(record)
                journal.state.apply(record)
            return False

        await until(is_rewritten)
        disk.crashed = True
        journal.close()
        disk.cut_power(Random(seed).randint)  # noqa: S311 - a seed, so that a failure can be repeated
        again = Journal(tmp_path / ".presence")
        assert {f"c{number}" for number in range(10)} <= again.state.connections.keys()
        again.close()


def test_a_listener_that_fails_stops_nobody(tmp_path: Path) -> None:
    presence = Presence(Journal(tmp_path))
    heard: list[Any] = []

    def fails(*_: object) -> None:
        raise RuntimeError("a bug")

    presence.listen(came=fails, gone=fails)
    presence.listen(came=heard.append, gone=lambda *told: heard.append(told[2]))
    presence.take(event(ClientEventType.CONNECT))
    presence.take(event(ClientEventType.TCPCLEAN))
    assert [type(each).__name__ for each in heard] == ["Connection", "str"]
    presence.close()
