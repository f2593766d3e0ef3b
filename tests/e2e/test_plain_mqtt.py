"""The main job on a Mosquitto without the hook: `mq2mqtt sidecar` with `host.type: mqtt`, and a real RocketMQ."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.bridge_process import wait_for
from tests.conftest import SharedRocketMQ
from tests.device import Device
from tests.plain_bridge import PlainBridge
from tests.rocket_peer import RocketPeer, wait_for_messages
from tests.stream import Stream

pytestmark = pytest.mark.e2e


class World:
    """One bridge: `sensors` both ways, `devices` inbound only."""

    def __init__(self, bridge: PlainBridge, peer: RocketPeer, *, out: str, into: str) -> None:
        self.bridge = bridge
        self.peer = peer
        self.out = out
        self.into = into

    def device(self, client_id: str) -> Device:
        return Device(self.bridge.mqtt_port, client_id)


@pytest.fixture(scope="module")
def world(rocketmq: SharedRocketMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    out, into = f"out_{uuid.uuid4().hex[:12]}", f"in_{uuid.uuid4().hex[:12]}"
    rules: list[dict[str, Any]] = [
        {"id": "sensors-out", "type": "outbound", "source": "sensors", "target": out},
        {"id": "commands-in", "type": "inbound", "source": into, "target": "devices"},
        {"id": "sensors-in", "type": "inbound", "source": into, "target": "sensors", "tags": "BACK"},
    ]
    bridge = PlainBridge(tmp_path_factory.mktemp("bridge"), namesrv=rocketmq.namesrv, rules=rules)
    with RocketPeer(rocketmq.namesrv) as peer:
        peer.create_topic(out)
        peer.create_topic(into)
        bridge.start()
        yield World(bridge, peer, out=out, into=into)
    assert bridge.stop() == 0


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_publish_reaches_rocketmq(world: World, qos: int) -> None:
    payload = bytes(range(256)) + f"qos {qos}".encode()
    with world.peer.collect(world.out) as messages, world.device("sender") as device:
        device.publish("sensors/room1/temp", payload, qos=qos)
        wait_for(lambda: any(message.body == payload for message in messages))
    properties = next(message for message in messages if message.body == payload).properties
    assert properties["TAGS"] == "MQTT_COMMON"
    assert properties["mqttSecondTopic"] == "/room1/temp"
    assert properties["KEYS"].startswith("test:sensors-out:")
    # What a client of the broker is not told.
    assert properties["qoslevel"] == str(min(qos, 1))
    assert "clientId" not in properties


def test_a_topics_order_is_kept(world: World) -> None:
    with world.peer.collect(world.out) as messages, world.device("orderly") as device:
        for number in range(1000):
            device.publish(f"sensors/order/{number % 5}", b"%d" % number, qos=1, wait=False)
        device.wait_published()
        wait_for(
            lambda: sum("/order/" in message.properties.get("mqttSecondTopic", "") for message in messages) >= 1000
        )
    for topic in range(5):
        name = f"/order/{topic}"
        mine = [int(message.body) for message in messages if message.properties.get("mqttSecondTopic") == name]
        assert mine == list(range(topic, 1000, 5))


def test_messages_reach_subscribers_and_p2p_whoever_subscribes_to_its_address(world: World) -> None:
    with world.device("d1") as one, world.device("d2") as two:
        one.subscribe("devices/p2p/d1", qos=2)
        two.subscribe("devices/all/+", qos=2)
        for qos in range(3):
            world.peer.send(world.into, b"%d" % qos, mqttSecondTopic=f"/all/{qos}", qoslevel=str(qos))
        world.peer.send(world.into, b"for one", mqttSecondTopic="/p2p/d1", mqttRealTopic="shown")
        wait_for_messages(one.received, 1)
        wait_for_messages(two.received, 3)
    assert [(m.topic, m.payload) for m in one.received] == [("devices/p2p/d1", b"for one")]
    assert sorted((m.topic, m.payload, m.qos) for m in two.received) == [
        ("devices/all/0", b"0", 0),
        ("devices/all/1", b"1", 1),
        ("devices/all/2", b"2", 2),
    ]


def test_p2p_is_kept_for_nobody(world: World) -> None:
    def dropped() -> float:
        return world.bridge.metric("mq2mqtt_dropped_total", rule="commands-in", reason="not_persistent")

    before = dropped()
    world.peer.send(world.into, b"too early", mqttSecondTopic="/p2p/d3", cleansessionflag="false")
    wait_for(lambda: dropped() == before + 1)
    with world.device("d3") as device:
        device.subscribe("devices/p2p/d3", qos=1)
        world.peer.send(world.into, b"now", mqttSecondTopic="/p2p/d3", cleansessionflag="false")
        wait_for_messages(device.received, 1)
        assert [message.payload for message in device.received] == [b"now"]


def test_a_status_rule_is_down_with_one_reason(world: World) -> None:
    rules = world.bridge.config["rules"]
    rules.append({"id": "presence", "type": "status", "source": "GID_dev", "target": world.out})
    try:
        world.bridge.reload()
        reason = "a plain MQTT client cannot see who is connected: see docs/mqtt.md; set `enabled: false`"
        wait_for(lambda: world.bridge.readiness()["presence"]["reason"] == reason, what=world.bridge.readiness)
        assert {rule["state"] for rule in world.bridge.readiness().values()} == {"up", "down"}
    finally:
        rules.pop()
        world.bridge.reload()


def test_nothing_goes_round(world: World) -> None:
    with world.peer.collect(world.out) as messages, world.device("reader") as device:
        device.subscribe("sensors/#", qos=1)
        world.peer.send(world.into, b"to sensors", tag="BACK", mqttSecondTopic="/back")
        wait_for_messages(device.received, 1)
        device.publish("sensors/marker", b"a marker", qos=1)
        wait_for(lambda: any(message.body == b"a marker" for message in messages))
    assert not any(message.body == b"to sensors" for message in messages)


def test_mqtt_5_properties_go_both_ways(world: World) -> None:
    received: list[paho.MQTTMessage] = []
    client = paho.Client(CallbackAPIVersion.VERSION2, "five", protocol=paho.MQTTv5)
    client.on_message = lambda _, __, message: received.append(message)
    subscribed: list[object] = []
    client.on_subscribe = lambda *answer: subscribed.append(answer)
    client.connect("127.0.0.1", world.bridge.mqtt_port)
    client.loop_start()
    try:
        client.subscribe("devices/five", 1)
        wait_for(lambda: subscribed)
        user = '[{"key":"a","value":"1"},{"key":"a","value":"2"}]'
        carried = {"mqtt5UserProperty": user, "mqtt5ContentType": "t", "mqtt5MsgExpireInterval": "60"}
        world.peer.send(world.into, b"x", mqttSecondTopic="/five", **carried)
        wait_for_messages(received, 1)
        told: Any = received[0].properties
        assert (told.UserProperty, told.ContentType) == ([("a", "1"), ("a", "2")], "t")
        assert 0 < told.MessageExpiryInterval <= 60
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.UserProperty = [("a", "1"), ("a", "2")]
        properties.ContentType, properties.MessageExpiryInterval = "t", 600
        with world.peer.collect(world.out) as messages:
            client.publish("sensors/five", b"five", 1, properties=properties)
            wait_for(lambda: any(message.body == b"five" for message in messages))
    finally:
        client.disconnect()
        client.loop_stop()
    sent = next(message for message in messages if message.body == b"five").properties
    assert (sent["mqtt5UserProperty"], sent["mqtt5ContentType"], sent["topic"]) == (user, "t", "sensors/five")
    assert 0 < int(sent["mqtt5MsgExpireInterval"]) <= 600


def test_rules_come_and_go_while_it_runs(world: World) -> None:
    more = {"id": "more-out", "type": "outbound", "source": "more", "target": world.out}
    with world.peer.collect(world.out) as messages, world.device("reloader") as device:
        device.publish("more/x", b"too early", qos=1)
        world.bridge.config["rules"].append(more)
        world.bridge.reload()
        wait_for(lambda: world.bridge.readiness()["more-out"]["state"] == "up")
        device.publish("more/x", b"in time", qos=1)
        wait_for(lambda: any(message.body == b"in time" for message in messages))
        world.bridge.config["rules"].remove(more)
        world.bridge.reload()
        wait_for(lambda: "more-out" not in world.bridge.readiness())
    assert not any(message.body == b"too early" for message in messages)


def test_the_sidecar_killed_under_load_loses_nothing_that_was_acknowledged(world: World) -> None:
    stream = Stream(world.bridge.mqtt_port, "sensors/stream", rate=2000)
    with world.peer.collect_bodies(world.out) as bodies:
        stream.start()
        try:
            for _ in range(2):
                before = len(stream.acknowledged)
                wait_for(lambda before=before: len(stream.acknowledged) > before + 1000)
                world.bridge.kill()
                # The broker goes on, and keeps what comes.
                before = len(stream.acknowledged)
                wait_for(lambda before=before: len(stream.acknowledged) > before + 500)
                world.bridge.start()
        finally:
            stream.stop()
        wait_for(
            lambda: stream.acknowledged <= set(bodies),
            seconds=120,
            what=lambda: f"{len(stream.acknowledged - set(bodies))} lost",
        )
    assert stream.connections == 1


def test_the_broker_ends_and_comes_back(world: World) -> None:
    world.bridge.broker.kill()
    wait_for(lambda: all(rule["state"] == "down" for rule in world.bridge.readiness().values()))
    assert "cannot be used" in world.bridge.readiness()["commands-in"]["reason"]
    world.peer.send(world.into, b"meanwhile", mqttSecondTopic="/kept")
    world.bridge.broker.start()
    with world.peer.collect(world.out) as messages:
        wait_for(lambda: all(rule["state"] == "up" for rule in world.bridge.readiness().values()))
        with world.device("again") as device:
            device.publish("sensors/again", b"again", qos=1)
            wait_for(lambda: any(message.body == b"again" for message in messages))


def test_the_invariants_hold_when_all_is_quiet(world: World) -> None:
    def total(rule: str, *outcomes: str) -> float:
        return sum(world.bridge.metric("mq2mqtt_messages_total", rule=rule, outcome=outcome) for outcome in outcomes)

    downlink = ("delivered", "no_subscriber", "queued", "expired", "parked", "skipped", "dropped")
    wait_for(lambda: world.bridge.metric("mq2mqtt_lane_messages", rule="sensors-out") == 0)
    assert total("sensors-out", "accepted") == total("sensors-out", "sent", "parked") > 0
    wait_for(lambda: world.bridge.metric("mq2mqtt_in_flight", rule="commands-in") == 0)
    assert total("commands-in", "received") == total("commands-in", *downlink) > 0
    assert world.bridge.command("spool", "ls").returncode == 0


def test_a_wrong_login_is_one_clear_line(rocketmq: SharedRocketMQ, tmp_path: Path) -> None:
    bridge = PlainBridge(tmp_path, namesrv=rocketmq.namesrv, rules=[])
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    bridge.broker.options = ("allow_anonymous false", f"password_file {passwords}")
    bridge.config["host"] |= {"username": "u", "password": "hunter2"}
    try:
        bridge.start(ready=False)
        wait_for(lambda: "cannot be used" in bridge.log_file.read_text())
        lines = bridge.log_file.read_text().splitlines()
        assert len([line for line in lines if "cannot be used" in line]) == 1
        assert not any("hunter2" in line or "Traceback" in line for line in lines)
    finally:
        assert bridge.stop() == 0
