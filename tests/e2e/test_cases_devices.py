"""What devices do to the broker with the bridge in it: come back, go without a word, take over, fall silent."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.bridge_process import BridgeProcess
from tests.conftest import SharedRocketMQ
from tests.mqtt_client import PUBCOMP, PUBREC, PUBREL, Client, ack_packet, publish_packet
from tests.new_bridge import new_bridge, on_amqtt
from tests.rocket_peer import RocketPeer
from tests.waiting import until

pytestmark = pytest.mark.e2e


class World:
    def __init__(self, bridge: BridgeProcess, peer: RocketPeer, *, into: str, exported: list[Any]) -> None:
        self.bridge = bridge
        self.peer = peer
        self.into = into
        self._exported = exported
        self._clients: list[Client] = []

    async def client(self, client_id: str, **options: Any) -> Client:  # noqa: ANN401 - those of Client.connect
        client = await Client.connect(self.bridge.mqtt_port, client_id, **options)
        self._clients.append(client)
        return client

    def exported(self, client_id: str) -> list[bytes]:
        return [message.body for message in self._exported if message.properties.get("clientId") == client_id]

    async def end(self) -> None:
        for client in self._clients:
            await client.drop()
        self._clients.clear()


@pytest.fixture(scope="module")
def running(rocketmq: SharedRocketMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    out, into = f"out_{uuid.uuid4().hex[:12]}", f"in_{uuid.uuid4().hex[:12]}"
    rules: list[dict[str, Any]] = [
        {"id": "sensors-out", "type": "outbound", "source": "sensors", "target": out},
        {"id": "devices-in", "type": "inbound", "source": into, "target": "devices"},
    ]
    bridge = new_bridge(tmp_path_factory.mktemp("bridge"), namesrv=rocketmq.namesrv, rules=rules)
    with RocketPeer(rocketmq.namesrv) as peer:
        peer.create_topic(out)
        peer.create_topic(into)
        bridge.start()
        with peer.collect(out) as messages:
            yield World(bridge, peer, into=into, exported=messages)
    assert bridge.stop() == 0


@pytest.fixture
async def world(running: World) -> AsyncIterator[World]:
    yield running
    await running.end()


async def test_a_qos_2_publish_that_is_sent_again_over_connections(world: World) -> None:
    again = publish_packet("sensors/x", b"once", qos=2, packet_id=7, dup=True)
    device = await world.client("repeater", clean=False)
    device.send(publish_packet("sensors/x", b"once", qos=2, packet_id=7))
    await device.wait_packet(PUBREC, 7)
    device.send(again)
    await device.wait_packet(PUBREC, 7)
    await device.drop()
    device = await world.client("repeater", clean=False)
    device.send(again)
    await device.wait_packet(PUBREC, 7)
    for _ in range(2):
        device.send(ack_packet(PUBREL, 7))
        await device.wait_packet(PUBCOMP, 7)
    await device.publish("sensors/x", b"end", qos=1)
    await until(lambda: world.exported("repeater")[-1:] == [b"end"])
    # Mosquitto shows its plugins a QoS 2 publish each time it comes.
    assert world.exported("repeater") == [b"once"] * (1 if on_amqtt() else 3) + [b"end"]


async def test_a_pubrel_on_the_next_connection_exports_the_message(world: World) -> None:
    device = await world.client("releaser", clean=False)
    device.send(publish_packet("sensors/x", b"held", qos=2, packet_id=9))
    await device.wait_packet(PUBREC, 9)
    await device.drop()
    if on_amqtt():
        assert world.exported("releaser") == []
    else:
        # In the lane before PUBREC.
        await until(lambda: world.exported("releaser") == [b"held"])
    device = await world.client("releaser", clean=False)
    device.send(ack_packet(PUBREL, 9))
    await device.wait_packet(PUBCOMP, 9)
    await device.publish("sensors/x", b"end", qos=1)
    await until(lambda: world.exported("releaser") == [b"held", b"end"])


async def test_retained_publishes_and_their_deletion_are_exported_once(world: World) -> None:
    device, witness = await world.client("retainer"), await world.client("retain-witness")
    await witness.subscribe(("sensors/state", 1))
    await device.publish("sensors/state", b"on", qos=1, retain=True)
    # amqtt routes and retains a publish after its PUBACK.
    await witness.wait_messages(1)
    late = await world.client("late")
    await late.subscribe(("sensors/state", 1))
    (message,) = await late.wait_messages(1)
    assert (message.payload, message.retain) == (b"on", True)
    await device.publish("sensors/state", b"", qos=2, retain=True)
    await until(lambda: len(world.exported("retainer")) == 2)
    later = await world.client("later")
    await later.subscribe(("sensors/#", 1))
    await later.ping()
    assert (later.messages, world.exported("retainer")) == ([], [b"on", b" "])


async def test_an_inbound_message_does_not_touch_what_is_retained(world: World) -> None:
    device, witness = await world.client("keeper"), await world.client("witness")
    await witness.subscribe(("devices/state", 1))
    await device.publish("devices/state", b"kept", qos=1, retain=True)
    # amqtt routes and retains a publish after its PUBACK.
    await witness.wait_messages(1)
    await device.subscribe(("devices/state", 1))
    await device.wait_messages(1)
    world.peer.send(world.into, b"passing", mqttSecondTopic="/state")
    await device.wait_messages(2)
    assert [(m.payload, m.retain) for m in device.messages] == [(b"kept", True), (b"passing", False)]
    late = await world.client("late-keeper")
    await late.subscribe(("devices/state", 1))
    assert [m.payload for m in await late.wait_messages(1)] == [b"kept"]
    await device.publish("devices/state", b"", qos=1, retain=True)


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_wills(world: World, qos: int) -> None:
    name = f"mortal-{qos}"
    device = await world.client(name, will=(f"sensors/{name}", b"gone", qos, False))
    device.abort()
    await until(lambda: world.exported(name) == [b"gone"])


async def test_a_will_after_a_protocol_error_and_none_after_disconnect(world: World) -> None:
    polite = await world.client("polite", will=("sensors/x", b"never", 1, False))
    await polite.disconnect()
    rude = await world.client("rude", will=("sensors/x", b"bye", 1, False))
    rude.send(b"\0\0")
    await rude.wait_closed()
    await until(lambda: world.exported("rude") == [b"bye"])
    assert world.exported("polite") == []


async def test_a_private_will_reaches_its_target_alone(world: World) -> None:
    target, spy = await world.client("heir"), await world.client("spy")
    await spy.subscribe(("sensors/#", 1))
    device = await world.client("testator", will=("sensors/p2p/heir", b"secret", 1, True))
    device.abort()
    (message,) = await target.wait_messages(1)
    await spy.ping()
    assert (message.payload, message.retain, spy.messages) == (b"secret", False, [])


@pytest.mark.parametrize("clean", [True, False])
async def test_take_over_under_traffic(world: World, *, clean: bool) -> None:
    name = f"twin-{clean}"
    device = await world.client(name, clean=clean)
    for number in range(5):
        await device.subscribe((f"devices/{name}", 1))
        await asyncio.to_thread(world.peer.send_many, world.into, [b"x"] * 50, mqttSecondTopic=f"/{name}")
        await device.publish("sensors/x", b"%d" % number, qos=1)
        successor = await world.client(name, clean=clean)
        await device.wait_closed()
        device = successor
    if clean:
        await device.subscribe((f"devices/{name}", 1))
    world.peer.send(world.into, b"the last", mqttSecondTopic=f"/{name}")
    await until(lambda: any(message.payload == b"the last" for message in device.messages))
    await until(lambda: world.exported(name) == [b"%d" % number for number in range(5)])


async def test_a_subscription_can_change_its_qos_and_end(world: World) -> None:
    device = await world.client("changer")
    for qos in (2, 0, 1):
        await device.subscribe(("devices/change/+", qos))
        device.messages.clear()
        world.peer.send(world.into, b"x", mqttSecondTopic="/change/x", qoslevel="2")
        assert [message.qos for message in await device.wait_messages(1)] == [qos]
    await device.subscribe(("devices/change/#", 2), ("devices/#", 0))
    device.messages.clear()
    world.peer.send_many(world.into, [b"a", b"b"], mqttSecondTopic="/change/x", qoslevel="2")
    await device.wait_messages(2)
    # Mosquitto takes the first of overlapping subscriptions, not the one of the highest QoS.
    qos = 2 if on_amqtt() else 1
    assert [(message.payload, message.qos) for message in device.messages] == [(b"a", qos), (b"b", qos)]
    await device.unsubscribe("devices/change/+", "devices/change/#")
    device.messages.clear()
    world.peer.send(world.into, b"x", mqttSecondTopic="/change/x", qoslevel="2")
    assert [message.qos for message in await device.wait_messages(1)] == [0]


async def test_devices_that_do_not_read_or_acknowledge_hold_up_nobody(world: World) -> None:
    silent, deaf = await world.client("silent", acknowledge=False), await world.client("deaf")
    good = await world.client("good")
    for device in (silent, deaf, good):
        await device.subscribe(("devices/flood", 1))
    deaf.stop_reading()
    for _ in range(120):
        await asyncio.to_thread(world.peer.send_many, world.into, [bytes(1000)] * 50, mqttSecondTopic="/flood")
    await good.wait_messages(6000)
    await until(lambda: world.bridge.metric("mq2mqtt_in_flight", rule="devices-in") == 0)
    outcomes = world.bridge.metric("mq2mqtt_messages_total", rule="devices-in")
    received = world.bridge.metric("mq2mqtt_messages_total", rule="devices-in", outcome="received")
    assert outcomes == 2 * received


async def test_legacy_requests_are_acknowledged_and_what_is_no_topic_is_refused(world: World) -> None:
    device = await world.client("legacy")
    for topic in ("$SYS/enableOrderMsg", "$SYS/getOfflineMsg"):
        await device.publish(topic, b"{}", qos=1)
    await device.publish("sensors/x", b"only this", qos=1)
    await until(lambda: world.exported("legacy") == [b"only this"])
    # Mosquitto takes what is published to any `$SYS` topic, and keeps it from everybody.
    for topic in (*(("$SYS/x",) if on_amqtt() else ()), "sensors/+", "sensors/#"):
        device = await world.client("refused")
        device.send(publish_packet(topic, b"x", qos=1, packet_id=1))
        await device.wait_closed()
    assert world.exported("refused") == []
