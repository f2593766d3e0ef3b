"""No space under the spool: nothing is acknowledged that has no place, and everything goes on when there is."""

import asyncio
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bridge_process import wait_for
from tests.conftest import SharedRocketMQ
from tests.device import Device
from tests.faults.report import FaultRow, FaultTable, assert_invariants
from tests.faults.small_disk import SmallDisk
from tests.new_bridge import host, new_bridge
from tests.rocket_peer import RocketPeer, wait_for_messages
from tests.stream import Stream
from tests.waiting import PATIENCE, settled

pytestmark = pytest.mark.faults

_TOLD_SECONDS = 5.0 * PATIENCE
_ROUNDS = {"amqtt": 6, "mosquitto": 2}
"""On Mosquitto one takes ten seconds: a rule is up again 5 s after the last refusal."""


class World:
    """A bridge whose spool is on a small disk."""

    def __init__(self, rocketmq: SharedRocketMQ, peer: RocketPeer, disk: SmallDisk) -> None:
        name = uuid.uuid4().hex[:12]
        self.out, self.into = f"out_{name}", f"in_{name}"
        self.peer = peer
        self.disk = disk
        rules: list[dict[str, Any]] = [
            {"id": "full-out", "type": "outbound", "source": "full", "target": self.out},
            {"id": "devices-in", "type": "inbound", "source": self.into, "target": "devices"},
        ]
        directory = disk.path.parent / "bridge"
        self.bridge = new_bridge(directory, namesrv=rocketmq.namesrv, rules=rules)
        # Segments of two pages: the disk is also full when a segment is to be begun.
        self.bridge.config["spool"] = {"path": str(disk.path / "spool"), "max_bytes": "64KiB"}
        peer.create_topic(self.out)
        peer.create_topic(self.into)

    def told(self) -> tuple[float, str]:
        """Wait until the rule is told down; return after how long, and the reason."""
        began = time.monotonic()
        reasons: list[str] = []

        def is_told() -> bool:
            reasons[:] = self._reasons()
            return bool(reasons)

        wait_for(is_told, seconds=_TOLD_SECONDS, what=self.bridge.describe)
        assert self.bridge.metric("mq2mqtt_rule_up", rule="full-out") == 0
        return time.monotonic() - began, reasons[0].replace(f"{self.disk.path}/", "")

    def _reasons(self) -> list[str]:
        """Why the rule is down, once it is told that the disk is full."""
        rule = self.bridge.readiness()["full-out"]
        said = str(rule["reason"])
        is_told = "No space left on device" in said or "the disk is full" in said
        return [said] if rule["state"] == "down" and is_told else []

    def dropped(self, rule: str, reason: str) -> float:
        return self.bridge.metric("mq2mqtt_dropped_total", rule=rule, reason=reason)

    def wait_up(self) -> None:
        wait_for(lambda: self.bridge.get("/readyz")[0] == 200, seconds=60, what=self.bridge.describe)


@pytest.fixture
def world(rocketmq: SharedRocketMQ, tmp_path: Path) -> Iterator[World]:
    with SmallDisk(tmp_path / "disk", megabytes=4) as disk, RocketPeer(rocketmq.namesrv) as peer:
        world = World(rocketmq, peer, disk)
        yield world
        world.bridge.kill()


def _streams(world: World) -> list[Stream]:
    return [
        Stream(world.bridge.mqtt_port, "full/x", rate=200, qos=qos, client_id=f"GID_full@@@{qos}") for qos in (1, 2)
    ]


def _others_go_on(world: World) -> None:
    """While the disk is full: topics of no rule, and what comes from RocketMQ."""
    dropped, unparked = world.dropped("full-out", "lane_full"), world.dropped("devices-in", "parking_full")
    with Device(world.bridge.mqtt_port, "GID_dev@@@1") as device:
        device.subscribe("devices/#", qos=1)
        for qos in (1, 2):
            device.publish("none/x", b"other", qos=qos)
        world.peer.send(world.into, b"bad topic", mqttSecondTopic="/a/#")
        world.peer.send(world.into, b"good", mqttSecondTopic="/a")
        wait_for_messages(device.received, 1)
        device.publish("full/x", b"not kept", qos=0)
        wait_for(lambda: world.dropped("full-out", "lane_full") > dropped)
        wait_for(lambda: world.dropped("devices-in", "parking_full") == unparked + 1)
    assert [message.payload for message in device.received] == [b"good"]


def test_a_disk_that_fills_under_two_streams(world: World, fault_table: FaultTable) -> None:
    world.bridge.start()
    streams = _streams(world)
    for stream in streams:
        stream.start()
    told: list[tuple[float, str]] = []
    rounds = _ROUNDS[host()]
    try:
        for number in range(rounds):
            before = [len(stream.acknowledged) for stream in streams]
            wait_for(lambda: all(len(s.acknowledged) > n + 50 for s, n in zip(streams, before, strict=True)))  # noqa: B023 - done at once
            world.disk.fill()
            told.append(world.told())
            if number == 0:
                # Some were on their way when it filled.
                acknowledged = asyncio.run(settled(lambda: [set(stream.acknowledged) for stream in streams]))
                _others_go_on(world)
                assert [stream.acknowledged for stream in streams] == acknowledged
            world.disk.free()
            world.wait_up()
    finally:
        for stream in streams:
            stream.give_up() if not told else stream.stop()
    _arrive(world, streams, fault_table, fault=f"no space under the spool, {rounds} times", told=max(told))
    assert world.bridge.stop() == 0
    listed = world.bridge.command("spool", "ls")
    assert listed.returncode == 0, listed.stderr


def _arrive(world: World, streams: list[Stream], table: FaultTable, *, fault: str, told: tuple[float, str]) -> None:
    wait_for(lambda: world.bridge.metric("mq2mqtt_lane_messages") == 0, seconds=60)
    assert_invariants(world.bridge)
    with world.peer.collect(world.out) as messages:
        for qos, stream in enumerate(streams, 1):
            wait_for(lambda: stream.acknowledged <= {m.body for m in messages if _from(stream, m)}, seconds=60)  # noqa: B023
            table.add(
                FaultRow.of(
                    fault=fault,
                    traffic=f"uplink QoS {qos}, 200/s",
                    acknowledged=stream.acknowledged,
                    arrivals=[m.body for m in messages if _from(stream, m)],
                    longest_stall=stream.longest_stall,
                    told_down=told[0],
                    reason=told[1],
                )
            )


def _from(stream: Stream, message: Any) -> bool:  # noqa: ANN401
    return bool(message.properties["clientId"] == stream.client_id)


def test_a_disk_that_is_full_when_the_bridge_starts(world: World) -> None:
    world.bridge.start()
    with Device(world.bridge.mqtt_port, "GID_dev@@@1") as device:
        device.publish("full/x", b"before", qos=1)
    assert world.bridge.stop() == 0
    world.disk.fill()
    world.bridge.start(ready=False)
    # Mosquitto closes the connection of the one who waits, again and again.
    with Device(world.bridge.mqtt_port, "GID_dev@@@1", reconnects=True) as device:
        # Fills the page that the lane has, and waits for the next one.
        device.publish("full/x", bytes(8000), qos=1, wait=False)
        world.told()
        with Device(world.bridge.mqtt_port, "GID_dev@@@2") as other:
            other.publish("none/x", b"other", qos=1)
        world.disk.free()
        device.wait_published()
    world.wait_up()
    with world.peer.collect(world.out) as messages:
        wait_for(lambda: {len(message.body) for message in messages} == {6, 8000})
    assert_invariants(world.bridge)
    assert world.bridge.stop() == 0


@pytest.mark.amqtt("the hook makes lanes: the sidecar starts, and says in /readyz that there is none")
def test_a_new_rule_on_a_full_disk_is_one_clear_line(world: World) -> None:
    world.bridge.start()
    assert world.bridge.stop() == 0
    world.bridge.config["rules"].append({"id": "new-out", "type": "outbound", "source": "new", "target": world.out})
    world.disk.fill()
    with pytest.raises(AssertionError, match="No space left on device"):
        world.bridge.start()
    assert world.bridge.process is not None
    assert world.bridge.process.wait(20) == 2
    assert "Traceback" not in world.bridge.log()
    world.disk.free()
    world.bridge.start()
    assert world.bridge.stop() == 0


def test_a_message_that_cannot_be_parked_for_want_of_space_waits(world: World) -> None:
    world.bridge.start()
    with Device(world.bridge.mqtt_port, "GID_dev@@@1") as device:
        # The message takes 8 of them in the lane, and as many again where it would be parked.
        world.disk.fill(spare_pages=12)
        device.publish("full/" + "x" * 32_000, b"too long a topic", qos=1)
        device.publish("full/x", b"behind", qos=1)
        wait_for(lambda: "cannot park" in str(world.bridge.readiness()["full-out"]["reason"]), seconds=30)
        # What is behind it waits too only where it was read with it.
        assert world.bridge.metric("mq2mqtt_lane_messages", rule="full-out") >= 1
        world.disk.free()
        world.wait_up()
    with world.peer.collect(world.out) as messages:
        wait_for(lambda: [message.body for message in messages] == [b"behind"])
    wait_for(lambda: world.bridge.metric("mq2mqtt_parked_messages", rule="full-out") == 1)
    assert_invariants(world.bridge)
    assert world.bridge.stop() == 0
