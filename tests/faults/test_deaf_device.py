"""Devices that never read again: everybody else gets everything at pace, and the bridge's memory stays small."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.bridge_process import BridgeProcess
from tests.conftest import SharedRocketMQ
from tests.faults.report import FaultRow, FaultTable, assert_invariants
from tests.mqtt_client import Client, publish_packet
from tests.new_bridge import host, new_bridge
from tests.rocket_peer import RocketPeer
from tests.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

_PAYLOAD_BYTES = 4000
_FANOUT = 12_000
_LOCAL = 20_000
# What is allowed for the deaf: outboxes, write buffers, what waits for 2 s in amqtt, and what an allocator does not
# give back. Kept whole, the messages would be 48 MB in the first test and 80 MB in the second, beside their objects.
_FANOUT_BYTES = 32 << 20
_LOCAL_BYTES = 64 << 20
# What Mosquitto keeps for a device is bounded by its own `max_queued_bytes`.
_MEMORY = {"amqtt": "memory", "mosquitto": "the sidecar's memory"}


class World:
    def __init__(self, bridge: BridgeProcess, peer: RocketPeer, into: str) -> None:
        self.bridge = bridge
        self.peer = peer
        self.into = into
        self.clients: list[Client] = []

    async def client(self, client_id: str, topic_filter: str, *, qos: int) -> Client:
        client = await Client.connect(self.bridge.mqtt_port, client_id)
        self.clients.append(client)
        await client.subscribe((topic_filter, qos))
        return client


@pytest.fixture(scope="module")
def running(rocketmq: SharedRocketMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    into = f"in_{uuid.uuid4().hex[:12]}"
    rules: list[dict[str, Any]] = [{"id": "devices-in", "type": "inbound", "source": into, "target": "devices"}]
    bridge = new_bridge(tmp_path_factory.mktemp("bridge"), namesrv=rocketmq.namesrv, rules=rules)
    with RocketPeer(rocketmq.namesrv) as peer:
        peer.create_topic(into, queues=1)
        bridge.start()
        yield World(bridge, peer, into)
        bridge.kill()


@pytest.fixture
async def world(running: World) -> AsyncIterator[World]:
    yield running
    for client in running.clients:
        client.abort()
    running.clients.clear()
    await until(lambda: running.bridge.metric("mq2mqtt_connected_clients") == 0)


def _body(number: int) -> bytes:
    return b"%d" % number + b" " * _PAYLOAD_BYTES


def _row(traffic: str, sent: int, good: Client, *, note: str) -> FaultRow:
    return FaultRow.of(
        fault="two devices that never read",
        traffic=traffic,
        acknowledged={b"%d" % number for number in range(sent)},
        arrivals=[message.payload.rstrip() for message in good.messages],
        longest_stall=None,
        reason=note,
    )


async def test_under_a_fan_out_from_rocketmq(world: World, fault_table: FaultTable) -> None:
    good = await world.client("good", "devices/flood", qos=1)
    deaf = [await world.client(f"deaf-{qos}", "devices/flood", qos=qos) for qos in (0, 1)]
    # What the bridge needs for anybody is not counted against the deaf.
    await asyncio.to_thread(world.peer.send_many, world.into, [_body(0)] * 100, mqttSecondTopic="/flood")
    await good.wait_messages(100)
    good.messages.clear()
    for client in deaf:
        client.stop_reading()
    before, began = world.bridge.resident_bytes, time.monotonic()
    memory = 0
    for first in range(0, _FANOUT, 200):
        bodies = [_body(number) for number in range(first, first + 200)]
        await asyncio.to_thread(world.peer.send_many, world.into, bodies, mqttSecondTopic="/flood")
        memory = max(memory, world.bridge.resident_bytes)
    await until(lambda: len(good.messages) >= _FANOUT, seconds=240, what=world.bridge.describe())
    took = time.monotonic() - began
    metric = world.bridge.metric
    await until(lambda: metric("mq2mqtt_in_flight") == 0)
    await until(lambda: metric("mq2mqtt_consumer_lag") == 0)
    memory = max(memory, world.bridge.resident_bytes)
    note = f"{_FANOUT / took:.0f}/s to the device that reads, {_MEMORY[host()]} {(memory - before) / 2**20:+.0f} MiB"
    fault_table.add(_row("downlink fan-out, 4 kB, at full speed", _FANOUT, good, note=note))
    assert memory - before < _FANOUT_BYTES
    # Only they have the next one to themselves: its outcome is theirs.
    await good.unsubscribe("devices/flood")
    world.peer.send(world.into, _body(0), mqttSecondTopic="/flood")
    if host() == "amqtt":  # elsewhere nobody sees what a device does not take
        await until(lambda: metric("mq2mqtt_dropped_total", rule="devices-in", reason="slow_device") >= 1)
    await asyncio.to_thread(assert_invariants, world.bridge)


@pytest.mark.parametrize("qos", [0, 1])
async def test_under_a_stream_between_devices(world: World, fault_table: FaultTable, qos: int) -> None:
    good = await world.client("good", "local/flood", qos=qos)
    deaf = [await world.client(f"deaf-{number}", "local/flood", qos=qos) for number in range(2)]
    publisher = await Client.connect(world.bridge.mqtt_port, "publisher")
    world.clients.append(publisher)
    for client in deaf:
        client.stop_reading()
    before, began = world.bridge.resident_bytes, time.monotonic()
    memory = 0
    for first in range(0, _LOCAL, 50):
        for number in range(first, first + 50):
            publisher.send(publish_packet("local/flood", _body(number), qos=1, packet_id=number % 60_000 + 1))
        await publisher.wait(lambda: len(publisher.packets) >= first + 50)  # noqa: B023 - done at once
        memory = max(memory, world.bridge.resident_bytes)
    await until(lambda: len(good.messages) >= _LOCAL, seconds=240, what=world.bridge.describe())
    took = time.monotonic() - began
    memory = max(memory, world.bridge.resident_bytes)
    note = f"{_LOCAL / took:.0f}/s to the device that reads, {_MEMORY[host()]} {(memory - before) / 2**20:+.0f} MiB"
    fault_table.add(_row(f"device to device QoS {qos}, 4 kB, at full speed", _LOCAL, good, note=note))
    assert memory - before < _LOCAL_BYTES
