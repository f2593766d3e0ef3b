"""Status rules on a real broker and a real RocketMQ: what programs are told of clients, over every kind of end."""

import asyncio
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from pwdlib.hashers.argon2 import Argon2Hasher

from mq2mqtt.message import ReceivedMessage
from mq2mqtt.presence import StatusTracker
from tests.bridge_process import BridgeProcess
from tests.conftest import SharedRocketMQ
from tests.faults.flapping import StatusEvent, assert_told_once, status_events
from tests.mosquitto_bridge import MosquittoBridge
from tests.mqtt_client import Client
from tests.new_bridge import new_bridge, on_amqtt
from tests.rocket_peer import RocketPeer
from tests.waiting import until

pytestmark = pytest.mark.e2e

_LOGIN = {"username": "device", "password": "secret"}


class World:
    """A bridge with a status rule for the GroupID `group`, and what its topic has got."""

    def __init__(self, bridge: BridgeProcess, messages: list[ReceivedMessage], *, topic: str) -> None:
        self.bridge = bridge
        self.messages = messages
        self.topic = topic
        self.group = f"GID_{uuid.uuid4().hex[:12]}"
        self._clients: list[Client] = []

    @property
    def rule(self) -> dict[str, Any]:
        return {"id": "presence", "type": "status", "source": self.group, "target": self.topic}

    def name(self, device: str) -> str:
        return f"{self.group}@@@{device}"

    async def connect(self, device: str, *, clean: bool = True) -> Client:
        client = await Client.connect(self.bridge.mqtt_port, self.name(device), clean=clean, **_LOGIN)  # type: ignore[arg-type]
        self._clients.append(client)
        return client

    def events(self, *devices: str) -> list[StatusEvent]:
        """Those of these devices, in the order in which they were told."""
        names = {self.name(device) for device in devices}
        events = [event for event in status_events(self.messages) if event.connection[0] in names]
        return sorted(events, key=lambda event: event.seq)

    def types(self, *devices: str) -> list[str]:
        return [event.type for event in self.events(*devices)]

    def tracker(self) -> StatusTracker:
        tracker = StatusTracker()
        for message in self.messages:
            tracker.feed(message.body)
        return tracker

    async def end(self) -> None:
        for client in self._clients:
            await client.drop()
        self._clients.clear()


def with_passwords(bridge: BridgeProcess) -> None:
    """Let in only who knows a password, by the broker's own means."""
    passwords = bridge.directory / "passwords"
    if isinstance(bridge, MosquittoBridge):
        command = ["mosquitto_passwd", "-b", "-c", str(passwords), _LOGIN["username"], _LOGIN["password"]]
        subprocess.run(command, check=True, capture_output=True)
        bridge.broker.policy = "defer"
        bridge.broker.options = (f"password_file {passwords}", "allow_anonymous false")
    else:
        passwords.write_text(f"{_LOGIN['username']}:{Argon2Hasher().hash(_LOGIN['password'])}\n")
        plugin = "amqtt.plugins.authentication.FileAuthPlugin"
        bridge.config["mqtt"]["amqtt"] = {"plugins": {plugin: {"password_file": str(passwords)}}}


@pytest.fixture(scope="module")
def running(rocketmq: SharedRocketMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    topic = f"status_{uuid.uuid4().hex[:12]}"
    bridge = new_bridge(tmp_path_factory.mktemp("status"), namesrv=rocketmq.namesrv, rules=[])
    with_passwords(bridge)
    with RocketPeer(rocketmq.namesrv) as peer:
        peer.create_topic(topic)
        with peer.collect(topic) as messages:
            world = World(bridge, messages, topic=topic)
            bridge.config["rules"] = [world.rule]
            bridge.start()
            yield world
        assert bridge.stop() == 0


@pytest.fixture
async def world(running: World) -> AsyncIterator[World]:
    yield running
    await running.end()


async def test_each_way_to_come_and_go_is_told(world: World) -> None:
    goes, drops = await world.connect("goes"), await world.connect("drops", clean=False)
    address = goes.address
    await goes.disconnect()
    await drops.drop()
    await until(lambda: world.types("goes") == ["connect", "disconnect", "tcpclean"])
    await until(lambda: world.types("drops") == ["connect", "tcpclean"])
    events = world.events("goes")
    assert len({event.connection for event in events}) == 1
    assert [event.body["time"] for event in events] == sorted(event.body["time"] for event in events)
    first = events[0].body
    # Mosquitto tells its plugins no port.
    assert first["clientIp"] == (address if on_amqtt() else "127.0.0.1")
    assert (first["node"], first["clientId"]) == ("test", world.name("goes"))
    assert first["epoch"] < first["seq"] < 2**53
    assert not world.tracker().online


async def test_a_take_over_ends_the_old_connection_first(world: World) -> None:
    old = await world.connect("twice")
    await world.connect("twice")
    await old.wait_closed()
    await until(lambda: world.types("twice") == ["connect", "tcpclean", "connect"])
    first, end, second = (event.connection for event in world.events("twice"))
    assert first == end != second
    assert world.tracker().channels(world.name("twice")) == {second[1]}


async def test_others_and_refused_logins_are_not_told_of(world: World) -> None:
    port = world.bridge.mqtt_port
    stranger = await Client.connect(port, world.name("stranger"), code=5, username="device", password="wrong")  # noqa: S106 - the test's own
    nobody = await Client.connect(port, world.name("nobody"), code=5)
    other = await Client.connect(port, "GID_other@@@x", **_LOGIN)  # type: ignore[arg-type]
    last = await world.connect("last")
    for client in (stranger, nobody, other, last):
        await client.drop()
    await until(lambda: world.types("last") == ["connect", "tcpclean"])
    assert all(message.properties["KEYS"].startswith("test:presence:") for message in world.messages)
    told = {event.connection[0] for event in status_events(world.messages)}
    assert told.isdisjoint({world.name("stranger"), world.name("nobody"), "GID_other@@@x"})


async def test_a_rule_that_comes_later_tells_of_who_is_there(world: World) -> None:
    bridge = world.bridge
    bridge.config["rules"] = [{**world.rule, "enabled": False}]
    bridge.reload()
    await world.connect("early")
    short = await world.connect("short")
    await short.disconnect()
    await until(lambda: bridge.metric("mq2mqtt_connected_clients") == 1)
    bridge.config["rules"] = [world.rule]
    bridge.reload()
    await until(lambda: world.types("early") == ["connect"])
    assert world.types("short") == []


async def test_after_kill_9_of_everything_each_end_is_told_once(world: World) -> None:
    stays = [await world.connect(f"killed-{number}", clean=bool(number % 2)) for number in range(8)]
    names = [f"killed-{number}" for number in range(8)]
    await until(lambda: len(world.events(*names)) == 8)
    world.bridge.kill()
    await asyncio.gather(*(client.wait_closed() for client in stays))
    world.bridge.start()
    await world.connect("killed-0")
    await until(lambda: len(world.events(*names)) == 17)
    assert world.types("killed-0") == ["connect", "tcpclean", "connect"]
    assert_told_once(world.events(*names), online={world.name("killed-0")})
    await until(lambda: world.tracker().online == {world.name("killed-0")})


async def test_a_stop_tells_the_end_of_each_connection(world: World) -> None:
    await world.connect("stopped")
    await until(lambda: world.types("stopped") == ["connect"])
    assert await asyncio.to_thread(world.bridge.stop) == 0
    if on_amqtt():
        await until(lambda: world.types("stopped") == ["connect", "tcpclean"])
    world.bridge.start()
    # The sidecar has ended before Mosquitto.
    await until(lambda: world.types("stopped") == ["connect", "tcpclean"])


@pytest.mark.mosquitto
async def test_connections_live_on_without_the_sidecar(world: World) -> None:
    bridge = world.bridge
    assert isinstance(bridge, MosquittoBridge)
    stays, leaves = await world.connect("stays"), await world.connect("leaves")
    await until(lambda: len(world.events("stays", "leaves")) == 2)
    bridge.kill_sidecar()
    await leaves.drop()
    await world.connect("meanwhile")
    bridge.start()
    await until(lambda: world.types("meanwhile") == ["connect"])
    await until(lambda: world.types("leaves") == ["connect", "tcpclean"])
    await stays.ping()
    assert world.types("stays") == ["connect"]
    bridge.broker.kill()
    await stays.wait_closed()
    bridge.start()
    await until(lambda: len(world.events("stays", "leaves", "meanwhile")) == 6)
    events = world.events("stays", "leaves", "meanwhile")
    assert_told_once(events, online=set())
    assert not world.tracker().online
