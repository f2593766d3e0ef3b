"""QoS x clean session: what is kept for whom, from RocketMQ and from devices, while it is away, there, or silent.

A P2P message is kept as its sender asks (`cleansessionflag`, or a device's own flag), any other as its receiver does.
"""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.bridge_process import BridgeProcess
from tests.conftest import SharedRocketMQ
from tests.faults.report import assert_invariants
from tests.mqtt_client import CONNACK, Client, Message, connect_packet
from tests.new_bridge import new_bridge, on_amqtt
from tests.rocket_peer import RocketPeer
from tests.waiting import until

pytestmark = pytest.mark.e2e

_RULE = "devices-in"
_BATCH = 30
_BATCH_SECONDS = 5.0

origins = pytest.mark.parametrize("origin", ["rocketmq", "mqtt"])
every_qos = pytest.mark.parametrize("qos", [0, 1, 2])
acknowledged_qos = pytest.mark.parametrize("qos", [1, 2])
flags = pytest.mark.parametrize("clean", [True, False])


class World:
    """One bridge for all cases; each has clients of its own."""

    def __init__(self, bridge: BridgeProcess, peer: RocketPeer, into: str) -> None:
        self.bridge = bridge
        self._peer = peer
        self._into = into
        self._names = itertools.count()
        self._clients: list[Client] = []

    def name(self) -> str:
        return f"GID_kept@@@{next(self._names)}"

    async def client(self, client_id: str, **options: Any) -> Client:  # noqa: ANN401 - those of Client.connect
        client = await Client.connect(self.bridge.mqtt_port, client_id, **options)
        self._clients.append(client)
        return client

    async def come_back(self, client_id: str, *, clean: bool) -> tuple[Client, bool]:
        """Connect again; tell also whether CONNACK says that there was a session."""
        client = await Client.open(self.bridge.mqtt_port)
        self._clients.append(client)
        client.send(connect_packet(client_id, clean=clean))
        return client, bool((await client.wait_packet(CONNACK)).body[0])

    def send(self, second_topic: str, payload: bytes, *, qos: int, clean: bool = True) -> None:
        """Send from RocketMQ."""
        flag = "true" if clean else "false"
        properties = {"mqttSecondTopic": second_topic, "qoslevel": str(qos), "cleansessionflag": flag}
        self._peer.send(self._into, payload, **properties)

    async def send_to(self, client_id: str, payload: bytes, *, origin: str, qos: int, clean: bool) -> None:
        """Send a P2P message from RocketMQ or from a device, and wait until it is in the bridge's hands."""
        if origin == "mqtt":
            sender = await self.client(f"GID_sender@@@{uuid.uuid4().hex[:8]}", clean=clean)
            await sender.publish(f"devices/p2p/{client_id}", payload, qos=qos)
            return
        received = self.outcome("received")
        self.send(f"/p2p/{client_id}", payload, qos=qos, clean=clean)
        await until(lambda: self.outcome("received") > received)

    async def after(self, client: Client, client_id: str) -> list[Message]:
        """Return what `client` has got when a message comes that was sent now, without that one."""
        self.send(f"/p2p/{client_id}", b"now", qos=0)
        await client.wait(lambda: any(message.payload == b"now" for message in client.messages), "live message")
        await client.ping()
        return [message for message in client.messages if message.payload != b"now"]

    async def all_settled(self) -> None:
        await until(lambda: self.bridge.metric("mq2mqtt_in_flight", rule=_RULE) == 0)

    def outcome(self, name: str) -> float:
        return self.bridge.metric("mq2mqtt_messages_total", rule=_RULE, outcome=name)

    def dropped(self, reason: str) -> float:
        return self.bridge.metric("mq2mqtt_dropped_total", rule=_RULE, reason=reason)

    @property
    def waiting(self) -> float:
        """How many messages are kept."""
        return self.bridge.metric("mq2mqtt_offline_messages")

    async def end(self) -> None:
        for client in self._clients:
            await client.drop()
        self._clients.clear()


@pytest.fixture(scope="module")
def running(rocketmq: SharedRocketMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    into = f"in_{uuid.uuid4().hex[:12]}"
    rules: list[dict[str, Any]] = [{"id": _RULE, "type": "inbound", "source": into, "target": "devices"}]
    bridge = new_bridge(tmp_path_factory.mktemp("bridge"), namesrv=rocketmq.namesrv, rules=rules)
    with RocketPeer(rocketmq.namesrv) as peer:
        peer.create_topic(into, queues=1)
        bridge.start()
        yield World(bridge, peer, into)
    assert_invariants(bridge)
    assert bridge.stop() == 0
    assert "Traceback" not in bridge.log_file.read_text()


@pytest.fixture
async def world(running: World) -> AsyncIterator[World]:
    yield running
    await running.end()


def _kept(qos: int, *, clean: bool) -> bool:
    return qos > 0 and not clean


@flags
@every_qos
@origins
async def test_p2p_for_a_client_that_is_away(world: World, origin: str, qos: int, *, clean: bool) -> None:
    name, kept = world.name(), _kept(qos, clean=clean)
    # A session whose subscriptions match: it gets what is kept once, and nothing of what is not.
    device = await world.client(name, clean=False)
    await device.subscribe(("devices/#", qos), (f"devices/p2p/{name}", qos))
    await device.disconnect()
    waiting, queued, dropped = world.waiting, world.outcome("queued"), world.dropped("not_persistent")
    await world.send_to(name, b"kept", origin=origin, qos=qos, clean=clean)
    await world.all_settled()
    await until(lambda: world.waiting == waiting + kept)
    if origin == "rocketmq":
        assert (world.outcome("queued"), world.dropped("not_persistent")) == (queued + kept, dropped + (not kept))
    device = await world.client(name, clean=False)
    if kept:
        await device.wait_messages(1)
    got = [(m.topic, m.payload, m.qos, m.retain) for m in await world.after(device, name)]
    assert got == [(f"devices/p2p/{name}", b"kept", qos, False)] * kept


@flags
@every_qos
@origins
async def test_p2p_for_a_client_that_is_there(world: World, origin: str, qos: int, *, clean: bool) -> None:
    name = world.name()
    device = await world.client(name)
    await world.send_to(name, b"live", origin=origin, qos=qos, clean=clean)
    await device.wait_messages(1)
    assert [(m.payload, m.qos, m.retain) for m in await world.after(device, name)] == [(b"live", qos, False)]
    await world.all_settled()


@flags
@acknowledged_qos
@origins
async def test_p2p_that_is_not_acknowledged(world: World, origin: str, qos: int, *, clean: bool) -> None:
    name, kept = world.name(), _kept(qos, clean=clean)
    device = await world.client(name, acknowledge=False)
    await world.send_to(name, b"unanswered", origin=origin, qos=qos, clean=clean)
    await device.wait_messages(1)
    await device.drop()
    device = await world.client(name)
    if kept:
        await device.wait_messages(1)
    assert [(m.payload, m.qos) for m in await world.after(device, name)] == [(b"unanswered", qos)] * kept
    await world.all_settled()


@flags
@every_qos
async def test_a_topic_for_a_client_that_is_away(world: World, qos: int, *, clean: bool) -> None:
    name, kept = world.name(), _kept(qos, clean=clean)
    device = await world.client(name, clean=clean)
    await device.subscribe((f"devices/{name}", qos))
    await device.disconnect()
    # Mosquitto has it, and keeps it itself.
    outcome = "queued" if on_amqtt() else "delivered"
    received, settled = world.outcome("received"), world.outcome(outcome)
    world.send(f"/{name}", b"missed", qos=qos)
    await until(lambda: world.outcome("received") > received)
    await world.all_settled()
    assert world.outcome(outcome) >= settled + kept
    device, had_session = await world.come_back(name, clean=clean)
    assert had_session is not clean
    if kept:
        await device.wait_messages(1)
    got = [(m.topic, m.payload, m.qos, m.retain) for m in await world.after(device, name)]
    assert got == [(f"devices/{name}", b"missed", qos, False)] * kept


@flags
@every_qos
async def test_a_topic_for_a_client_that_is_there(world: World, qos: int, *, clean: bool) -> None:
    name = world.name()
    device = await world.client(name, clean=clean)
    await device.subscribe((f"devices/{name}", qos))
    world.send(f"/{name}", b"live", qos=2)
    await device.wait_messages(1)
    assert [(m.payload, m.qos, m.retain) for m in await world.after(device, name)] == [(b"live", qos, False)]
    await world.all_settled()


@flags
@acknowledged_qos
async def test_a_topic_that_is_not_acknowledged(world: World, qos: int, *, clean: bool) -> None:
    name, kept = world.name(), _kept(qos, clean=clean)
    device = await world.client(name, clean=clean, acknowledge=False)
    await device.subscribe((f"devices/{name}", qos))
    world.send(f"/{name}", b"unanswered", qos=qos)
    await device.wait_messages(1)
    await device.drop()
    device, _ = await world.come_back(name, clean=clean)
    if kept:
        await device.wait_messages(1)
    assert [(m.payload, m.qos) for m in await world.after(device, name)] == [(b"unanswered", qos)] * kept
    await world.all_settled()


@pytest.mark.amqtt("nobody but Mosquitto sees a device's PUBACK: what is sent on a connection that lives counts")
async def test_a_client_that_acknowledges_late_gets_it_again_on_the_same_connection(world: World) -> None:
    name, waiting = world.name(), world.waiting
    device = await world.client(name, acknowledge=False)
    await world.send_to(name, b"again", origin="rocketmq", qos=1, clean=False)
    await device.wait_messages(1)
    await until(lambda: world.waiting == waiting + 1)
    device.acknowledge = True
    await device.wait_messages(2)
    assert {message.payload for message in device.messages} == {b"again"}
    await until(lambda: world.waiting == waiting)


async def test_what_waits_comes_in_batches_oldest_first_and_what_is_new_goes_past(world: World) -> None:
    name, waiting = world.name(), world.waiting
    count = 2 * _BATCH + 1
    for number in range(count):
        await asyncio.to_thread(world.send, f"/p2p/{name}", b"%d" % number, qos=1, clean=False)
    await until(lambda: world.waiting == waiting + count)
    asked = time.monotonic()
    device = await world.client(name)
    began = time.monotonic()
    await device.wait_messages(_BATCH)
    assert [message.payload for message in await world.after(device, name)] == [b"%d" % n for n in range(_BATCH)]
    assert time.monotonic() - began < _BATCH_SECONDS
    await device.wait(lambda: len(device.messages) >= count + 1)
    assert time.monotonic() - asked > 2 * _BATCH_SECONDS - 1
    kept = [message.payload for message in device.messages if message.payload != b"now"]
    assert kept == [b"%d" % n for n in range(count)]
    await until(lambda: world.waiting == waiting)
