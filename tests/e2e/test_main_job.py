"""The main job as a user sees it: `mq2mqtt run` as a process, paho-mqtt devices, a RocketMQ application."""

import asyncio
import base64
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest

from mq2mqtt.quickstart.drivers import make_group, make_topic
from mq2mqtt.settings import RocketMQSettings
from tests.bridge_process import BridgeProcess, wait_for
from tests.conftest import SharedRocketMQ
from tests.device import Device
from tests.java_peer import JavaPeer, run_java_peer
from tests.new_bridge import new_bridge
from tests.rocket_peer import RocketPeer, wait_for_messages

pytestmark = [pytest.mark.e2e, pytest.mark.versions]


class World:
    """One bridge with an outbound and an inbound rule, and a RocketMQ application beside it."""

    def __init__(self, bridge: BridgeProcess, peer: RocketPeer, *, out: str, into: str) -> None:
        self.bridge = bridge
        self.peer = peer
        self.out = out
        self.into = into

    def device(self, client_id: str, *, clean: bool = True) -> Device:
        return Device(self.bridge.mqtt_port, client_id, clean=clean)


@pytest.fixture(scope="module")
def world(
    rocketmq: SharedRocketMQ, link_settings: RocketMQSettings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    out, into = f"out_{uuid.uuid4().hex[:12]}", f"in_{uuid.uuid4().hex[:12]}"
    rules: list[dict[str, Any]] = [
        {"id": "sensors-out", "type": "outbound", "source": "sensors", "target": out},
        {"id": "commands-in", "type": "inbound", "source": into, "target": "devices"},
    ]
    bridge = new_bridge(tmp_path_factory.mktemp("bridge"), namesrv=rocketmq.namesrv, rules=rules)
    bridge.config["rocketmq"] = link_settings.model_dump(exclude_none=True)
    with RocketPeer(rocketmq.namesrv) as peer:
        for topic in (out, into):
            asyncio.run(make_topic(link_settings.driver, rocketmq.namesrv, topic))
        group = f"GID_mq2mqtt_commands-in_{bridge.config['node']}"
        asyncio.run(make_group(link_settings.driver, rocketmq.namesrv, group))
        bridge.start()
        yield World(bridge, peer, out=out, into=into)
    assert bridge.stop() == 0


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_publish_reaches_rocketmq_with_the_property_contract(world: World, qos: int) -> None:
    payload = bytes(range(256)) + f"qos {qos}".encode()
    with world.peer.collect(world.out) as messages, world.device(f"GID_dev@@@q{qos}", clean=qos != 1) as device:
        device.publish("sensors/room1/temp", payload, qos=qos)
        wait_for(lambda: any(message.body == payload for message in messages))
    message = next(message for message in messages if message.body == payload)
    properties = message.properties
    assert properties["TAGS"] == "MQTT_COMMON"
    assert properties["qoslevel"] == str(qos)
    assert properties["cleansessionflag"] == ("false" if qos == 1 else "true")
    assert properties["mqttSecondTopic"] == "/room1/temp"
    assert properties["clientId"] == f"GID_dev@@@q{qos}"
    assert properties["mq2mqttNode"] == "test"
    assert properties["KEYS"].startswith("test:sensors-out:")


def test_one_clients_order_is_kept_and_keys_are_unique(world: World) -> None:
    with world.peer.collect(world.out) as messages, world.device("orderly") as device:
        for number in range(2000):
            device.publish("sensors/n", b"order %d" % number, qos=1, wait=False)
        device.wait_published()
        wait_for(
            lambda: sum(message.properties.get("clientId") == "orderly" for message in messages) == 2000, seconds=60
        )
    mine = [message for message in messages if message.properties.get("clientId") == "orderly"]
    assert [message.body for message in mine] == [b"order %d" % number for number in range(2000)]
    assert len({message.properties["KEYS"] for message in mine}) == 2000


def test_topics_of_no_rule_stay_in_the_broker(world: World) -> None:
    with world.peer.collect(world.out) as messages, world.device("a") as device, world.device("b") as other:
        other.subscribe("sensors2/#", qos=1)
        device.publish("sensors2/x", b"not for rocketmq", qos=1)
        device.publish("sensors/x", b"the marker", qos=1)
        wait_for_messages(other.received, 1)
        wait_for(lambda: any(message.body == b"the marker" for message in messages))
    assert not any(message.body == b"not for rocketmq" for message in messages)


def test_an_empty_payload_makes_the_round_trip(world: World) -> None:
    with world.peer.collect(world.out) as messages, world.device("empty") as device:
        device.publish("sensors/empty", b"", qos=1)
        wait_for(lambda: any(message.properties.get("clientId") == "empty" for message in messages))
        message = next(message for message in messages if message.properties.get("clientId") == "empty")
        assert (message.body, message.properties["mqttEmptyPayload"]) == (b" ", "true")
        device.subscribe("devices/empty", qos=1)
        world.peer.send(world.into, b" ", mqttSecondTopic="/empty", mqttEmptyPayload="true")
        wait_for_messages(device.received, 1)
    assert device.received[0].payload == b""


@pytest.mark.parametrize(
    ("message_qos", "granted", "delivered"), [(0, 2, 0), (1, 2, 1), (2, 2, 2), (2, 1, 1), (1, 0, 0), (2, 0, 0)]
)
def test_fan_out_takes_the_smaller_qos(world: World, message_qos: int, granted: int, delivered: int) -> None:
    name = f"fan{message_qos}{granted}"
    with world.device(name) as device, world.device(f"{name}-other") as other:
        device.subscribe(f"devices/{name}/+", qos=granted)
        other.subscribe("devices/#", qos=granted)
        world.peer.send(world.into, b"\x00to all\xff", mqttSecondTopic=f"/{name}/x", qoslevel=str(message_qos))
        wait_for_messages(device.received, 1)
        wait_for_messages(other.received, 1)
    for receiver in (device, other):
        message = receiver.received[0]
        assert (message.topic, message.payload) == (f"devices/{name}/x", b"\x00to all\xff")
        assert (message.qos, message.retain) == (delivered, False)


def test_p2p_reaches_one_client_without_a_subscription(world: World) -> None:
    with world.device("GID_dev@@@one") as one, world.device("GID_dev@@@two") as two:
        two.subscribe("devices/#", qos=1)
        world.peer.send(world.into, b"for one", mqttSecondTopic="/p2p/GID_dev@@@one", qoslevel="2")
        wait_for_messages(one.received, 1)
        world.peer.send(world.into, b"shown", mqttSecondTopic="p2p/GID_dev@@@one", mqttRealTopic="alarm/1")
        wait_for_messages(one.received, 2)
        world.peer.send(world.into, b"for all", mqttSecondTopic="/all")
        wait_for_messages(two.received, 1)
    assert [(m.topic, m.payload, m.qos) for m in one.received] == [
        ("devices/p2p/GID_dev@@@one", b"for one", 2),
        ("devices/alarm/1", b"shown", 1),
    ]
    assert [m.payload for m in two.received] == [b"for all"]


def test_p2p_between_devices_is_private_and_exported(world: World) -> None:
    with (
        world.peer.collect(world.out) as messages,
        world.device("from") as sender,
        world.device("target") as target,
        world.device("spy") as spy,
    ):
        spy.subscribe("sensors/#", qos=1)
        target.subscribe("sensors/p2p/target", qos=1)
        sender.publish("sensors/p2p/target", b"psst", qos=1, retain=True)
        wait_for_messages(target.received, 1)
        wait_for(lambda: any(message.body == b"psst" for message in messages))
        sender.publish("sensors/loud", b"all may hear", qos=1)
        wait_for_messages(spy.received, 1)
        time.sleep(0.3)
        assert [m.payload for m in target.received] == [b"psst"]
        assert [m.payload for m in spy.received] == [b"all may hear"]
        with world.device("late") as late:
            late.subscribe("sensors/p2p/#", qos=1)
            late.subscribe("devices/done", qos=1)
            world.peer.send(world.into, b"done", mqttSecondTopic="/done")
            wait_for_messages(late.received, 1)
            assert [m.payload for m in late.received] == [b"done"]
    message = next(message for message in messages if message.body == b"psst")
    assert message.properties["mqttSecondTopic"] == "/p2p/target"


def test_what_a_bridge_sent_never_comes_back(world: World) -> None:
    before = world.bridge.metric("mq2mqtt_messages_total", rule="commands-in", outcome="skipped")
    with world.device("loop") as device:
        device.subscribe("devices/#", qos=1)
        world.peer.send(world.into, b"own", mqttSecondTopic="/x", mq2mqttNode="somebody")
        world.peer.send(world.into, b"foreign", mqttSecondTopic="/x")
        wait_for_messages(device.received, 1)
    assert [message.payload for message in device.received] == [b"foreign"]
    wait_for(lambda: world.bridge.metric("mq2mqtt_messages_total", rule="commands-in", outcome="skipped") == before + 1)


def test_only_the_rules_tag_is_taken(world: World) -> None:
    with world.device("tagged") as device:
        device.subscribe("devices/tag", qos=1)
        world.peer.send(world.into, b"other tag", tag="OTHER", mqttSecondTopic="/tag")
        world.peer.send(world.into, b"no tag", tag=None, mqttSecondTopic="/tag")
        world.peer.send(world.into, b"right tag", mqttSecondTopic="/tag")
        wait_for_messages(device.received, 1)
        time.sleep(0.5)
    assert [message.payload for message in device.received] == [b"right tag"]


def test_a_message_that_cannot_be_is_parked_and_the_rest_flows(world: World) -> None:
    before = world.bridge.metric("mq2mqtt_messages_total", rule="commands-in", outcome="parked")
    with world.device("robust") as device:
        device.subscribe("devices/#", qos=1)
        world.peer.send(world.into, b"bad topic", mqttSecondTopic="/a/#")
        world.peer.send(world.into, b"bad qos", mqttSecondTopic="/ok", qoslevel="7")
        wait_for_messages(device.received, 1)
        wait_for(lambda: world.bridge.metric("mq2mqtt_parked_messages", rule="commands-in") >= before + 1)
    assert [(message.payload, message.qos) for message in device.received] == [(b"bad qos", 1)]
    assert world.bridge.metric("mq2mqtt_invalid_properties_total", rule="commands-in", property="qoslevel") >= 1


def test_a_p2p_message_that_is_not_to_be_kept_for_a_client_that_is_away_is_counted(world: World) -> None:
    labels = {"rule": "commands-in", "reason": "not_persistent"}
    before = world.bridge.metric("mq2mqtt_dropped_total", **labels)
    world.peer.send(world.into, b"nobody home", mqttSecondTopic="/p2p/away")
    wait_for(lambda: world.bridge.metric("mq2mqtt_dropped_total", **labels) == before + 1)


async def test_the_official_java_client_is_the_other_end(
    world: World, rocketmq: SharedRocketMQ, tmp_path: Path
) -> None:
    if rocketmq.jars is None:
        pytest.skip("a RocketMQ given by address comes without the jars of its Java client")
    group = f"GID_java_{uuid.uuid4().hex[:12]}"
    with world.device("GID_dev@@@java") as device:
        device.subscribe("devices/from/java", qos=2)
        await run_java_peer(
            rocketmq.jars,
            *("produce", rocketmq.namesrv, world.into, "MQ2MQTT", "2", "6000", "ZLIB"),
            *("mqttSecondTopic=/from/java", "qoslevel=2"),
            home=tmp_path,
        )
        wait_for_messages(device.received, 2)
        device.publish("sensors/to/java", b"\x00from a device", qos=2)
        async with JavaPeer(
            rocketmq.jars, "consume", rocketmq.namesrv, group, world.out, "MQTT_COMMON", home=tmp_path
        ) as peer:
            async with asyncio.timeout(60):
                while not (found := [m for m in peer.having("message") if _client(m) == "GID_dev@@@java"]):
                    await asyncio.sleep(0.05)
    assert [(len(message.payload), message.qos) for message in device.received] == [(6000, 2), (6000, 2)]
    (message,) = found
    assert base64.b64decode(message["body"]) == b"\x00from a device"
    assert (message["properties"]["mqttSecondTopic"], message["properties"]["qoslevel"]) == ("/to/java", "2")


def _client(line: dict[str, Any]) -> str | None:
    client_id: str | None = line["properties"].get("clientId")
    return client_id


def test_a_will_is_exported_with_its_clients_id(world: World) -> None:
    with world.peer.collect(world.out) as messages:
        device = world.device("GID_dev@@@mortal")
        device.client.will_set("sensors/will", b"last words", qos=1)
        device.connect()
        device.cut()
        wait_for(lambda: any(message.body == b"last words" for message in messages))
    message = next(message for message in messages if message.body == b"last words")
    assert message.properties["clientId"] == "GID_dev@@@mortal"
    assert (message.properties["mqttSecondTopic"], message.properties["qoslevel"]) == ("/will", "1")


def test_the_invariants_hold_when_all_is_quiet(world: World) -> None:
    def total(rule: str, *outcomes: str) -> float:
        return sum(world.bridge.metric("mq2mqtt_messages_total", rule=rule, outcome=outcome) for outcome in outcomes)

    downlink = ("delivered", "no_subscriber", "queued", "expired", "parked", "skipped", "dropped")
    wait_for(lambda: world.bridge.metric("mq2mqtt_lane_messages", rule="sensors-out") == 0)
    assert total("sensors-out", "accepted") == total("sensors-out", "sent", "parked") > 0
    wait_for(lambda: world.bridge.metric("mq2mqtt_in_flight", rule="commands-in") == 0)
    assert total("commands-in", "received") == total("commands-in", *downlink) > 0
    assert world.bridge.metric("mq2mqtt_rule_up", rule="sensors-out") == 1


def test_a_second_bridge_on_the_same_spool_is_refused(world: World, tmp_path: Path) -> None:
    second = new_bridge(tmp_path, namesrv="127.0.0.1:1", rules=world.bridge.config["rules"])
    second.config["spool"]["path"] = str(world.bridge.directory / "spool")
    with pytest.raises(AssertionError, match="another bridge runs on"):
        second.start()
    assert second.process is not None
    assert second.process.returncode == 2
    assert "Traceback" not in second.log()


def test_the_paho_default_client_sees_nothing_unusual(world: World) -> None:
    assert paho.MQTTv311 == 4
    with world.device("plain") as device, world.device("reader") as reader:
        reader.subscribe("plain/+", qos=2)
        for qos in (0, 1, 2):
            device.publish("plain/x", b"%d" % qos, qos=qos)
        wait_for_messages(reader.received, 3)
    assert sorted(message.payload for message in reader.received) == [b"0", b"1", b"2"]
