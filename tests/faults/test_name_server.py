"""The name server goes; the bridge goes on, and starts again without it."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mq2mqtt.quickstart.cluster import topic_exists
from mq2mqtt.quickstart.rocketmq import RocketMQ
from tests.bridge_process import wait_for
from tests.faults.report import FaultTable
from tests.faults.scene import Downlink, Scene, Traffic, Uplink
from tests.rocket_peer import RocketPeer

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

_AWAY_SECONDS = 5.0
"""Longer than a route in use is believed without asking."""


@contextmanager
def _away(rocketmq: RocketMQ) -> Iterator[None]:
    rocketmq.kill_namesrv()
    try:
        yield
    finally:
        asyncio.run(rocketmq.start_namesrv())


def test_away(own: RocketMQ, peer: RocketPeer, tmp_path: Path, fault_table: FaultTable) -> None:
    up, down = Uplink("events-out", qos=1, rate=200), Downlink("commands-in", rate=20)
    idle: list[Traffic] = [Uplink("idle-out", qos=1, rate=1), Downlink("idle-in", rate=1)]
    with Scene(tmp_path, namesrv=own.namesrv, peer=peer, traffic=[up, down], idle=idle) as scene:
        scene.start()
        # Brokers that are known still give and take messages, also while a name server that is new knows no topic.
        with _away(own):
            killed = time.monotonic()
            while time.monotonic() < killed + _AWAY_SECONDS:
                scene.assert_down()
                time.sleep(0.2)
            scene.wait_flow()
        while not asyncio.run(topic_exists(own.namesrv, up.topic)):
            scene.assert_down()
            time.sleep(0.2)
        down.pause()
        assert scene.bridge.stop() == 0
        with _away(own):
            scene.bridge.start(ready=False)
            started = time.monotonic()
            told = scene.wait_told(up.rule_id, since=started)
            scene.assert_down(*(one.rule_id for one in (up, down, *idle)))
            wait_for(lambda: all("not connected" in rule["reason"] for rule in scene.bridge.readiness().values()))
            acknowledged = up.acknowledged
            wait_for(lambda: up.acknowledged > acknowledged + 200)
        scene.wait_up()
        down.connect()
        down.resume()
        # Without a bridge there is nobody to acknowledge.
        fault = "name server away; away again, and the bridge started without it"
        scene.finish(fault_table, fault, told=told, stall_seconds=60)
