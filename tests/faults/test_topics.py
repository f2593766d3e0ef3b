"""A topic is deleted, or its permission withdrawn, under traffic: its rules say so, the others go on."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from mq2mqtt.quickstart.rocketmq import RocketMQ
from tests.bridge_process import wait_for
from tests.faults.report import FaultTable
from tests.faults.scene import Downlink, Scene, Traffic, Uplink
from tests.rocket_peer import RocketPeer

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

_READ, _WRITE, _BOTH = 4, 2, 6
_STALL_SECONDS = 5.0
"""Less than the faults of this module last."""


@contextmanager
def _permission(peer: RocketPeer, own: RocketMQ, topics: Sequence[tuple[Traffic, int]]) -> Iterator[float]:
    """Leave these topics with a permission of their own; gives the moment of the last change."""
    for one, perm in topics:
        peer.set_permission(one.topic, perm, broker_address=own.broker_address, queues=one.queues)
    yield time.monotonic()
    for one, _ in topics:
        peer.set_permission(one.topic, _BOTH, broker_address=own.broker_address, queues=one.queues)


def test_permission_withdrawn(own: RocketMQ, peer: RocketPeer, tmp_path: Path, fault_table: FaultTable) -> None:
    up, other, down = (
        Uplink("events-out", qos=1, rate=200),
        Uplink("other-out", qos=1, rate=50),
        Downlink("commands-in", rate=20),
    )
    idle: list[Traffic] = [Uplink("idle-out", qos=1, rate=1), Downlink("idle-in", rate=1)]
    with Scene(tmp_path, namesrv=own.namesrv, peer=peer, traffic=[up, other, down], idle=idle) as scene:
        scene.start()
        withdrawn: list[tuple[Traffic, int]] = [(up, _READ), (down, _WRITE), (idle[0], _READ), (idle[1], _WRITE)]
        with _permission(peer, own, withdrawn) as since:
            told = scene.wait_told(*(one.rule_id for one, _ in withdrawn), since=since)
            assert "no writable queue" in told[up.rule_id][1]
            scene.wait_flow([other])
            scene.assert_down(*(one.rule_id for one, _ in withdrawn))
        fault = "permission to write or read the topic withdrawn and given back"
        scene.finish(fault_table, fault, told=told, stall_seconds=_STALL_SECONDS)


def test_deleted(own: RocketMQ, peer: RocketPeer, tmp_path: Path, fault_table: FaultTable) -> None:
    up, other, down = (
        Uplink("events-out", qos=1, rate=200),
        Uplink("other-out", qos=1, rate=50),
        Downlink("commands-in", rate=20),
    )
    idle: list[Traffic] = [Uplink("idle-out", qos=1, rate=1), Downlink("idle-in", rate=1)]
    with Scene(tmp_path, namesrv=own.namesrv, peer=peer, traffic=[up, other, down], idle=idle) as scene:
        scene.start()
        # What RocketMQ has not handed out yet would go with the topic.
        down.pause()
        deleted: list[Traffic] = [up, down, *idle]
        for one in deleted:
            peer.delete_topic(one.topic, broker_address=own.broker_address)
        since = time.monotonic()
        down.resume()
        told = scene.wait_told(*(one.rule_id for one in deleted), since=since)
        scene.wait_flow([other])
        scene.assert_down(*(one.rule_id for one in deleted))
        # One client, one queue, one order: what was stored is what came first.
        up.gone = int(scene.carried(up))
        for one in deleted:
            peer.create_topic(one.topic, queues=one.queues)
        scene.finish(fault_table, "topic deleted, and made again", told=told, stall_seconds=_STALL_SECONDS)


def test_made_again_behind_a_held_poll(
    own: RocketMQ, peer: RocketPeer, tmp_path: Path, fault_table: FaultTable
) -> None:
    if own.version.startswith("4."):
        pytest.skip("4.9 keeps the offsets of a deleted topic: nothing tells the new one from it")
    down = Downlink("commands-in", rate=20)
    with Scene(tmp_path, namesrv=own.namesrv, peer=peer, traffic=[down]) as scene:
        scene.start()
        down.pause()
        before = down.acknowledged
        group = f"GID_mq2mqtt_{down.rule_id}_{scene.bridge.config['node']}"
        address = own.broker_address
        wait_for(lambda: peer.committed_offset(group, down.topic, broker_address=address) >= before)
        time.sleep(0.5)  # the poll for the next message is held
        peer.delete_topic(down.topic, broker_address=own.broker_address)
        peer.create_topic(down.topic, queues=down.queues)
        # More than were there before: those that the held poll is answered with are not the first ones.
        down.send_burst(peer, 2 * before)
        wait_for(lambda: len(set(down.arrivals)) == down.acknowledged, what=scene.bridge.log)
        down.resume()
        scene.finish(fault_table, "topic deleted and made again at once, with more messages than before")
