"""What nobody should send, from RocketMQ and from devices, in the middle of streams: the rest flows, in order."""

import asyncio
import itertools
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.bridge_process import BridgeProcess
from tests.conftest import SharedRocketMQ
from tests.faults.report import FaultRow, FaultTable, assert_invariants
from tests.mqtt_client import Client, connect_packet, packet, publish_packet, text
from tests.new_bridge import new_bridge
from tests.rocket_peer import RocketPeer
from tests.stream import Stream
from tests.waiting import until

pytestmark = pytest.mark.faults

_MAX_BODY = 4 * 1024 * 1024  # RocketMQ's
_ROUNDS = 3


@dataclass(frozen=True)
class Odd:
    """A RocketMQ message outside the contract, and what becomes of it."""

    outcome: str
    properties: dict[str, str] = field(default_factory=dict)
    body: bytes = b"odd"
    tag: str | None = "MQ2MQTT"
    ignored: str | None = None
    """The property that is counted as invalid."""
    payload: bytes | None = None
    """What the device gets of one that is delivered, if not the body."""


_ODD = (
    Odd("parked", {"mqttSecondTopic": "/a/#"}),
    Odd("parked", {"mqttSecondTopic": "/+/a"}),
    Odd("parked", {"mqttSecondTopic": "/a\0b"}),
    Odd("parked", {"mqttSecondTopic": "/p2p/"}),
    Odd("skipped", {"mqttSecondTopic": "/odd", "mq2mqttNode": "another"}),
    Odd("not asked for", {"mqttSecondTopic": "/odd"}, tag="OTHER"),
    Odd("not asked for", {"mqttSecondTopic": "/odd"}, tag=None),
    Odd("delivered", {"mqttSecondTopic": "/odd", "qoslevel": "3"}, ignored="qoslevel"),
    Odd("delivered", {"mqttSecondTopic": "/odd", "qoslevel": "high"}, ignored="qoslevel"),
    Odd("delivered", {"mqttSecondTopic": "/odd", "cleansessionflag": "maybe"}, ignored="cleansessionflag"),
    Odd("delivered", {"mqttSecondTopic": "/odd", "mqttRealTopic": "/a/#"}, ignored="mqttRealTopic"),
    Odd("delivered", {"mqttSecondTopic": "/odd", "mqtt5UserProperty": "[{"}, ignored="mqtt5UserProperty"),
    Odd("delivered", {"mqttSecondTopic": "/odd/" + "x" * 31_000}),
    Odd("delivered", {"mqttSecondTopic": "/odd", "mqttEmptyPayload": "true"}, body=b" ", payload=b""),
    Odd("delivered", {"mqttSecondTopic": "/odd"}, body=bytes(range(256))),
    Odd("delivered", {"mqttSecondTopic": "/odd"}, body=b"\0" * _MAX_BODY),
)


class World:
    def __init__(self, bridge: BridgeProcess, peer: RocketPeer, *, out: str, into: str, broker_address: str) -> None:
        self.bridge = bridge
        self.peer = peer
        self.out = out
        self.into = into
        self.broker_address = broker_address

    def outcome(self, rule: str, outcome: str) -> float:
        return self.bridge.metric("mq2mqtt_messages_total", rule=rule, outcome=outcome)


@pytest.fixture(scope="module")
def world(rocketmq: SharedRocketMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    name = uuid.uuid4().hex[:12]
    out, into = f"out_{name}", f"in_{name}"
    rules: list[dict[str, Any]] = [
        {"id": "stream-out", "type": "outbound", "source": "stream", "target": out},
        {"id": "devices-in", "type": "inbound", "source": into, "target": "devices"},
    ]
    bridge = new_bridge(tmp_path_factory.mktemp("bridge"), namesrv=rocketmq.namesrv, rules=rules)
    with RocketPeer(rocketmq.namesrv) as peer:
        peer.create_topic(out)
        peer.create_topic(into, queues=1)
        bridge.start()
        yield World(bridge, peer, out=out, into=into, broker_address=rocketmq.broker_address)
        bridge.kill()


async def test_odd_messages_from_rocketmq(world: World, fault_table: FaultTable) -> None:
    device = await Client.connect(world.bridge.mqtt_port, "GID_dev@@@1")
    await device.subscribe(("devices/#", 1))
    before = await asyncio.to_thread(_down_counts, world)
    numbers = itertools.count()
    sent = await asyncio.to_thread(_send_all, world, numbers)
    await until(lambda: sum(message.topic == "devices/n" for message in device.messages) == sent, seconds=60)
    await until(lambda: world.bridge.metric("mq2mqtt_in_flight") == 0)
    arrivals = [message.payload for message in device.messages if message.topic == "devices/n"]
    fault_table.add(
        FaultRow.of(
            fault="malformed messages in between",
            traffic="downlink QoS 1",
            acknowledged={b"%d" % number for number in range(sent)},
            arrivals=arrivals,
            longest_stall=None,
        )
    )
    odd = [message.payload for message in device.messages if message.topic != "devices/n"]
    delivered = [one.body if one.payload is None else one.payload for one in _ODD if one.outcome == "delivered"]
    assert odd == delivered * _ROUNDS
    after = await asyncio.to_thread(_down_counts, world)
    for outcome in ("parked", "skipped"):
        expected = _ROUNDS * sum(one.outcome == outcome for one in _ODD)
        assert after[outcome] - before[outcome] == expected, outcome
    assert after["unreadable"] - before["unreadable"] == 2 * _ROUNDS
    for name in {one.ignored for one in _ODD if one.ignored}:
        expected = _ROUNDS * sum(one.ignored == name for one in _ODD)
        assert world.bridge.metric("mq2mqtt_invalid_properties_total", rule="devices-in", property=name) == expected
    await asyncio.to_thread(assert_invariants, world.bridge)
    assert world.bridge.get("/readyz")[0] == 200
    await device.disconnect()


def _down_counts(world: World) -> dict[str, float]:
    counts = {outcome: world.outcome("devices-in", outcome) for outcome in ("parked", "skipped")}
    counts["unreadable"] = world.bridge.metric("mq2mqtt_dropped_total", rule="devices-in", reason="unreadable")
    return counts


def _send_all(world: World, numbers: Iterator[int]) -> int:
    """Send every kind of odd message, ordinary ones around each; return how many of those."""

    def ordinary() -> int:
        number = next(numbers)
        world.peer.send(world.into, b"%d" % number, mqttSecondTopic="/n")
        return number

    for _ in range(_ROUNDS):
        for one in _ODD:
            ordinary()
            world.peer.send(world.into, one.body, tag=one.tag, **one.properties)
        ordinary()
        world.peer.send_not_utf8(world.into, broker_address=world.broker_address)
        ordinary()
        world.peer.send_not_compressed(world.into, broker_address=world.broker_address)
    return ordinary() + 1


def _unfinished() -> list[bytes]:
    """Packets that announce more than ever comes: the connection waits for it."""
    connect = connect_packet("GID_bad@@@1")
    return [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", connect[:8], connect + packet(0x32, bytes(100))[:50]]


def _garbage() -> list[bytes]:
    """What each of some connections sends after CONNECT, or instead of it; all of it ends the connection."""
    connect = connect_packet("GID_bad@@@1")
    return [
        bytes(64),
        b"\xff" * 64,
        connect + connect,
        connect + b"\x30\xff\xff\xff\xff\x7f",
        connect + packet(0x36, text("stream/x") + b"\0\1payload"),
        connect + packet(0x32, text("stream/x") + b"\0\0payload"),
        connect + packet(0x32, b"\xff\xffstream/x"),
        connect + packet(0x30, text(b"stream/\xff\xfe")),
        connect + packet(0x30, text(b"stream/\xed\xa0\x80")),
        connect + publish_packet("stream/+", b"x", qos=1, packet_id=1),
        connect + publish_packet("stream/#", b"x", qos=1, packet_id=1),
        connect + publish_packet("stream/\0", b"x", qos=1, packet_id=1),
        connect + publish_packet("", b"x", qos=1, packet_id=1),
        connect + packet(0x90, b"\0\1\0"),
        connect + packet(0xF0, b""),
    ]


_UNMAPPABLE = (
    ("stream/" + "x" * 32_000, b"topic too long for properties"),
    ("stream/\x01", b"a separator of properties"),
    ("stream/x", bytes(_MAX_BODY + 1)),
)


@pytest.mark.amqtt("Mosquitto decides what is malformed, and its own tests show it")
async def test_malformed_packets_from_devices(world: World, fault_table: FaultTable) -> None:
    port = world.bridge.mqtt_port
    streams = [Stream(port, "stream/x", rate=100, qos=qos, client_id=f"GID_good@@@{qos}") for qos in (1, 2)]
    for stream in streams:
        stream.start()
    parked = await asyncio.to_thread(world.outcome, "stream-out", "parked")
    try:
        await until(lambda: all(len(stream.acknowledged) > 50 for stream in streams))
        for _ in range(_ROUNDS):
            for data in _garbage():
                bad = await Client.open(port)
                bad.send(data)
                await bad.wait_closed()
                await bad.drop()
            for data in _unfinished():
                bad = await Client.open(port)
                bad.send(data)
                await bad.drop()
            odd = await Client.connect(port, "GID_odd@@@1")
            for topic, payload in _UNMAPPABLE:
                await odd.publish(topic, payload, qos=1)
            await odd.disconnect()
    finally:
        for stream in streams:
            await asyncio.to_thread(stream.stop)
    await until(lambda: world.bridge.metric("mq2mqtt_lane_messages") == 0)
    assert world.outcome("stream-out", "parked") - parked == _ROUNDS * len(_UNMAPPABLE)
    await asyncio.to_thread(assert_invariants, world.bridge)
    with world.peer.collect(world.out) as messages:
        wanted = {(stream.client_id, body) for stream in streams for body in stream.acknowledged}
        await until(lambda: wanted <= {(m.properties["clientId"], m.body) for m in messages}, seconds=60)
        for qos, stream in enumerate(streams, 1):
            fault_table.add(
                FaultRow.of(
                    fault="malformed packets in between",
                    traffic=f"uplink QoS {qos}, 100/s",
                    acknowledged=stream.acknowledged,
                    arrivals=[m.body for m in messages if m.properties["clientId"] == stream.client_id],
                    longest_stall=stream.longest_stall,
                )
            )
    # Nothing of a connection that was closed for its packet was exported.
    assert {m.properties["clientId"] for m in messages} == {stream.client_id for stream in streams}
    assert world.bridge.get("/readyz")[0] == 200
    assert "Traceback" not in world.bridge.log_file.read_text()
