"""Mosquitto as its users have set it up: listeners with TLS and for WebSocket, a password file, an ACL file."""

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mq2mqtt.quickstart.ports import free_ports
from tests.bridge_process import wait_for
from tests.certificates import Authority
from tests.conftest import SharedRocketMQ
from tests.device import Device
from tests.mosquitto import TOKEN
from tests.mosquitto_bridge import MosquittoBridge
from tests.mqtt_client import Client
from tests.rocket_peer import RocketPeer, wait_for_messages
from tests.waiting import until

pytestmark = pytest.mark.e2e

_ACL = """
user device
topic write sensors/#
topic read devices/#
"""


class World:
    """The bridge on a Mosquitto with three listeners, where `device` with a password may do what the ACL file says."""

    def __init__(self, directory: Path, rocketmq: SharedRocketMQ, peer: RocketPeer) -> None:
        self.peer = peer
        self.out, self.into = (f"t_{uuid.uuid4().hex[:12]}" for _ in range(2))
        rules: list[dict[str, Any]] = [
            {"id": "sensors-out", "type": "outbound", "source": "sensors", "target": self.out},
            {"id": "devices-in", "type": "inbound", "source": self.into, "target": "devices"},
        ]
        for topic in (self.out, self.into):
            peer.create_topic(topic)
        self.bridge = MosquittoBridge(directory, namesrv=rocketmq.namesrv, rules=rules)
        self.bridge.config["node"] = uuid.uuid4().hex[:12]
        self.authority = Authority(directory / "authority")
        self.tls_port, self.web_port = free_ports(2)
        self.socket = directory / "mosquitto.sock"
        self._configure(directory)

    def _configure(self, directory: Path) -> None:
        passwords, acl = directory / "passwd", directory / "acl"
        subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, "device", "secret"], check=True, capture_output=True)
        acl.write_text(_ACL)
        theirs = self.authority.issue("mosquitto")
        broker = self.bridge.broker
        broker.policy = "defer"
        broker.options = (
            "allow_anonymous false",
            f"password_file {passwords}",
            f"acl_file {acl}",
            f"plugin_opt_socket {self.socket}",
            f"listener {self.tls_port} 127.0.0.1",
            f"certfile {theirs.certificate}",
            f"keyfile {theirs.key}",
            f"listener {self.web_port} 127.0.0.1",
            "protocol websockets",
            f"listener 0 {self.socket}",
        )

    def device(self, way: str) -> Device:
        """Make a device that comes by this listener."""
        if way == "tls":
            device = Device(self.tls_port, way)
            device.client.tls_set(str(self.authority.ca))
        elif way == "websocket":
            device = Device(self.web_port, way, transport="websockets")
        else:
            device = Device(self.bridge.mqtt_port, way)
        device.client.username_pw_set("device", "secret")
        return device


@pytest.fixture
def world(rocketmq: SharedRocketMQ, peer: RocketPeer, tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, rocketmq, peer)
    yield world
    world.bridge.kill()


@pytest.mark.parametrize("way", ["mqtt", "mqtts", "unix"])
def test_devices_come_by_every_listener_and_the_sidecar_by_any(world: World, way: str) -> None:
    hosts: dict[str, dict[str, Any]] = {
        "mqtt": {"url": world.bridge.broker.url, "token": TOKEN},
        "mqtts": {
            "url": f"mqtts://127.0.0.1:{world.tls_port}",
            "token": TOKEN,
            "tls": {"ca_file": str(world.authority.ca)},
        },
        "unix": {"url": f"unix://{world.socket}"},
    }
    world.bridge.config["host"] = hosts[way]
    world.bridge.start()
    devices = [world.device(by) for by in ("tcp", "tls", "websocket")]
    with world.peer.collect(world.out) as messages:
        for device in devices:
            with device:
                device.subscribe("devices/#", qos=1)
                world.peer.send(world.into, b"to all", mqttSecondTopic="/all")
                world.peer.send(world.into, b"to one", mqttSecondTopic=f"/p2p/{device.client_id}", qoslevel="2")
                wait_for_messages(device.received, 2)
                device.publish("sensors/x", device.client_id.encode(), qos=2)
                # 3.1.1 has no word for it: acknowledged, and given to nobody.
                device.publish("others/x", b"not permitted", qos=1)
        wait_for(lambda: len(messages) >= len(devices), what=world.bridge.describe)
    for device in devices:
        assert {message.payload for message in device.received} == {b"to all", b"to one"}
    found = sorted((message.body.decode(), message.properties["clientId"]) for message in messages)
    assert found == [("tcp", "tcp"), ("tls", "tls"), ("websocket", "websocket")]
    assert world.bridge.stop() == 0


async def test_whoever_may_not_connect_is_turned_away_and_the_rest_goes_on(world: World) -> None:
    world.bridge.start()
    port = world.bridge.mqtt_port
    for username, password in ((None, None), ("device", "wrong"), ("mq2mqtt", TOKEN)):
        await (await Client.connect(port, "stranger", code=5, username=username, password=password)).drop()
    device = await Client.connect(port, "known", username="device", password="secret")  # noqa: S106 - for this test
    await until(lambda: world.bridge.metric("mq2mqtt_connected_clients") == 1)
    await device.disconnect()
    await until(lambda: world.bridge.metric("mq2mqtt_connected_clients") == 0)
    assert world.bridge.stop() == 0


def test_a_message_that_mosquitto_does_not_take_is_dropped_and_the_rest_goes_on(world: World) -> None:
    world.bridge.broker.options += ("max_packet_size 100000",)
    world.bridge.start()
    with world.device("tcp") as device:
        device.subscribe("devices/#", qos=1)
        world.peer.send(world.into, bytes(100_000))
        world.peer.send(world.into, b"the next")
        wait_for_messages(device.received, 1)
        wait_for(lambda: world.bridge.metric("mq2mqtt_dropped_total", rule="devices-in", reason="host_refused") == 1)
    assert [message.payload for message in device.received] == [b"the next"]
    assert "raise its max_packet_size" in world.bridge.log()
    assert world.bridge.stop() == 0


@pytest.mark.parametrize(("limit", "too_long"), [(65536, 70_000), (550_000, 600_000)])
def test_a_limit_that_mosquitto_tells_nobody_is_found(world: World, limit: int, too_long: int) -> None:
    world.bridge.broker.options += (f"message_size_limit {limit}",)
    world.bridge.start()
    sent = [b"%d" % number + bytes(2000) for number in range(200)]
    with world.device("tcp") as device:
        device.subscribe("devices/#", qos=1)
        for payload in sent[:100]:
            world.peer.send(world.into, payload)
        world.peer.send(world.into, bytes(too_long))
        for payload in sent[100:]:
            world.peer.send(world.into, payload)
        wait_for_messages(device.received, len(sent))
        wait_for(lambda: world.bridge.metric("mq2mqtt_dropped_total", rule="devices-in", reason="host_refused") == 1)
    assert {message.payload for message in device.received} == set(sent)
    assert "raise its message_size_limit" in world.bridge.log()
    assert world.bridge.stop() == 0


def test_kept_p2p_between_devices_outlives_kill_9_of_both(
    rocketmq: SharedRocketMQ, peer: RocketPeer, tmp_path: Path
) -> None:
    into = f"t_{uuid.uuid4().hex[:12]}"
    peer.create_topic(into)
    rules: list[dict[str, Any]] = [{"id": "devices-in", "type": "inbound", "source": into, "target": "devices"}]
    bridge = MosquittoBridge(tmp_path, namesrv=rocketmq.namesrv, rules=rules)
    bridge.config["node"] = uuid.uuid4().hex[:12]
    bridge.start()

    def send(numbers: range) -> None:
        with Device(bridge.mqtt_port, "sender", clean=False) as sender:
            for number in numbers:
                sender.publish("devices/p2p/target", b"%d" % number, qos=1 + number % 2)

    try:
        bridge.kill_sidecar()
        send(range(8))
        bridge.broker.kill()
        bridge.start()
        # In the lane, on its way to the store, in the store: wherever they are.
        send(range(8, 16))
        bridge.kill()
        bridge.start()
        with Device(bridge.mqtt_port, "target") as target:
            wait_for(lambda: {int(message.payload) for message in target.received} == set(range(16)))
            assert {message.topic for message in target.received} == {"devices/p2p/target"}
            wait_for(lambda: bridge.metric("mq2mqtt_offline_messages") == 0)
        assert bridge.stop() == 0
    finally:
        bridge.kill()
