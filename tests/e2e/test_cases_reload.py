"""Rules change on a running bridge while devices are connected and publish: by SIGHUP, and by the file alone."""

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mq2mqtt.message import ReceivedMessage
from tests.bridge_process import BridgeProcess, wait_for
from tests.conftest import SharedRocketMQ
from tests.device import Device
from tests.new_bridge import new_bridge, on_amqtt
from tests.rocket_peer import RocketPeer
from tests.stock_amqtt import StockAmqtt
from tests.stream import Stream

pytestmark = pytest.mark.e2e

_STOCK = pytest.mark.amqtt("its own command")


def _name() -> str:
    return f"t_{uuid.uuid4().hex[:12]}"


def _outbound(rule_id: str, source: str, target: str) -> dict[str, Any]:
    return {"id": rule_id, "type": "outbound", "source": source, "target": target}


def _bodies(*topics: list[ReceivedMessage]) -> list[bytes]:
    """What came first to last, topic by topic; at least once means that a body may come again."""
    return list(dict.fromkeys(message.body for topic in topics for message in topic))


def _check_complete(stream: Stream, *topics: list[ReceivedMessage]) -> None:
    """What was acknowledged is there, in its order, and came over one connection."""
    expected = [b"%d" % number for number in range(len(stream.acknowledged))]
    wait_for(lambda: len(_bodies(*topics)) >= len(expected), what="acknowledged messages are missing")
    assert _bodies(*topics) == expected
    assert stream.connections == 1


class _Scene:
    """A bridge with three rules, and topics to change them to."""

    def __init__(self, bridge: BridgeProcess, peer: RocketPeer) -> None:
        self.bridge = bridge
        self.peer = peer
        self.kept, self.first, self.second, self.added, self.commands = (_name() for _ in range(5))
        # One queue each: the order of what arrives is the order in which it was sent.
        for topic in (self.kept, self.first, self.second, self.added, self.commands):
            peer.create_topic(topic, queues=1)
        self.changing = _outbound("changing", "changing", self.first)
        self.rules = [
            _outbound("kept", "kept", self.kept),
            self.changing,
            {"id": "commands", "type": "inbound", "source": self.commands, "target": "devices"},
        ]
        bridge.config["rules"] = self.rules
        bridge.config["node"] = _name()

    def written(self, rule: str) -> int:
        """Bytes of the rule's lane: whoever writes it, does so before it acknowledges."""
        return sum(file.stat().st_size for file in (self.bridge.directory / "spool" / rule).glob("*.seg"))

    def state(self, rule: str) -> str | None:
        found = self.bridge.readiness().get(rule)
        return None if found is None else str(found["state"])

    def add_a_rule(self, device: Device) -> None:
        with self.peer.collect(self.added) as added:
            self.rules.insert(0, _outbound("added", "added", self.added))
            self.bridge.reload()
            device.publish("added/x", b"at once", qos=1)
            wait_for(lambda: _bodies(added) == [b"at once"])
        assert list(self.bridge.readiness()) == ["added", "kept", "changing", "commands"]

    def change_the_target(self, _: Device) -> None:
        stream = Stream(self.bridge.mqtt_port, "changing/x", rate=200, client_id="GID_stream@@@2")
        with self.peer.collect(self.first) as before, self.peer.collect(self.second) as after:
            stream.start()
            wait_for(lambda: len(stream.acknowledged) > 100)
            self.changing["target"] = self.second
            self.bridge.reload()
            acknowledged = len(stream.acknowledged)
            wait_for(lambda: len(stream.acknowledged) > acknowledged + 100)
            stream.stop()
            _check_complete(stream, before, after)
            assert before
            assert after

    def write_a_broken_file(self, device: Device) -> None:
        before = list(self.bridge.readiness())
        self.bridge.reload(text="rules: [", outcome="invalid")
        assert list(self.bridge.readiness()) == before
        device.publish("changing/x", b"goes on", qos=1)
        assert "going on as before" in self.bridge.log()

    def change_the_target_with_a_backlog(self, device: Device) -> None:
        self.changing["target"] = _name()  # which does not exist
        self.bridge.reload()
        wait_for(lambda: self.state("changing") == "down")
        bodies = [b"backlog %d" % number for number in range(200)]
        for body in bodies:
            device.publish("changing/x", body, qos=1, wait=False)
        device.wait_published()
        # The sidecar counts them when it has read them.
        wait_for(lambda: self.bridge.metric("mq2mqtt_lane_messages", rule="changing") >= 200)
        with self.peer.collect(self.first) as messages:
            self.changing["target"] = self.first
            self.bridge.reload()
            wait_for(lambda: _bodies(messages)[-200:] == bodies, what=lambda: f"{len(messages)} messages")
        wait_for(lambda: self.state("changing") == "up")

    def disable_and_delete(self, device: Device) -> None:
        self.changing["enabled"] = False
        self.bridge.reload()
        written = self.written("changing")
        device.publish("changing/x", b"not exported", qos=1)
        assert (self.state("changing"), self.written("changing")) == ("disabled", written)
        self.rules.remove(self.changing)
        self.bridge.reload()
        device.publish("changing/x", b"not exported either", qos=1)
        wait_for(lambda: self.state("changing") is None)
        assert not (self.bridge.directory / "spool" / "changing").exists()


@pytest.mark.parametrize("host", [new_bridge, pytest.param(StockAmqtt, marks=_STOCK)])
def test_rules_change_while_devices_publish(
    host: Callable[..., BridgeProcess], rocketmq: SharedRocketMQ, peer: RocketPeer, tmp_path: Path
) -> None:
    scene = _Scene(host(tmp_path, namesrv=rocketmq.namesrv, rules=[]), peer)
    scene.bridge.start()
    stream = Stream(scene.bridge.mqtt_port, "kept/x", rate=200)
    with Device(scene.bridge.mqtt_port, "device") as device, peer.collect(scene.kept) as kept:
        device.subscribe("devices/#", qos=1)
        stream.start()
        steps: list[Callable[[Device], None]] = [
            scene.add_a_rule,
            scene.change_the_target,
            scene.write_a_broken_file,
            scene.change_the_target_with_a_backlog,
            scene.disable_and_delete,
        ]
        commands = [step.__name__.encode() for step in steps]
        for command, step in zip(commands, steps, strict=True):
            peer.send(scene.commands, command)
            step(device)
        wait_for(lambda: list(dict.fromkeys(message.payload for message in device.received)) == commands)
        stream.stop()
        _check_complete(stream, kept)
        wait_for(lambda: scene.bridge.metric("mq2mqtt_connected_clients") == 1)
    assert scene.bridge.stop() == 0


def test_an_inbound_rule_changes_its_tag_source_and_target_and_rests(
    rocketmq: SharedRocketMQ, peer: RocketPeer, tmp_path: Path
) -> None:
    first, second = _name(), _name()
    for topic in (first, second):
        peer.create_topic(topic)
    rule: dict[str, Any] = {"id": "commands", "type": "inbound", "source": first, "target": "devices"}
    bridge = new_bridge(tmp_path, namesrv=rocketmq.namesrv, rules=[rule])
    bridge.config["node"] = _name()
    bridge.start()

    def change(**changes: Any) -> None:  # noqa: ANN401 - any field
        rule.update(changes)
        bridge.reload()
        if rule.get("enabled", True):
            wait_for(lambda: bridge.readiness()["commands"]["state"] == "up", what=bridge.describe)

    with Device(bridge.mqtt_port, "device") as device:
        device.subscribe("#", qos=1)

        def seen() -> set[tuple[str, bytes]]:
            return {(message.topic, bytes(message.payload)) for message in device.received}

        def shown(topic: str, *payloads: bytes) -> None:
            wait_for(lambda: seen() == {(topic, payload) for payload in payloads}, what=lambda: f"{seen()}")
            # One that comes twice does so before it counts as settled.
            wait_for(lambda: bridge.metric("mq2mqtt_in_flight") == 0)
            device.received.clear()

        peer.send(first, b"1", mqttSecondTopic="/a")
        shown("devices/a", b"1")
        change(target="machines")
        peer.send(first, b"2", mqttSecondTopic="/a")
        shown("machines/a", b"2")
        change(tags="blue || green")
        peer.send(first, b"another tag", mqttSecondTopic="/a")
        peer.send(first, b"3", tag="green", mqttSecondTopic="/a")
        shown("machines/a", b"3")
        change(enabled=False)
        for number in range(8):
            peer.send(first, b"%d" % number, tag="blue", mqttSecondTopic="/a")
        time.sleep(0.5)
        assert device.received == []
        change(enabled=True)
        shown("machines/a", *(b"%d" % number for number in range(8)))
        change(source=second, **{"from": "earliest"})
        peer.send(second, b"4", tag="blue", mqttSecondTopic="/a")
        shown("machines/a", b"4")
        bridge.config["rules"].remove(rule)
        bridge.reload()
        wait_for(lambda: "commands" not in bridge.readiness())
        peer.send(second, b"5", tag="blue", mqttSecondTopic="/a")
        bridge.config["rules"].append(rule)
        bridge.reload()
        shown("machines/a", b"5")
    assert bridge.stop() == 0


def test_devices_that_wait_for_a_full_lane_are_let_go_with_its_rule(rocketmq: SharedRocketMQ, tmp_path: Path) -> None:
    rule = _outbound("full", "full", _name())  # into a topic that does not exist
    bridge = new_bridge(tmp_path, namesrv=rocketmq.namesrv, rules=[rule])
    bridge.config["spool"]["max_bytes"] = "64KiB"
    bridge.start(ready=False)
    # Mosquitto closes the connection of a device whose publish the lane has no space for: it comes back.
    with Device(bridge.mqtt_port, "device", reconnects=not on_amqtt()) as device:
        for _ in range(100):
            device.publish("full/x", b"x" * 1000, qos=1, wait=False)
        wait_for(lambda: "max_bytes" in (bridge.readiness()["full"]["reason"] or ""))
        bridge.config["rules"] = []
        bridge.reload()
        device.wait_published()
        assert bridge.readiness()["full"]["state"] == "draining"
    assert bridge.stop() == 0


def test_rules_change_and_go_while_rocketmq_is_away(tmp_path: Path) -> None:
    inbound: dict[str, Any] = {"id": "commands", "type": "inbound", "source": "mq_1", "target": "devices"}
    bridge = new_bridge(tmp_path, namesrv="127.0.0.1:1", rules=[_outbound("kept", "kept", "mq_2"), inbound])
    bridge.start(ready=False)
    with Device(bridge.mqtt_port, "device") as device:
        device.publish("kept/x", b"waits", qos=1)
        for change in ({"tags": "blue"}, {"source": "mq_3"}, {"enabled": False}, {"enabled": True}):
            inbound.update(change)
            bridge.reload()
        bridge.config["rules"] = []
        bridge.reload()
        wait_for(lambda: list(bridge.readiness()) == ["kept"], what=bridge.describe)
        assert bridge.readiness()["kept"]["state"] == "draining"
        wait_for(lambda: "127.0.0.1:1" in (bridge.readiness()["kept"]["reason"] or ""))
        bridge.config["rules"] = [_outbound("kept", "kept", "mq_2"), inbound]
        bridge.reload()
        device.publish("kept/x", b"waits too", qos=1)
        wait_for(lambda: bridge.metric("mq2mqtt_lane_messages", rule="kept") == 2)
    assert bridge.stop() == 0
