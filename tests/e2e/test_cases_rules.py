"""Rules over restarts and beside each other: where they begin, what they skip, topics that go and come back."""

import asyncio
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.bridge_process import BridgeProcess, wait_for
from tests.conftest import SharedRocketMQ
from tests.mqtt_client import Client
from tests.new_bridge import new_bridge
from tests.rocket_peer import RocketPeer
from tests.waiting import until

pytestmark = pytest.mark.e2e


def _name() -> str:
    return f"t_{uuid.uuid4().hex[:12]}"


def _bridge(directory: Path, rocketmq: SharedRocketMQ, *rules: dict[str, Any]) -> BridgeProcess:
    bridge = new_bridge(directory, namesrv=rocketmq.namesrv, rules=list(rules))
    # A consumer group's name has the rule's id and the node in it.
    bridge.config["node"] = _name()
    return bridge


def _outbound(rule_id: str, source: str, target: str) -> dict[str, Any]:
    return {"id": rule_id, "type": "outbound", "source": source, "target": target}


def _inbound(rule_id: str, source: str, target: str, **options: Any) -> dict[str, Any]:  # noqa: ANN401 - any field
    return {"id": rule_id, "type": "inbound", "source": source, "target": target, **options}


def _received(bridge: BridgeProcess, rule: str) -> float:
    return bridge.metric("mq2mqtt_messages_total", rule=rule, outcome="received")


def test_where_a_rule_begins_and_that_a_clean_restart_repeats_nothing(
    rocketmq: SharedRocketMQ, peer: RocketPeer, tmp_path: Path
) -> None:
    topic = _name()
    peer.create_topic(topic)
    rules = (_inbound("new", topic, "new"), _inbound("old", topic, "old", **{"from": "earliest"}))
    bridge = _bridge(tmp_path, rocketmq, *rules)
    for _ in range(8):
        peer.send(topic, b"before")
    bridge.start()
    wait_for(lambda: _received(bridge, "old") == 8)
    assert _received(bridge, "new") == 0
    for _ in range(8):
        peer.send(topic, b"while it runs")
    wait_for(lambda: (_received(bridge, "old"), _received(bridge, "new")) == (16, 8))
    assert bridge.stop() == 0
    for _ in range(8):
        peer.send(topic, b"while it is away")
    bridge.config["rules"][1]["enabled"] = False
    bridge.start()
    wait_for(lambda: _received(bridge, "new") == 8)
    assert bridge.readiness()["old"]["state"] == "disabled"
    assert bridge.stop() == 0
    bridge.config["rules"][1]["enabled"] = True
    bridge.start()
    wait_for(lambda: _received(bridge, "old") == 8)
    wait_for(lambda: bridge.metric("mq2mqtt_consumer_lag") == 0)
    assert (_received(bridge, "old"), _received(bridge, "new")) == (8, 0)
    assert bridge.stop() == 0


def _has_skipped(bridge: BridgeProcess, skipped: int, *, received: int) -> bool:
    outcome = bridge.metric("mq2mqtt_messages_total", rule="round-in", outcome="skipped")
    in_flight = bridge.metric("mq2mqtt_in_flight", rule="round-in")
    return (_received(bridge, "round-in"), outcome, in_flight) == (received, skipped, 0)


async def test_two_bridges_on_one_topic_do_not_loop(rocketmq: SharedRocketMQ, peer: RocketPeer, tmp_path: Path) -> None:
    topic = _name()
    await asyncio.to_thread(peer.create_topic, topic)
    rules = _outbound("round-out", "round", topic), _inbound("round-in", topic, "round", tags="*")
    bridges = [_bridge(tmp_path / name, rocketmq, *rules) for name in ("one", "two")]
    clients = []
    for bridge in bridges:
        await asyncio.to_thread(bridge.start)
        clients.append(await Client.connect(bridge.mqtt_port, "dev"))
        await clients[-1].subscribe(("round/#", 1))
    for number in range(20):
        await clients[0].publish("round/a", b"%d" % number, qos=1)
    peer.send(topic, b"from an application")
    for bridge in bridges:
        await until(partial(_has_skipped, bridge, 20, received=21))
    for client, count in zip(clients, (21, 1), strict=True):
        await client.wait_messages(count)
        await client.ping()
    assert [len(client.messages) for client in clients] == [21, 1]
    for bridge, client, accepted in zip(bridges, clients, (20, 0), strict=True):
        assert bridge.metric("mq2mqtt_messages_total", rule="round-out", outcome="accepted") == accepted
        await client.drop()
        assert await asyncio.to_thread(bridge.stop) == 0


async def test_tags(rocketmq: SharedRocketMQ, peer: RocketPeer, tmp_path: Path) -> None:
    topic = _name()
    await asyncio.to_thread(peer.create_topic, topic)
    rules = (
        _inbound("any-tag", topic, "any", tags="*"),
        _inbound("two-tags", topic, "two", tags="A || B"),
        _inbound("default-tag", topic, "default"),
    )
    bridge = _bridge(tmp_path, rocketmq, *rules)
    await asyncio.to_thread(bridge.start)
    device = await Client.connect(bridge.mqtt_port, "dev")
    await device.subscribe(("#", 1))
    tags = ("A", "B", "AB", None, "MQ2MQTT")
    for tag in tags:
        await asyncio.to_thread(peer.send, topic, str(tag).encode(), tag=tag)
    await until(lambda: len(device.messages) >= 8)
    await until(lambda: bridge.metric("mq2mqtt_consumer_lag") == 0)
    expected = [("any", str(tag)) for tag in tags] + [("two", "A"), ("two", "B"), ("default", "MQ2MQTT")]
    assert sorted((message.topic, message.payload.decode()) for message in device.messages) == sorted(expected)
    await device.drop()
    assert await asyncio.to_thread(bridge.stop) == 0


async def test_a_topic_is_deleted_and_made_again(rocketmq: SharedRocketMQ, peer: RocketPeer, tmp_path: Path) -> None:
    out, into = _name(), _name()
    for topic in (out, into):
        await asyncio.to_thread(peer.create_topic, topic)
    bridge = _bridge(tmp_path, rocketmq, _outbound("gone-out", "gone", out), _inbound("gone-in", into, "back"))
    await asyncio.to_thread(bridge.start)
    device = await Client.connect(bridge.mqtt_port, "dev")
    await device.subscribe(("back", 1))
    for number in range(8):
        await asyncio.to_thread(peer.send, into, b"first %d" % number)
        await device.publish("gone/x", b"first %d" % number, qos=1)
    await device.wait_messages(8)
    await until(lambda: bridge.metric("mq2mqtt_lane_messages") == 0)
    for topic in (out, into):
        await asyncio.to_thread(peer.delete_topic, topic, broker_address=rocketmq.broker_address)
    for number in range(8):
        await device.publish("gone/x", b"second %d" % number, qos=1)
    await until(lambda: all(rule["state"] == "down" for rule in bridge.readiness().values()))
    for topic in (out, into):
        await asyncio.to_thread(peer.create_topic, topic)
    # No more than before, so that the new offsets lie where the old ones were.
    for number in range(8):
        await asyncio.to_thread(peer.send, into, b"second %d" % number)
    await device.wait_messages(16)
    with peer.collect(out) as messages:
        await until(lambda: [message.body for message in messages] == [b"second %d" % number for number in range(8)])
    await until(lambda: bridge.get("/readyz")[0] == 200)
    await device.drop()
    assert await asyncio.to_thread(bridge.stop) == 0
