"""Mosquitto and the sidecar: one of them is away, silent, or cannot reach the other."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest

from mq2mqtt.quickstart.rocketmq import RocketMQ
from tests.bridge_process import wait_for
from tests.faults.report import FaultTable
from tests.faults.scene import Downlink, Scene, Traffic, Uplink
from tests.mosquitto_bridge import MosquittoBridge
from tests.rocket_peer import RocketPeer
from tests.tcp_proxy import TcpProxy

pytestmark = [pytest.mark.faults, pytest.mark.mosquitto, pytest.mark.timeout(300)]

_SILENT_SECONDS = 10.0
_AWAY_SECONDS = 5.0
_CUTS = 6

Break = Callable[[TcpProxy], None]


class World:
    """A bridge with a stream of each QoS up, and one down; `proxy` lies between the sidecar and Mosquitto."""

    def __init__(self, own: RocketMQ, peer: RocketPeer, directory: Path, proxy: TcpProxy) -> None:
        self.peer = peer
        self.proxy = proxy
        self.up = [Uplink(f"qos{qos}-out", qos=qos, rate=200) for qos in (1, 2)]
        self.down = Downlink("commands-in", rate=50)
        traffic: list[Traffic] = [*self.up, self.down]
        self.rule_ids = [one.rule_id for one in traffic]
        self.scene = Scene(directory, namesrv=own.namesrv, peer=peer, traffic=traffic)
        assert isinstance(self.scene.bridge, MosquittoBridge)
        self.bridge = self.scene.bridge
        self.bridge.config["host"]["url"] = f"mqtt://{proxy.listen(f'127.0.0.1:{self.bridge.mqtt_port}')}"

    def has_acknowledged(self, more: int, *, than: list[int]) -> bool:
        """Whether each stream has so many acknowledgements more than it had."""
        return all(now >= then + more for now, then in zip(self.acknowledged, than, strict=True))

    @property
    def acknowledged(self) -> list[int]:
        return [one.acknowledged for one in self.up]


@pytest.fixture
def world(own: RocketMQ, peer: RocketPeer, tmp_path: Path) -> Iterator[World]:
    with TcpProxy() as proxy:
        world = World(own, peer, tmp_path, proxy)
        with world.scene:
            world.scene.start()
            yield world


@contextmanager
def _stopped(process: Popen[bytes] | None) -> Iterator[float]:
    """SIGSTOP a process for `_SILENT_SECONDS`; gives the moment (monotonic)."""
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        yield stopped
        time.sleep(max(0.0, stopped + _SILENT_SECONDS - time.monotonic()))
    finally:
        process.send_signal(signal.SIGCONT)


def test_mosquitto_silent(world: World, fault_table: FaultTable) -> None:
    with _stopped(world.bridge.broker.process) as since:
        told = world.scene.wait_told(*world.rule_ids, since=since)
    fault = f"Mosquitto paused (SIGSTOP) for {_SILENT_SECONDS:g} s"
    world.scene.finish(fault_table, fault, told=told, stall_seconds=_SILENT_SECONDS + 15)


def test_mosquitto_away(world: World, fault_table: FaultTable) -> None:
    world.down.pause()
    world.bridge.broker.kill()
    killed = time.monotonic()
    told = world.scene.wait_told(*world.rule_ids, since=killed)
    time.sleep(max(0.0, killed + _AWAY_SECONDS - time.monotonic()))
    world.bridge.broker.start()
    world.down.connect()
    world.down.resume()
    fault = f"Mosquitto killed (SIGKILL) for {_AWAY_SECONDS:g} s"
    world.scene.finish(fault_table, fault, told=told, stall_seconds=_AWAY_SECONDS + 15)


def test_the_sidecar_silent(world: World, fault_table: FaultTable) -> None:
    before = world.acknowledged
    with _stopped(world.bridge.process):
        with pytest.raises(OSError):  # noqa: PT011 - that there is no answer is what is told
            world.bridge.get("/readyz", seconds=5.0)
        wait_for(lambda: world.has_acknowledged(200, than=before))
    world.scene.finish(fault_table, f"sidecar paused (SIGSTOP) for {_SILENT_SECONDS:g} s")


@pytest.mark.parametrize(
    ("fault", "break_them"),
    [("cut", TcpProxy.cut), ("half-open: it stays, and nothing gets through either way", TcpProxy.swallow)],
    ids=["cut", "half-open"],
)
def test_the_sidecars_connection(world: World, fault_table: FaultTable, fault: str, break_them: Break) -> None:
    before = world.acknowledged
    break_them(world.proxy)
    broken = time.monotonic()
    told = world.scene.wait_told(*world.rule_ids, since=broken)
    time.sleep(max(0.0, broken + _SILENT_SECONDS - time.monotonic()))
    # Devices do not notice, and RocketMQ gets what they publish.
    assert world.has_acknowledged(200, than=before)
    world.scene.wait_flow(world.up)
    world.proxy.mend()
    world.scene.finish(fault_table, f"the sidecar's MQTT connection {fault}, for {_SILENT_SECONDS:g} s", told=told)


def test_the_sidecars_connection_cut_in_the_middle(world: World, fault_table: FaultTable) -> None:
    world.down.pause()
    moments = random.Random(0)  # noqa: S311 - the same every time, not a secret
    for cut in range(_CUTS):
        # Over the slow connection several batches are on their way.
        world.proxy.delay(0.02 if cut % 2 else 0.0)
        world.proxy.cut_after(moments.randrange(1, 40_000))
        while world.proxy.is_to_cut:
            world.down.send_burst(world.peer, 200)
            wait_for(lambda: not world.proxy.is_to_cut or world.down.has_arrived, seconds=60)
    world.proxy.mend()
    world.down.resume()
    world.scene.finish(fault_table, f"the sidecar's MQTT connection cut {_CUTS} times, in the middle of a batch")
