"""The broker is killed and paused under traffic in both directions."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mq2mqtt.quickstart.rocketmq import RocketMQ
from mq2mqtt.uplink import BATCH_MESSAGES
from tests.bridge_process import wait_for
from tests.faults.report import FaultTable
from tests.faults.scene import Downlink, Scene, Traffic, Uplink
from tests.rocket_peer import RocketPeer
from tests.thorough import FACTOR

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300 * FACTOR)]

_OUTAGE_SECONDS = 15.0 * FACTOR
_QOS2_OUTAGE_SECONDS = 18.0 * FACTOR


@contextmanager
def _killed(rocketmq: RocketMQ, *, seconds: float) -> Iterator[float]:
    """Kill the broker, and start it again after `seconds`; gives the moment (monotonic)."""
    rocketmq.kill_broker()
    killed = time.monotonic()
    try:
        yield killed
        time.sleep(max(0.0, killed + seconds - time.monotonic()))
    finally:
        asyncio.run(rocketmq.start_broker())


@contextmanager
def _paused(rocketmq: RocketMQ, *, seconds: float) -> Iterator[float]:
    rocketmq.pause_broker()
    paused = time.monotonic()
    try:
        yield paused
        time.sleep(max(0.0, paused + seconds - time.monotonic()))
    finally:
        rocketmq.resume_broker()


def test_killed(own: RocketMQ, peer: RocketPeer, tmp_path: Path, fault_table: FaultTable) -> None:
    up, down = Uplink("events-out", qos=1, rate=500), Downlink("commands-in", rate=50)
    idle = Uplink("idle-out", qos=1, rate=1)
    with Scene(tmp_path, namesrv=own.namesrv, peer=peer, traffic=[up, down], idle=[idle]) as scene:
        scene.start()
        with _killed(own, seconds=_OUTAGE_SECONDS) as killed:
            told = scene.wait_told(up.rule_id, down.rule_id, idle.rule_id, since=killed)
            wait_for(lambda: scene.bridge.metric("mq2mqtt_lane_messages", rule=up.rule_id) > 1000)
        scene.finish(fault_table, f"RocketMQ's broker killed (SIGKILL) for {_OUTAGE_SECONDS:g} s", told=told)


def test_killed_under_qos_2(own: RocketMQ, peer: RocketPeer, tmp_path: Path, fault_table: FaultTable) -> None:
    up = Uplink("exactly-out", qos=2, rate=120)
    with Scene(tmp_path, namesrv=own.namesrv, peer=peer, traffic=[up]) as scene:
        scene.start()
        with _killed(own, seconds=_QOS2_OUTAGE_SECONDS) as killed:
            told = scene.wait_told(up.rule_id, since=killed)
        scene.finish(fault_table, f"RocketMQ's broker killed (SIGKILL) for {_QOS2_OUTAGE_SECONDS:g} s", told=told)


def test_paused(own: RocketMQ, peer: RocketPeer, tmp_path: Path, fault_table: FaultTable) -> None:
    up, down = Uplink("events-out", qos=1, rate=200), Downlink("commands-in", rate=50)
    idle: list[Traffic] = [Uplink("idle-out", qos=1, rate=1), Downlink("idle-in", rate=1)]
    with Scene(tmp_path, namesrv=own.namesrv, peer=peer, traffic=[up, down], idle=idle) as scene:
        scene.start()
        with _paused(own, seconds=_OUTAGE_SECONDS) as paused:
            told = scene.wait_told(up.rule_id, down.rule_id, *(one.rule_id for one in idle), since=paused)
        rows = scene.finish(fault_table, f"RocketMQ's broker paused (SIGSTOP) for {_OUTAGE_SECONDS:g} s", told=told)
        # It stores what it was sent before and during the pause: that is one batch, sent again when it answers.
        assert rows[up.rule_id].duplicated <= BATCH_MESSAGES
