"""The disk of RocketMQ's broker is full, and is freed again."""

import time
from pathlib import Path

import pytest

from mq2mqtt.errors import LinkError
from mq2mqtt.quickstart.rocketmq import RocketMQ
from tests.bridge_process import wait_for
from tests.faults.report import FaultTable
from tests.faults.scene import Downlink, Scene, Uplink
from tests.faults.small_disk import SmallDisk
from tests.rocket_peer import RocketPeer

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

_SPARE_PAGES = 2000
_FULL_SECONDS = 10.0


def test_full(
    own: RocketMQ, broker_disk: SmallDisk | None, peer: RocketPeer, tmp_path: Path, fault_table: FaultTable
) -> None:
    if broker_disk is None:
        pytest.skip("only root can mount a small file system to fill")
    up, down = Uplink("events-out", qos=1, rate=200), Downlink("commands-in", rate=20)
    with Scene(tmp_path, namesrv=own.namesrv, peer=peer, traffic=[up, down]) as scene:
        scene.start()
        down.pause()
        broker_disk.fill(spare_pages=_SPARE_PAGES)
        try:
            # It begins to look a minute after its start.
            wait_for(lambda: _refuses(peer, down.topic), seconds=90, what="the broker takes messages on a full disk")
            refused = time.monotonic()
            told = scene.wait_told(up.rule_id, since=refused)
            assert "code 14" in told[up.rule_id][1]
            # What is there can still be read.
            scene.assert_down(up.rule_id)
            time.sleep(_FULL_SECONDS)
        finally:
            broker_disk.free()
        down.resume()
        scene.finish(fault_table, "the disk of RocketMQ's broker full, and freed", told=told)


def _refuses(peer: RocketPeer, topic: str) -> bool:
    try:
        # Another tag than the rule's: it is in nobody's count.
        peer.send(topic, b"?", tag="probe")
    except LinkError as error:
        return "code 14" in str(error)
    return False
