"""Devices flap while broker and bridge are killed: at the end RocketMQ's side knows who is there, and was told once."""

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from mq2mqtt.message import ReceivedMessage
from mq2mqtt.presence import StatusTracker
from tests.bridge_process import BridgeProcess
from tests.conftest import SharedRocketMQ
from tests.faults.flapping import FlappingDevice, assert_told_once, status_events
from tests.faults.random_moments import random_moments
from tests.faults.report import FaultRow, FaultTable, assert_invariants
from tests.mosquitto_bridge import MosquittoBridge
from tests.new_bridge import new_bridge
from tests.rocket_peer import RocketPeer
from tests.thorough import FACTOR
from tests.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

_DEVICES = min(500, 60 * FACTOR)
_SECONDS = min(120.0, 20.0 * FACTOR)
"""`MQ2MQTT_THOROUGH=9` makes it 500 devices for two minutes."""
_LIFE_SECONDS = 5.0
"""The longest time between two kills."""


class World:
    """A bridge with a status rule and the devices of its group."""

    def __init__(self, rocketmq: SharedRocketMQ, peer: RocketPeer, directory: Path, moments: random.Random) -> None:
        self.peer = peer
        self.topic = f"status_{uuid.uuid4().hex[:12]}"
        rule: dict[str, Any] = {"id": "status", "type": "status", "source": "GID_flap", "target": self.topic}
        self.bridge = new_bridge(directory, namesrv=rocketmq.namesrv, rules=[rule])
        if isinstance(self.bridge, MosquittoBridge):
            self.bridge.broker.log_types = ("error", "warning", "notice")
        port = self.bridge.mqtt_port
        self.devices = [FlappingDevice(port, f"GID_flap@@@{number}", moments) for number in range(_DEVICES)]
        peer.create_topic(self.topic)

    @property
    def online(self) -> set[str]:
        return {device.client_id for device in self.devices if device.is_connected}

    async def agreement(self, events: Sequence[ReceivedMessage]) -> None:
        """Wait until a tracker fed with `events` knows who is there, and find it so when all are in."""
        tracker, fed = StatusTracker(), 0

        def agrees() -> bool:
            nonlocal fed
            for message in events[fed:]:
                tracker.feed(json.loads(message.body))
                fed += 1
            return set(tracker.online) == self.online

        await until(agrees, seconds=60, what="agreement")
        await self._all_told(events)
        assert agrees()

    async def _all_told(self, events: Sequence[ReceivedMessage]) -> None:
        """Wait until RocketMQ has every event, and `events` all that RocketMQ has."""
        await until(lambda: self.bridge.metric("mq2mqtt_lane_messages") == 0, seconds=60)
        stored = await asyncio.to_thread(self.peer.stored, self.topic)
        await until(lambda: len(events) >= stored, seconds=60)


@pytest.fixture
async def world(rocketmq: SharedRocketMQ, tmp_path: Path) -> AsyncIterator[World]:
    with RocketPeer(rocketmq.namesrv) as peer:
        world = World(rocketmq, peer, tmp_path, random_moments("flapping"))
        yield world
        for device in world.devices:
            await device.end()
        world.bridge.kill()


def _ends_of(bridge: BridgeProcess) -> list[Callable[[], None]]:
    if isinstance(bridge, MosquittoBridge):
        return [bridge.kill_sidecar, bridge.broker.kill, bridge.kill]
    return [bridge.kill]


async def _kill_at_random(bridge: BridgeProcess, moments: random.Random) -> int:
    """Kill broker, bridge or both again and again; return how often."""
    deadline, kills = time.monotonic() + _SECONDS, 0
    ends = _ends_of(bridge)
    while (left := deadline - time.monotonic()) > 0 or kills < len(ends):
        await asyncio.sleep(moments.uniform(0.0, min(_LIFE_SECONDS, max(1.0, left))))
        # In turn, so that the short form has seen each.
        await asyncio.to_thread(ends[kills % len(ends)])
        await asyncio.sleep(moments.uniform(0.0, 1.0))
        await asyncio.to_thread(bridge.start, ready=False)
        kills += 1
    return kills


async def test_everybody_agrees_at_the_end(world: World, fault_table: FaultTable) -> None:
    moments = random_moments("kills")
    await asyncio.to_thread(world.bridge.start)
    ending = asyncio.Event()
    with world.peer.collect(world.topic) as events:
        flapping = [asyncio.create_task(device.flap(ending), name=device.client_id) for device in world.devices]
        kills = await _kill_at_random(world.bridge, moments)
        ending.set()
        await asyncio.gather(*flapping)
        await asyncio.gather(*(device.come_to_rest(online=moments.random() < 0.5) for device in world.devices))
        assert all(await asyncio.gather(*(device.is_served() for device in world.devices if device.is_connected)))
        await until(lambda: world.bridge.metric("mq2mqtt_connected_clients") == len(world.online))
        await world.agreement(events)
    told = status_events(events)
    assert_told_once(told, online=world.online)
    last = {event.body["clientId"]: event.body["channelId"] for event in sorted(told, key=lambda event: event.seq)}
    for device in world.devices:
        session = json.loads(world.bridge.get(f"/api/v1/sessions/{quote(device.client_id)}")[1])
        assert session["online"] is device.is_connected
        assert session.get("channelId") == (last[device.client_id] if device.is_connected else None)
        assert not device.is_connected or device.address.startswith(session["clientIp"])
    assert_invariants(world.bridge)
    assert await asyncio.to_thread(world.bridge.stop) == 0
    assert "Traceback" not in world.bridge.log_file.read_text()
    connects, again = sum(device.connects for device in world.devices), len(events) - len(told)
    fault_table.add(
        # None is missing and none out of order: so `assert_told_once` and the tracker have found.
        FaultRow(
            fault=f"killed at random for {_SECONDS:.0f} s while {_DEVICES} devices flap",
            traffic="status",
            acknowledged=len(told),
            arrived=len(told),
            missing=0,
            duplicated=again,
            out_of_order=0,
            longest_stall=None,
            told_down=None,
            reason=f"{connects} connects, {kills} kills; at the end all agree on who is there",
        )
    )
