"""A publisher at full speed while Mosquitto and the sidecar are killed, while one is away, and on a disk of 1 MB."""

import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bridge_process import wait_for
from tests.conftest import SharedRocketMQ
from tests.device import Device
from tests.faults.report import FaultRow, FaultTable, assert_invariants
from tests.faults.small_disk import SmallDisk
from tests.flood import Flood
from tests.mosquitto_bridge import MosquittoBridge
from tests.rocket_peer import RocketPeer
from tests.thorough import FACTOR

pytestmark = [pytest.mark.faults, pytest.mark.mosquitto, pytest.mark.timeout(600 * FACTOR)]

_ROUNDS = FACTOR
_BACKLOG = 100_000 * FACTOR
"""`MQ2MQTT_THOROUGH=18` makes it an hour's worth of 500 messages a second."""
_BACKLOG_BYTES = 64 << 20
"""What the sidecar may need to send a backlog, however long that is: batches on their way, and lists of segments."""


class World:
    """A bridge of one rule, and a publisher at full speed."""

    def __init__(self, rocketmq: SharedRocketMQ, peer: RocketPeer, directory: Path, *, limit: int) -> None:
        self.peer = peer
        self.out = f"out_{uuid.uuid4().hex[:12]}"
        rule = {"id": "load-out", "type": "outbound", "source": "load", "target": self.out}
        self.bridge = MosquittoBridge(directory, namesrv=rocketmq.namesrv, rules=[rule])
        self.flood = Flood(self.bridge.mqtt_port, "load/x", limit=limit)
        # A line for each packet would be most of what Mosquitto does.
        self.bridge.broker.log_types = ("error", "warning", "notice")
        peer.create_topic(self.out)

    @property
    def waiting(self) -> float:
        return self.bridge.metric("mq2mqtt_lane_messages")

    def wait_acknowledged(self, more: int) -> None:
        enough = self.flood.acknowledged + more
        wait_for(lambda: self.flood.acknowledged >= enough, seconds=60, what=self.bridge.log)

    def finish(self, table: FaultTable, *, fault: str, note: str = "") -> None:
        """Let everything arrive, add the row, check the invariants."""
        self.flood.stop()
        wait_for(lambda: self.bridge.get("/readyz")[0] == 200, seconds=60, what=self.bridge.describe)
        wait_for(lambda: self.waiting == 0, seconds=180 * FACTOR)
        assert_invariants(self.bridge)
        wanted = self.flood.bodies
        with self.peer.collect_bodies(self.out) as bodies:
            wait_for(lambda: len(bodies) >= len(wanted) and wanted <= set(bodies), seconds=180 * FACTOR)
        row = FaultRow.of(
            fault=fault,
            traffic="uplink QoS 1, at full speed",
            acknowledged=wanted,
            arrivals=bodies,
            longest_stall=self.flood.longest_stall,
            reason=note,
        )
        table.add(row)
        assert self.bridge.stop() == 0
        assert "Traceback" not in self.bridge.log_file.read_text()


Make = Callable[..., World]


@pytest.fixture
def make(rocketmq: SharedRocketMQ, tmp_path: Path) -> Iterator[Make]:
    """Make the test's world, with a publisher of at most so many messages."""
    made: list[World] = []
    with RocketPeer(rocketmq.namesrv) as peer:

        def make(*, limit: int = 10**9) -> World:
            made.append(World(rocketmq, peer, tmp_path / "bridge", limit=limit))
            return made[-1]

        yield make
        for world in made:
            world.flood.give_up()
            world.bridge.kill()


def test_killed(make: Make, fault_table: FaultTable) -> None:
    world = make()
    world.bridge.start()
    world.flood.start()
    ends = (world.bridge.broker.kill, world.bridge.kill_sidecar, world.bridge.kill)
    for end in itertools.chain.from_iterable([ends] * _ROUNDS):
        world.wait_acknowledged(5000)
        end()
        world.bridge.start(ready=False)
    world.wait_acknowledged(5000)
    fault = f"Mosquitto, the sidecar and both killed in turn in full load, {_ROUNDS * len(ends)} kills"
    world.finish(fault_table, fault=fault)


def test_an_hours_messages_while_the_sidecar_is_away(make: Make, fault_table: FaultTable) -> None:
    world = make(limit=_BACKLOG)
    world.bridge.config["spool"]["max_bytes"] = "1GiB"
    world.bridge.start()
    world.bridge.kill_sidecar()
    began = time.monotonic()
    world.flood.start()
    world.flood.join(180 * FACTOR)
    took = time.monotonic() - began
    assert world.flood.acknowledged == _BACKLOG
    # What it needs for anybody is what it has before there is anything to send.
    world.bridge.broker.kill()
    world.bridge.start(ready=False)
    before, began, memory = world.bridge.resident_bytes, time.monotonic(), 0
    while world.waiting:
        memory = max(memory, world.bridge.resident_bytes)
        time.sleep(0.05)
    drained = time.monotonic() - began
    note = (
        f"published at {_BACKLOG / took:.0f}/s, sent at {_BACKLOG / drained:.0f}/s,"
        f" the sidecar's memory {(memory - before) / 2**20:+.0f} MiB"
    )
    world.finish(fault_table, fault=f"sidecar away for {_BACKLOG} messages", note=note)
    assert memory - before < _BACKLOG_BYTES


def test_a_disk_of_1_mb_while_the_sidecar_is_away(make: Make, fault_table: FaultTable, tmp_path: Path) -> None:
    world = make()
    with SmallDisk(tmp_path / "disk", megabytes=1) as disk:
        world.bridge.config["spool"] = {"path": str(disk.path / "spool"), "max_bytes": "4MiB"}
        world.bridge.start()
        world.bridge.kill_sidecar()
        world.flood.start()
        wait_for(lambda: world.flood.connections > 10, seconds=60, what=world.bridge.log)
        held = world.flood.acknowledged
        with Device(world.bridge.mqtt_port, "GID_other@@@1") as other:
            other.publish("none/x", b"other", qos=1)
        assert world.flood.acknowledged == held
        world.bridge.start(ready=False)
        world.wait_acknowledged(10_000)
        world.finish(fault_table, fault="a disk of 1 MB full while the sidecar is away")
