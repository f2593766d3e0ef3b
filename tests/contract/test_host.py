"""What every `MqttHost` does. One suite, run on each adapter."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from mq2mqtt.host import Delivery, MqttHost, Outcome, Settled
from mq2mqtt.host.memory import MemoryClient, MemoryHost
from mq2mqtt.message import MqttMessage
from mq2mqtt.rules import RuleSet
from mq2mqtt.settings import Settings
from mq2mqtt_mosquitto.host import MosquittoHost
from mq2mqtt_mqtt.host import ClientHost
from tests.mosquitto import TOKEN, Mosquitto
from tests.mqtt_client import Client
from tests.plain_mosquitto import PlainMosquitto
from tests.unit.amqtt.world import ListIntake, World, until


class Device(Protocol):
    """A client of the host under test."""

    async def subscribe(self, topic_filter: str, qos: int) -> None: ...

    async def leave(self) -> None: ...

    async def received(self, count: int) -> list[tuple[str, bytes, int]]: ...


class Fixture(Protocol):
    """An adapter and its clients."""

    @property
    def host(self) -> MqttHost: ...

    @property
    def intake(self) -> ListIntake: ...

    @property
    def sees_receivers(self) -> bool:
        """Whether the host knows each receiver of a topic and what it does, or only what the broker says."""

    @property
    def sees_clients(self) -> bool:
        """Whether the host knows who is connected, and can address and close one connection."""

    async def connect(self, client_id: str, *, clean: bool = True) -> Device: ...


class MemoryDevice:
    def __init__(self, host: MemoryHost, client: MemoryClient) -> None:
        self._host = host
        self._client = client

    async def subscribe(self, topic_filter: str, qos: int) -> None:
        self._client.subscriptions[topic_filter] = qos

    async def leave(self) -> None:
        self._host.disconnect(self._client.client_id)

    async def received(self, count: int) -> list[tuple[str, bytes, int]]:
        assert len(self._client.received) >= count
        return [(m.topic, m.payload, m.qos) for m in self._client.received]


class MemoryFixture:
    sees_receivers = sees_clients = True

    def __init__(self) -> None:
        self.host = MemoryHost()
        self.intake = ListIntake()
        self.host.intake = self.intake

    async def connect(self, client_id: str, *, clean: bool = True) -> Device:
        return MemoryDevice(self.host, self.host.connect(client_id, clean_session=clean))


class AmqttDevice:
    def __init__(self, world: World, client: Client, client_id: str) -> None:
        self._world = world
        self._client = client
        self._client_id = client_id

    async def subscribe(self, topic_filter: str, qos: int) -> None:
        await self._client.subscribe((topic_filter, qos))

    async def leave(self) -> None:
        await self._client.disconnect()
        await until(lambda: not self._world.host.is_online(self._client_id))

    async def received(self, count: int) -> list[tuple[str, bytes, int]]:
        return [(m.topic, m.payload, m.qos) for m in await self._client.wait_messages(count)]


class AmqttFixture:
    sees_receivers = sees_clients = True

    def __init__(self, world: World) -> None:
        self._world = world
        self.host = world.host
        self.intake = world.intake

    async def connect(self, client_id: str, *, clean: bool = True) -> Device:
        return AmqttDevice(self._world, await self._world.client(client_id, clean=clean), client_id)


class MosquittoDevice:
    def __init__(self, host: MosquittoHost, client: Client, client_id: str) -> None:
        self._host = host
        self._client = client
        self._client_id = client_id

    async def subscribe(self, topic_filter: str, qos: int) -> None:
        await self._client.subscribe((topic_filter, qos))

    async def leave(self) -> None:
        await self._client.disconnect()
        await until(lambda: not self._host.is_online(self._client_id))

    async def received(self, count: int) -> list[tuple[str, bytes, int]]:
        return [(m.topic, m.payload, m.qos) for m in await self._client.wait_messages(count)]


class MosquittoFixture:
    sees_receivers = False
    sees_clients = True

    def __init__(self, broker: Mosquitto) -> None:
        self._broker = broker
        settings: dict[str, Any] = {"host": {"url": broker.url, "token": TOKEN}, "spool": {"path": broker.spool}}
        self.host = MosquittoHost(Settings(**settings))
        self.intake = ListIntake()
        self.host.intake = self.intake
        self.host.go_by(RuleSet())
        self._clients: list[Client] = []

    async def start(self) -> None:
        self.host.start()
        await until(lambda: self.host.problem is None)

    async def connect(self, client_id: str, *, clean: bool = True) -> Device:
        known = len([name for name in self.intake.told(client_id) if name == "connect"])
        client = await Client.connect(self._broker.port, client_id, clean=clean)
        self._clients.append(client)
        await until(lambda: self.intake.told(client_id).count("connect") > known)
        return MosquittoDevice(self.host, client, client_id)

    async def stop(self) -> None:
        for client in self._clients:
            await client.drop()
        await self.host.stop()


class PlainDevice:
    def __init__(self, client: Client) -> None:
        self._client = client

    async def subscribe(self, topic_filter: str, qos: int) -> None:
        await self._client.subscribe((topic_filter, qos))

    async def leave(self) -> None:
        await self._client.disconnect()

    async def received(self, count: int) -> list[tuple[str, bytes, int]]:
        return [(m.topic, m.payload, m.qos) for m in await self._client.wait_messages(count)]


class PlainFixture:
    sees_receivers = sees_clients = False

    def __init__(self, broker: PlainMosquitto) -> None:
        self._broker = broker
        settings: dict[str, Any] = {
            "host": {"type": "mqtt", "url": broker.url},
            "spool": {"path": broker.directory / "spool"},
        }
        self.host = ClientHost(Settings(**settings))
        self.intake = ListIntake()
        self.host.intake = self.intake
        self.host.go_by(RuleSet())
        self._clients: list[Client] = []

    async def start(self) -> None:
        self.host.start()
        await until(lambda: self.host.problem is None)

    async def connect(self, client_id: str, *, clean: bool = True) -> Device:
        client = await Client.connect(self._broker.port, client_id, clean=clean)
        self._clients.append(client)
        return PlainDevice(client)

    async def stop(self) -> None:
        for client in self._clients:
            await client.drop()
        await self.host.stop()


@pytest.fixture(params=["memory", "amqtt", "mosquitto", "mqtt"])
async def fixture(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Fixture]:
    if request.param == "memory":
        yield MemoryFixture()
        return
    if request.param == "amqtt":
        world = await World.start()
        yield AmqttFixture(world)
        await world.stop()
        return
    plain = request.param == "mqtt"
    broker = PlainMosquitto(tmp_path) if plain else Mosquitto(tmp_path, spool=tmp_path / "spool")
    broker.start()
    running = PlainFixture(broker) if isinstance(broker, PlainMosquitto) else MosquittoFixture(broker)
    try:
        await running.start()
        yield running
        await running.stop()
    finally:
        broker.kill()


def need_clients(fixture: Fixture) -> None:
    if not fixture.sees_clients:
        pytest.skip("a client of the broker is not told of others, and reaches only who has subscribed")


class Result:
    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.handed = 0
        self.missed: list[tuple[str, int]] = []

    def miss(self, client_id: str, qos: int, settled: Settled) -> None:
        self.missed.append((client_id, qos))
        settled(Delivery(Outcome.QUEUED))

    def hand(self) -> None:
        self.handed += 1

    async def value(self) -> tuple[str, str | None, int]:
        await until(lambda: bool(self.deliveries))
        (delivery,) = self.deliveries
        return delivery.outcome.value, delivery.reason.value if delivery.reason else None, self.handed


def publish(fixture: Fixture, topic: str, payload: bytes = b"x", *, qos: int = 1, shown: str | None = None) -> Result:
    result = Result()
    message = MqttMessage(topic, payload, qos)
    fixture.host.publish(message, result.deliveries.append, shown_topic=shown, handed=result.hand)
    return result


def deliver(fixture: Fixture, client_id: str, topic: str, payload: bytes = b"x", *, qos: int = 1) -> Result:
    result = Result()
    message = MqttMessage(topic, payload, qos)
    fixture.host.deliver(client_id, message, result.deliveries.append, handed=result.hand)
    return result


async def test_publish_without_a_subscriber(fixture: Fixture) -> None:
    await fixture.connect("a")
    assert await publish(fixture, "t/1").value() == ("no_subscriber", None, 0)


async def test_publish_reaches_each_subscriber_once_with_the_lower_qos(fixture: Fixture) -> None:
    a, b = await fixture.connect("a"), await fixture.connect("b")
    await a.subscribe("t/#", 0)
    await a.subscribe("t/1", 2)
    await b.subscribe("t/+", 0)
    handed = 2 if fixture.sees_receivers else 1
    assert await publish(fixture, "t/1", b"p", qos=1).value() == ("delivered", None, handed)
    assert await a.received(1) == [("t/1", b"p", 1)]
    assert await b.received(1) == [("t/1", b"p", 0)]


async def test_the_shown_topic(fixture: Fixture) -> None:
    a = await fixture.connect("a")
    await a.subscribe("t/1", 1)
    assert await publish(fixture, "t/1", shown="t/2").value() == ("delivered", None, 1)
    assert await a.received(1) == [("t/2" if fixture.host.shows_topics else "t/1", b"x", 1)]


async def test_who_is_away_counts_only_with_a_persistent_subscription(fixture: Fixture) -> None:
    for name, clean, qos in (("clean", True, 1), ("qos0", False, 0), ("kept", False, 1)):
        device = await fixture.connect(name, clean=clean)
        await device.subscribe(f"t/{name}", qos)
        await device.leave()
    assert await publish(fixture, "t/clean").value() == ("no_subscriber", None, 0)
    if fixture.sees_receivers:
        assert await publish(fixture, "t/qos0").value() == ("no_subscriber", None, 0)
        assert await publish(fixture, "t/kept").value() == ("dropped", "not_persistent", 0)
    else:
        # Mosquitto has it for a session that it keeps; what it drops of QoS 0 it does not tell.
        assert await publish(fixture, "t/qos0").value() == ("delivered", None, 1)
        assert await publish(fixture, "t/kept").value() == ("delivered", None, 1)
    device = await fixture.connect("online")
    await device.subscribe("t/kept", 1)
    assert await publish(fixture, "t/kept").value() == ("delivered", None, 1)


async def test_what_persistent_sessions_miss_is_to_be_kept(fixture: Fixture) -> None:
    if not fixture.sees_receivers:
        pytest.skip("the broker keeps it itself")
    for name, clean, qos in (("clean", True, 1), ("qos0", False, 0), ("kept", False, 2)):
        device = await fixture.connect(name, clean=clean)
        await device.subscribe("t/#", qos)
        await device.leave()
    for qos, missed in ((0, []), (1, [("kept", 1)]), (2, [("kept", 2)])):
        result = Result()
        fixture.host.publish(
            MqttMessage("t/1", b"x", qos), result.deliveries.append, handed=result.hand, missed=result.miss
        )
        assert await result.value() == ("queued" if missed else "no_subscriber", None, 0)
        assert result.missed == missed
    online = await fixture.connect("online")
    await online.subscribe("t/1", 1)
    result = Result()
    fixture.host.publish(MqttMessage("t/1", b"x"), result.deliveries.append, handed=result.hand, missed=result.miss)
    assert await result.value() == ("delivered", None, 1)
    assert result.missed == [("kept", 1)]


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_deliver_needs_no_subscription(fixture: Fixture, qos: int) -> None:
    need_clients(fixture)
    a = await fixture.connect("a")
    assert await deliver(fixture, "a", "t/p2p/a", b"p", qos=qos).value() == ("delivered", None, 1)
    assert await a.received(1) == [("t/p2p/a", b"p", qos)]


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_deliver_reaches_who_subscribes_to_its_address(fixture: Fixture, qos: int) -> None:
    a = await fixture.connect("a")
    await a.subscribe("t/p2p/a", 2)
    assert await deliver(fixture, "a", "t/p2p/a", b"p", qos=qos).value() == ("delivered", None, 1)
    assert await a.received(1) == [("t/p2p/a", b"p", qos)]


async def test_deliver_to_nobody(fixture: Fixture) -> None:
    assert await deliver(fixture, "nobody", "t/p2p/nobody").value() == ("dropped", "not_persistent", 0)


async def test_order_of_the_calls_is_kept(fixture: Fixture) -> None:
    a = await fixture.connect("a")
    await a.subscribe("t/#", 2)
    results = []
    for number in range(200):
        call = publish if number % 3 else deliver
        payload = b"%d" % number
        if call is publish:
            results.append(publish(fixture, "t/1", payload, qos=number % 2))
        else:
            results.append(deliver(fixture, "a", "t/p2p/a", payload, qos=2))
    received = [(qos, payload) for _, payload, qos in await a.received(200)]
    if not fixture.sees_receivers:
        # Mosquitto has a window for QoS 1 and 2, and lets QoS 0 pass by what waits for it. What a client publishes with
        # QoS 2 it passes on two packets later.
        sent = [(2 if n % 3 == 0 else n % 2, b"%d" % n) for n in range(200)]
        for level in ({0}, {1, 2}) if fixture.sees_clients else ({0}, {1}, {2}):
            assert [item for item in received if item[0] in level] == [item for item in sent if item[0] in level]
    else:
        assert [payload for _, payload in received] == [b"%d" % n for n in range(200)]
    for result in results:
        assert await result.value() == ("delivered", None, 1)


async def test_presence(fixture: Fixture) -> None:
    need_clients(fixture)
    assert not fixture.host.is_online("a")
    first = await fixture.connect("a")
    await fixture.connect("b")
    assert fixture.host.is_online("a")
    assert fixture.host.connected_clients == 2
    await first.leave()
    assert not fixture.host.is_online("a")
    assert fixture.host.connected_clients == 1
    await until(lambda: fixture.intake.told("a")[-1] == "tcpclean")
    assert fixture.intake.told("a")[0] == "connect"


async def test_take_over_and_kick(fixture: Fixture) -> None:
    need_clients(fixture)
    await fixture.connect("a")
    await fixture.connect("a")
    assert fixture.host.connected_clients == 1
    assert fixture.intake.told("a") == ["connect", "tcpclean", "connect"]
    await fixture.host.kick("a")
    assert not fixture.host.is_online("a")
    assert fixture.intake.told("a") == ["connect", "tcpclean", "connect", "tcpclean"]
    assert len({event.channel_id for event in fixture.intake.events}) == 2
    await fixture.host.kick("a")
