"""Names and properties at their edges, both ways, through the whole product."""

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bridge_process import BridgeProcess
from tests.conftest import SharedRocketMQ
from tests.mqtt_client import Client, Message, publish_packet
from tests.new_bridge import new_bridge, on_amqtt
from tests.rocket_peer import RocketPeer
from tests.waiting import until

pytestmark = pytest.mark.e2e

_MIB = 1 << 20


class World:
    def __init__(self, bridge: BridgeProcess, peer: RocketPeer, *, out: str, into: str) -> None:
        self.bridge = bridge
        self.peer = peer
        self.out = out
        self.into = into


@pytest.fixture(scope="module")
def world(rocketmq: SharedRocketMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    out, into = f"out_{uuid.uuid4().hex[:12]}", f"in_{uuid.uuid4().hex[:12]}"
    rules: list[dict[str, Any]] = [
        {"id": "sensors-out", "type": "outbound", "source": "sensors", "target": out},
        {"id": "cyrillic-out", "type": "outbound", "source": "датчики", "target": out},
        {"id": "mapping-in", "type": "inbound", "source": into, "target": "devices"},
    ]
    bridge = new_bridge(tmp_path_factory.mktemp("bridge"), namesrv=rocketmq.namesrv, rules=rules)
    with RocketPeer(rocketmq.namesrv) as peer:
        peer.create_topic(out)
        peer.create_topic(into)
        bridge.start()
        yield World(bridge, peer, out=out, into=into)
    assert bridge.stop() == 0


@pytest.fixture
async def device(world: World) -> AsyncIterator[Client]:
    client = await Client.connect(world.bridge.mqtt_port, "dev")
    yield client
    await client.drop()


@pytest.mark.parametrize(
    ("topic", "second"),
    [
        ("sensors", None),
        ("sensors/", "/"),
        ("sensors//x", "//x"),
        ("sensors///", "///"),
        ("sensors/a/", "/a/"),
        ("sensors/日本語/🚀", "/日本語/🚀"),
        ("sensors/ with space ", "/ with space "),
        ("sensors/p2p/", "/p2p/"),
        ("sensors/p2p/a/b", "/p2p/a/b"),
        ("sensors/" + "é" * 3000, "/" + "é" * 3000),
        ("датчики/ы", "/ы"),
    ],
)
async def test_topics_outbound(world: World, topic: str, second: str | None) -> None:
    client_id = f"GID_x@@@ünï/+#客户 {uuid.uuid4().hex}"
    client = await Client.connect(world.bridge.mqtt_port, client_id)
    with world.peer.collect(world.out) as messages:
        await client.publish(topic, b"\0\xff", qos=1)
        await until(lambda: any(message.properties.get("clientId") == client_id for message in messages))
    message = next(message for message in messages if message.properties.get("clientId") == client_id)
    assert (message.body, message.properties.get("mqttSecondTopic")) == (b"\0\xff", second)
    await client.drop()


@pytest.mark.parametrize("topic", ["/sensors/x", "Sensors/x", "sensorsx", "x/sensors"])
async def test_topics_that_only_look_like_the_rules(world: World, device: Client, topic: str) -> None:
    def accepted() -> float:
        return world.bridge.metric("mq2mqtt_messages_total", outcome="accepted")

    before = accepted()
    await device.publish(topic, b"x", qos=1)
    await device.publish("sensors/marker", b"x", qos=1)
    # On Mosquitto it is counted when the sidecar reads it.
    await until(lambda: accepted() > before)
    assert accepted() == before + 1


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("sensors/" + "y" * 32_500, b"x"),
        ("sensors/" + "y" * 60_000, b"x"),
        ("sensors/x", bytes(5 * _MIB)),
    ],
    ids=["32 KB topic", "60 KB topic", "5 MiB"],
)
async def test_what_rocketmq_cannot_carry_is_parked(world: World, device: Client, topic: str, payload: bytes) -> None:
    await _expect_parked(world, device, topic, payload)


async def test_rocketmqs_separator_in_a_topic(world: World, device: Client) -> None:
    if on_amqtt():
        await _expect_parked(world, device, "sensors/\x01", b"x")
        return
    # Mosquitto takes no control characters.
    device.send(publish_packet("sensors/\x01", b"x", qos=1, packet_id=1))
    await device.wait_closed()
    assert device.packets == []


async def _expect_parked(world: World, device: Client, topic: str, payload: bytes) -> None:
    before = world.bridge.metric("mq2mqtt_parked_messages", rule="sensors-out")
    with world.peer.collect(world.out) as messages:
        await device.publish(topic, payload, qos=2)
        await device.publish("sensors/marker", topic[:20].encode() + b" marker", qos=1)
        await until(lambda: any(message.body.endswith(b"marker") for message in messages))
        await until(lambda: world.bridge.metric("mq2mqtt_parked_messages", rule="sensors-out") == before + 1)


async def test_a_mebibyte_of_zeros_both_ways(world: World, device: Client) -> None:
    with world.peer.collect(world.out) as messages:
        await device.publish("sensors/big", bytes(_MIB), qos=2)
        await until(lambda: any(message.body == bytes(_MIB) for message in messages))
    await device.subscribe(("devices/big", 2))
    world.peer.send(world.into, bytes(_MIB), mqttSecondTopic="/big", qoslevel="2")
    (message,) = await device.wait_messages(1)
    assert (message.payload, message.qos) == (bytes(_MIB), 2)


async def _receive(world: World, device: Client, **properties: str) -> list[Message]:
    """Send one message and a marker behind it in the same queue; return what comes before the marker."""
    await device.subscribe(("#", 2))
    device.messages.clear()
    world.peer.send_many(world.into, [b"it", b"marker"], **properties)
    await until(lambda: any(message.payload == b"marker" for message in device.messages))
    return [message for message in device.messages if message.payload == b"it"]


@pytest.mark.parametrize(
    ("properties", "topic", "qos"),
    [
        ({}, "devices", 1),
        ({"mqttSecondTopic": "/"}, "devices/", 1),
        ({"mqttSecondTopic": "x"}, "devices/x", 1),
        ({"mqttSecondTopic": "//x"}, "devices//x", 1),
        ({"mqttSecondTopic": "/x/"}, "devices/x/", 1),
        ({"mqttSecondTopic": "/日本/🚀"}, "devices/日本/🚀", 1),
        ({"mqttSecondTopic": "/$SYS/x"}, "devices/$SYS/x", 1),
        ({"mqttSecondTopic": "/p2p"}, "devices/p2p", 1),
        ({"mqttSecondTopic": "/p2p/dev", "qoslevel": "0"}, "devices/p2p/dev", 0),
        ({"mqttSecondTopic": "p2p/dev", "mqttRealTopic": "devices/alarm"}, "devices/alarm", 1),
        ({"mqttSecondTopic": "/p2p/dev", "mqttRealTopic": "bad/#"}, "devices/p2p/dev", 1),
        ({"mqttSecondTopic": "/q", "qoslevel": "01", "cleansessionflag": "maybe"}, "devices/q", 1),
        ({"mqttSecondTopic": "/q", "qoslevel": "2", "mqtt5UserProperty": "{"}, "devices/q", 2),
    ],
)
async def test_properties_inbound(
    world: World, device: Client, properties: dict[str, str], topic: str, qos: int
) -> None:
    assert [(m.topic, m.qos, m.retain) for m in await _receive(world, device, **properties)] == [(topic, qos, False)]


@pytest.mark.parametrize(("real", "shown"), [("/shown/", "devices/shown/"), ("devicesX/y", "devices/devicesX/y")])
async def test_the_topic_that_receivers_are_shown(world: World, device: Client, real: str, shown: str) -> None:
    def ignored() -> float:
        return world.bridge.metric("mq2mqtt_invalid_properties_total", rule="mapping-in", property="mqttRealTopic")

    before = ignored()
    (message,) = await _receive(world, device, mqttSecondTopic="/r", mqttRealTopic=real)
    # Mosquitto shows everybody the topic that is published to: ignored, in the message and in its marker.
    assert (message.topic, ignored() - before) == ((shown, 0) if on_amqtt() else ("devices/r", 2))


async def test_everything_is_counted_once(world: World) -> None:
    def total(rule: str, *outcomes: str) -> float:
        return sum(world.bridge.metric("mq2mqtt_messages_total", rule=rule, outcome=outcome) for outcome in outcomes)

    await until(lambda: world.bridge.metric("mq2mqtt_lane_messages") == 0)
    assert total("sensors-out", "accepted") == total("sensors-out", "sent", "parked") > 0
    # A device that has just gone leaves its last message unacknowledged.
    await until(lambda: world.bridge.metric("mq2mqtt_in_flight", rule="mapping-in") == 0)
    assert total("mapping-in", "received") == total("mapping-in", "delivered", "no_subscriber", "dropped") > 0


def test_the_spool_can_be_looked_at_while_the_bridge_runs(world: World) -> None:
    lanes = world.bridge.command("spool", "ls")
    assert (lanes.returncode, lanes.stderr) == (0, "")
    assert lanes.stdout.splitlines()[-1].split()[:3] == ["sensors-out", world.out, "0"]
    parked = world.bridge.command("parked", "ls")
    assert parked.returncode == 0
    assert "payload of 5242880 bytes" in parked.stdout
    shown = world.bridge.command("parked", "show", "sensors-out")
    assert shown.returncode == 0
    assert "MQTT topic" in shown.stdout


def test_no_error_was_logged(world: World) -> None:
    text = Path(world.bridge.log_file).read_text()
    assert "ERROR" not in text
    assert "Traceback" not in text
