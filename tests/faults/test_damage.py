"""Lanes that something has happened to while both processes were away: each is opened, or says what to do."""

import re
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.bridge_process import wait_for
from tests.conftest import SharedRocketMQ
from tests.device import Device
from tests.faults.report import FaultRow, FaultTable, assert_invariants
from tests.mosquitto_bridge import MosquittoBridge
from tests.rocket_peer import RocketPeer
from tests.waiting import PATIENCE

pytestmark = [pytest.mark.faults, pytest.mark.mosquitto]

_MESSAGES = 8
_PAYLOAD_BYTES = 3000
# Segments of 8 KiB: two messages each.
_MAX_BYTES = "64KiB"
_TOLD_SECONDS = 5.0 * PATIENCE
_HEADER_BYTES = 80


def _segments(lane: Path) -> list[Path]:
    return sorted(lane.glob("*.seg"))


def _change(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def _cut_a_write(lane: Path) -> None:
    last = _segments(lane)[-1]
    with last.open("ab") as file:
        file.write(last.read_bytes()[_HEADER_BYTES : _HEADER_BYTES + 100])


def _begin_a_segment(lane: Path) -> None:
    last = _segments(lane)[-1]
    (lane / f"{int(last.stem) + 1000:020}.seg").touch()


def _spoil_cursor(lane: Path) -> None:
    (lane / "cursor").write_bytes(b"\xff" * 1024)


def _lose_info(lane: Path) -> None:
    (lane / "lane.json").unlink()


def _spoil_last(lane: Path) -> None:
    _change(_segments(lane)[-1], _HEADER_BYTES + 100, b"\xff" * 8)


def _spoil_earlier(lane: Path) -> None:
    _change(_segments(lane)[1], _HEADER_BYTES + 100, b"\xff" * 8)


def _spoil_header(lane: Path) -> None:
    _change(_segments(lane)[0], 0, b"\xff" * 8)


def _lose_a_segment(lane: Path) -> None:
    segment = _segments(lane)[1]
    segment.rename(lane.parent / f"{lane.name}.lost")


def _add_a_file(lane: Path) -> None:
    (lane / "notes.txt").touch()


def _truncate_as_told(lane: Path, reason: str) -> None:
    told = re.search(rf"truncate -s (\d+) ({re.escape(str(lane))}\S+\.seg)", reason)
    assert told is not None, reason
    subprocess.run(["truncate", "-s", told[1], told[2]], check=True)


def _move_away(lane: Path, reason: str) -> None:
    told = re.search(rf"{re.escape(str(lane))}/\d+\.seg", reason)
    assert told is not None, reason
    Path(told[0]).rename(lane.parent / f"{lane.name}.moved")


def _put_back(lane: Path, reason: str) -> None:
    told = re.search(rf"({re.escape(str(lane))}/\d+\.seg): missing", reason)
    assert told is not None, reason
    (lane.parent / f"{lane.name}.lost").rename(told[1])


def _remove_the_file(lane: Path, reason: str) -> None:
    assert "notes.txt" in reason
    (lane / "notes.txt").unlink()


@dataclass(frozen=True)
class Case:
    """Something that happens to a lane; `mend` is what its operator does, `given_up` what that costs."""

    rule_id: str
    fault: str
    happen: Callable[[Path], None]
    mend: Callable[[Path, str], None] | None = None
    given_up: frozenset[int] = frozenset()


_CASES = (
    Case("untouched", "nothing", lambda _: None),
    Case("torn", "a write cut by a crash", _cut_a_write),
    Case("begun", "a segment whose header was never written", _begin_a_segment),
    Case("cursor", "both slots of the cursor spoilt", _spoil_cursor),
    Case("info", "lane.json lost", _lose_info),
    Case("last", "damage in the last segment", _spoil_last, _truncate_as_told, frozenset({6, 7})),
    Case("earlier", "damage in an earlier segment", _spoil_earlier, _move_away, frozenset({2, 3})),
    Case("header", "a segment's header spoilt", _spoil_header, _move_away, frozenset({0, 1})),
    Case("missing", "a segment missing", _lose_a_segment, _put_back),
    Case("foreign", "a foreign file in the lane", _add_a_file, _remove_the_file),
)
_READ_LATER = "earlier"
"""What only the reader meets: its rule is down. The others' damage is found at the start, and told instead of it."""
_AT_START = [case for case in _CASES if case.mend is not None and case.rule_id != _READ_LATER]


class World:
    """A bridge with a rule for each case."""

    def __init__(self, rocketmq: SharedRocketMQ, peer: RocketPeer, directory: Path) -> None:
        name = uuid.uuid4().hex[:12]
        self.peer = peer
        self.topics = {case.rule_id: f"{case.rule_id}_{name}" for case in _CASES}
        rules = [
            {"id": rule_id, "type": "outbound", "source": rule_id, "target": topic}
            for rule_id, topic in self.topics.items()
        ]
        self.bridge = MosquittoBridge(directory, namesrv=rocketmq.namesrv, rules=rules)
        self.bridge.config["spool"]["max_bytes"] = _MAX_BYTES
        for topic in self.topics.values():
            peer.create_topic(topic)

    def lane(self, case: Case) -> Path:
        return self.bridge.spool.absolute() / case.rule_id


@pytest.fixture
def world(rocketmq: SharedRocketMQ, tmp_path: Path) -> Iterator[World]:
    with RocketPeer(rocketmq.namesrv) as peer:
        world = World(rocketmq, peer, tmp_path / "bridge")
        yield world
        world.bridge.kill()


def _publish(world: World) -> None:
    with Device(world.bridge.mqtt_port, "GID_dev@@@1") as device:
        for number in range(_MESSAGES):
            for case in _CASES:
                body = b"%d" % number
                device.publish(f"{case.rule_id}/x", body.rjust(_PAYLOAD_BYTES), qos=1, wait=False)
        device.wait_published()


def test_lanes_of_every_kind(world: World, fault_table: FaultTable) -> None:
    world.bridge.start()
    world.bridge.kill_sidecar()
    _publish(world)
    world.bridge.kill()
    for case in _CASES:
        case.happen(world.lane(case))
    reasons = dict(_mend_at_start(world) for _ in _AT_START)
    assert len(reasons) == len(_AT_START)
    world.bridge.start(ready=False)
    seconds, reasons[_READ_LATER] = _wait_told(world)
    world.bridge.stop()
    _mend(world, _READ_LATER, reasons[_READ_LATER])
    world.bridge.start()
    wait_for(lambda: world.bridge.metric("mq2mqtt_lane_messages") == 0)
    assert_invariants(world.bridge)
    for case in _CASES:
        told_down = seconds if case.rule_id == _READ_LATER else None
        fault_table.add(_row(world, case, told_down, reasons.get(case.rule_id, "")))
    assert world.bridge.stop() == 0
    assert "Traceback" not in world.bridge.log_file.read_text()


def _mend(world: World, rule_id: str, reason: str) -> None:
    case = next(case for case in _CASES if case.rule_id == rule_id)
    assert case.mend is not None
    case.mend(world.lane(case), reason)


def _mend_at_start(world: World) -> tuple[str, str]:
    """Start in vain, and do what the last line says; return the rule and the line."""
    with pytest.raises(AssertionError, match="the bridge ended"):
        world.bridge.start(ready=False)
    assert world.bridge.process is not None
    assert world.bridge.process.returncode == 2
    line = world.bridge.log_file.read_text().splitlines()[-1]
    rule_id = next(case.rule_id for case in _AT_START if f"{world.lane(case)}/" in line)
    _mend(world, rule_id, line)
    return rule_id, line.removeprefix("mq2mqtt: ")


def _wait_told(world: World) -> tuple[float, str]:
    """Wait until all rules are up but the one whose reader meets damage; return after how long it was told, and how."""
    began = time.monotonic()
    rules: dict[str, dict[str, Any]] = {}
    told: list[tuple[float, str]] = []

    def is_told() -> bool:
        rules.update(world.bridge.readiness())
        reason = str(rules[_READ_LATER]["reason"])
        if f"/{_READ_LATER}/" in reason and not told:
            told.append((time.monotonic() - began, reason))
        return bool(told) and {rule_id for rule_id, rule in rules.items() if rule["state"] == "down"} == {_READ_LATER}

    wait_for(is_told, what=lambda: f"{rules}\n{world.bridge.log()}")
    assert told[0][0] < _TOLD_SECONDS
    return told[0]


def _row(world: World, case: Case, told_down: float | None, reason: str) -> FaultRow:
    wanted = {b"%d" % number for number in range(_MESSAGES) if number not in case.given_up}
    with world.peer.collect_bodies(world.topics[case.rule_id]) as bodies:
        wait_for(lambda: wanted <= {body.strip() for body in bodies}, what=lambda: f"{case.rule_id}: {len(bodies)}")
    return FaultRow.of(
        fault=f"lanes changed while both were away: {case.fault}",
        traffic="uplink QoS 1",
        acknowledged=wanted,
        arrivals=[body.strip() for body in bodies],
        longest_stall=None,
        told_down=told_down,
        reason=reason.replace(f"{world.bridge.spool.absolute()}/", ""),
    )
