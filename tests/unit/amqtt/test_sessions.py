"""Subscriptions of persistent sessions outlive the broker: on real brokers, with a raw client and SQLite."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from loguru import logger

from mq2mqtt.errors import StoreError, UnstorableError
from mq2mqtt.host import Delivery, Outcome, Settled
from mq2mqtt.message import MqttMessage
from mq2mqtt.store import Subscription
from mq2mqtt.store.sql import SqlStore
from mq2mqtt_amqtt import saving
from tests.mqtt_client import CONNACK, SUBACK, UNSUBACK, Client, connect_packet, subscribe_packet, unsubscribe_packet
from tests.unit.amqtt.conftest import StartWorld
from tests.unit.amqtt.plugins import ACL, OPEN
from tests.unit.amqtt.world import AUTH, World, until

DELIVERED = ("delivered", None)
QUEUED = ("queued", None)
NOBODY = ("no_subscriber", None)
ANONYMOUS = "amqtt.plugins.authentication.AnonymousAuthPlugin"


class SlowStore:
    """A `SubscriptionStore` that writes when it is told to."""

    def __init__(self, *known: Subscription) -> None:
        self.known = list(known)
        self.calls: list[tuple[object, ...]] = []
        self.futures: list[asyncio.Future[None]] = []

    def save(self, subscription: Subscription) -> asyncio.Future[None]:
        return self._begin("save", subscription.client_id, subscription.filter, subscription.qos)

    def remove(self, client_id: str, topic_filter: str) -> asyncio.Future[None]:
        return self._begin("remove", client_id, topic_filter)

    def forget(self, client_id: str) -> asyncio.Future[None]:
        return self._begin("forget", client_id)

    async def all(self) -> list[Subscription]:
        return self.known

    def _begin(self, *call: object) -> asyncio.Future[None]:
        self.calls.append(call)
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]

    def finish(self, error: Exception | None = None) -> None:
        futures, self.futures = self.futures, []
        for future in futures:
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlStore]:
    opened = await SqlStore.open(f"sqlite+aiosqlite:///{tmp_path}/store.db", node="one")
    yield opened
    await opened.close()


async def connack(world: World, client_id: str, *, clean: bool = False) -> bytes:
    """Connect and disconnect; return the body of CONNACK."""
    client = await Client.open(world.port)
    world.clients.append(client)
    client.send(connect_packet(client_id, clean=clean))
    body = (await client.wait_packet(CONNACK)).body
    await client.disconnect()
    await until(lambda: not world.host.is_online(client_id))
    return body


@pytest.mark.parametrize("orderly", [True, False])
async def test_sessions_and_their_subscriptions_are_there_after_a_restart(
    start_world: StartWorld, store: SqlStore, *, orderly: bool
) -> None:
    first = await start_world(subscriptions=store.subscriptions)
    device = await first.client("dev", clean=False)
    await device.subscribe(("into/#", 0), ("into/a", 2), ("+/b", 1), ("gone", 1))
    await device.subscribe(("into/#", 1))
    await device.unsubscribe("gone")
    clean = await first.client("clean")
    await clean.subscribe(("into/#", 1))
    if orderly:
        await first.stop()

    second = await start_world(subscriptions=store.subscriptions)
    missed = [second.publish(topic, qos=2) for topic in ("into/a", "into/c", "else/b")]
    assert [await receipt.outcome() for receipt in missed] == [QUEUED] * 3
    assert [receipt.missed for receipt in missed] == [[("dev", 2)], [("dev", 1)], [("dev", 1)]]
    assert await second.publish("gone").outcome() == NOBODY
    back = await Client.open(second.port)
    second.clients.append(back)
    back.send(connect_packet("dev", clean=False))
    assert (await back.wait_packet(CONNACK)).body == b"\x01\x00"
    assert await second.publish("into/a", qos=1).outcome() == DELIVERED
    await back.wait_messages(1)
    await back.unsubscribe("into/a")
    assert await connack(second, "clean") == b"\x00\x00"


async def test_a_clean_session_ends_what_is_saved(start_world: StartWorld, store: SqlStore) -> None:
    for client_id in ("dev", "other"):
        world = await start_world(subscriptions=store.subscriptions)
        device = await world.client(client_id, clean=False)
        await device.subscribe(("into/#", 1), ("more", 1))
    world = await start_world(subscriptions=store.subscriptions)
    assert await connack(world, "dev", clean=True) == b"\x00\x00"
    # The store writes in order: what it was told before this is done with.
    await store.subscriptions.forget("nobody")
    again = await start_world(subscriptions=store.subscriptions)
    assert await connack(again, "dev") == b"\x00\x00"
    receipt = again.publish("into/a")
    assert await receipt.outcome() == QUEUED
    assert receipt.missed == [("other", 1)]


async def test_what_amqtt_does_not_keep_is_not_saved_and_one_line_says_so(start_world: StartWorld) -> None:
    store = SlowStore()
    world = await start_world(subscriptions=store, plugins={ANONYMOUS: {"allow_anonymous": True}})
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), level="WARNING", format="{message}")
    for client_id, clean in (("clean", True), ("dev", False), ("other", False)):
        device = await world.client(client_id, clean=clean)
        await device.subscribe(("into/#", 1))
    logger.remove(sink)
    assert not store.calls
    (line,) = lines
    assert line.startswith("client dev connects with cleanSession=false")
    assert "mq2mqtt_amqtt.AuthPlugin" in line


async def test_an_expired_session_is_forgotten(start_world: StartWorld) -> None:
    store = SlowStore(Subscription("dev", "into/#", 1))
    world = await start_world(subscriptions=store, session_expiry_interval=0)
    await until(lambda: store.calls == [("forget", "dev")])
    assert await world.publish("into/a").outcome() == NOBODY


async def test_a_stopping_broker_forgets_nothing(start_world: StartWorld) -> None:
    store = SlowStore(Subscription("dev", "into/#", 1))
    world = await start_world(subscriptions=store)
    await world.client("dev", clean=False)
    await world.stop()
    assert not store.calls


async def test_a_message_is_kept_for_many_sessions_some_at_a_time(start_world: StartWorld) -> None:
    names = [f"dev-{number:03}" for number in range(500)]
    world = await start_world(subscriptions=SlowStore(*(Subscription(name, "into/#", 1) for name in names)))
    first, second = world.publish("into/a"), world.publish("into/a")
    assert len(first.missed) == 200
    # A session that ends before its turn misses nothing any more.
    await world.broker._delete_session("dev-499")  # noqa: SLF001
    assert len(first.missed) == 200
    await world.host.available()
    assert [name for name, _ in first.missed] == [name for name, _ in second.missed] == names[:-1]
    for receipt in (first, second):
        assert await receipt.outcome() == QUEUED


async def test_a_message_that_cannot_be_kept_does_not_stop_those_behind_it(start_world: StartWorld) -> None:
    world = await start_world(subscriptions=SlowStore(*(Subscription(name, "into/#", 1) for name in ("a", "b"))))
    told: list[Delivery] = []

    def fail_for_a(client_id: str, _qos: int, settled: Settled) -> None:
        if client_id == "a":
            raise RuntimeError("a bug")
        settled(Delivery(Outcome.QUEUED))

    world.host.publish(MqttMessage("into/a", b"x", 1), told.append, handed=lambda: None, missed=fail_for_a)
    await world.host.available()
    assert told == [Delivery(Outcome.QUEUED)]
    assert await world.publish("into/a").outcome() == QUEUED


async def test_a_restored_session_takes_little_memory_and_misses_what_devices_publish(start_world: StartWorld) -> None:
    world = await start_world(subscriptions=SlowStore(Subscription("dev", "plain/#", 1)))
    session = world.broker.sessions["dev"][0]
    assert not [name for name, value in vars(session).items() if isinstance(value, asyncio.Queue)]
    other = await world.client("other")
    await other.publish("plain/a", b"missed", qos=1)
    back = await world.client("dev", clean=False)
    assert [message.payload for message in await back.wait_messages(1)] == [b"missed"]
    await back.publish("plain/a", b"own", qos=1)
    await back.wait_messages(2)
    assert world.broker.sessions["dev"][0] is session
    session.clear_queues()
    assert session.retained_messages.empty()


async def test_a_restored_session_leaves_no_memory_behind(start_world: StartWorld) -> None:
    world = await start_world(subscriptions=SlowStore(Subscription("dev", "into/#", 1)))
    session = weakref.ref(world.broker.sessions["dev"][0])
    assert session() is not None
    # Nobody looks for cycles among what was restored.
    gc.disable()
    try:
        await world.broker._delete_session("dev")  # noqa: SLF001
        assert session() is None
    finally:
        gc.enable()


async def test_what_is_subscribed_to_while_the_broker_stops_is_saved_or_not_acknowledged(
    start_world: StartWorld,
) -> None:
    store = SlowStore()
    world = await start_world(subscriptions=store)
    device = await world.client("dev", clean=False)
    # Those that have not said a word are closed first, and devices go on meanwhile.
    silent = [await Client.open(world.port) for _ in range(3)]
    world.clients += silent
    await until(lambda: world.open_connections == 4)
    device.send(subscribe_packet(1, ("into/#", 1)))
    await world.host.close()
    await device.wait_closed()
    assert store.calls in ([], [("save", "dev", "into/#", 1)])
    assert not device.packets


async def test_what_is_saved_already_is_not_written_again(start_world: StartWorld) -> None:
    store = SlowStore(Subscription("dev", "into/#", 1))
    world = await start_world(subscriptions=store)
    device = await world.client("dev", clean=False)
    assert await device.subscribe(("into/#", 1)) == [1]
    assert not store.calls


async def test_subscribing_is_acknowledged_when_it_is_saved(start_world: StartWorld) -> None:
    store = SlowStore()
    world = await start_world(subscriptions=store)
    device = await world.client("dev", clean=False)
    device.send(subscribe_packet(1, ("into/#", 1), ("into/#/wrong", 1)))
    await until(lambda: bool(store.futures))
    # What it publishes meanwhile goes on, also by way of amqtt's routing.
    await device.publish("into/own", b"x", qos=1)
    await device.wait_messages(1)
    assert not device.packets
    store.finish()
    assert (await device.wait_packet(SUBACK, 1)).body[2:] == b"\x01\x80"
    device.send(unsubscribe_packet(2, "into/#"))
    await device.ping()
    await until(lambda: len(store.calls) == 2)
    assert not [packet for packet in device.packets if packet.kind == UNSUBACK]
    store.finish()
    await device.wait_packet(UNSUBACK, 2)
    assert store.calls == [("save", "dev", "into/#", 1), ("remove", "dev", "into/#")]


async def test_a_subscription_that_cannot_be_saved_closes_and_is_tried_again(start_world: StartWorld) -> None:
    store = SlowStore()
    world = await start_world(subscriptions=store)
    for _ in range(2):
        device = await world.client("dev", clean=False)
        device.send(subscribe_packet(1, ("into/#", 1)))
        await until(lambda: bool(store.futures))
        store.finish(StoreError("too much waits"))
        await device.wait_closed()
        assert not device.packets
    assert store.calls == [("save", "dev", "into/#", 1)] * 2


async def test_giving_a_session_up_is_acknowledged_when_it_is_forgotten(
    start_world: StartWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "FORGET_SECONDS", 60.0)
    store = SlowStore(Subscription("dev", "into/#", 1))
    world = await start_world(subscriptions=store)

    async def connect() -> Client:
        client = await Client.open(world.port)
        world.clients.append(client)
        client.send(connect_packet("dev", clean=True))
        return client

    first = await connect()
    await until(lambda: bool(store.futures))
    assert store.calls == [("forget", "dev")]
    # Who has nothing to give up is let in at once, and who connects again ends the connection that waits.
    await world.client("other", clean=True)
    second = await connect()
    await first.wait_closed()
    await world.client("another", clean=True)
    assert not first.packets
    assert not second.packets
    store.finish()
    await second.wait_packet(CONNACK)
    await until(lambda: bool(world.intake.told("dev")))
    assert world.intake.told("dev") == ["connect"]


async def test_who_gives_a_session_up_is_let_in_while_the_store_takes_nothing(
    start_world: StartWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "FORGET_SECONDS", 0.2)
    store = SlowStore(Subscription("dev", "into/#", 1))
    world = await start_world(subscriptions=store)
    await world.client("dev", clean=True)
    assert store.calls == [("forget", "dev")]
    assert await world.publish("into/a").outcome() == NOBODY


async def test_what_was_saved_before_is_removed_also_where_it_could_not_be_replaced(start_world: StartWorld) -> None:
    store = SlowStore(Subscription("dev", "into/#", 1))
    world = await start_world(subscriptions=store)
    device = await world.client("dev", clean=False)
    device.send(subscribe_packet(1, ("into/#", 2)))
    await until(lambda: bool(store.futures))
    store.finish(StoreError("too much waits"))
    await device.wait_closed()
    device = await world.client("dev", clean=False)
    device.send(unsubscribe_packet(1, "into/#"))
    await until(lambda: bool(store.futures))
    store.finish()
    await device.wait_packet(UNSUBACK, 1)
    assert store.calls == [("save", "dev", "into/#", 2), ("remove", "dev", "into/#")]


async def test_who_leaves_is_not_waited_for(start_world: StartWorld) -> None:
    store = SlowStore()
    world = await start_world(subscriptions=store)
    device = await world.client("dev", clean=False)
    device.send(subscribe_packet(1, ("into/#", 1)))
    await until(lambda: bool(store.futures))
    device.abort()
    await until(lambda: world.intake.told("dev") == ["connect", "tcpclean"])
    store.finish()
    assert await world.publish("into/a").outcome() == QUEUED


async def test_a_filter_that_no_store_takes_works_while_the_broker_lives(start_world: StartWorld) -> None:
    store = SlowStore()
    world = await start_world(subscriptions=store)
    device = await world.client("dev", clean=False)
    device.send(subscribe_packet(1, ("into/#", 1)))
    await until(lambda: bool(store.futures))
    store.finish(UnstorableError("too long"))
    await device.wait_packet(SUBACK, 1)
    assert await world.publish("into/a").outcome() == DELIVERED


async def test_permissions_go_by_who_had_logged_in(start_world: StartWorld, store: SqlStore) -> None:
    plugins = {AUTH: {"allow_anonymous": True}, ACL: {}}
    first = await start_world(subscriptions=store.subscriptions, plugins=plugins)
    device = await first.client("dev", clean=False, username="someone", password=OPEN)
    await device.subscribe(("into/#", 1))
    second = await start_world(subscriptions=store.subscriptions, plugins=plugins)
    assert second.broker.sessions["dev"][0].username == "someone"
    assert await second.publish("into/secret").outcome() == ("dropped", "not_authorized")
    assert await second.publish("into/a").outcome() == QUEUED


async def test_restoring_many_sessions_lets_the_loop_go_on(start_world: StartWorld) -> None:
    store = SlowStore(*(Subscription(f"dev{number:05}", f"into/{number}", 1) for number in range(2_000)))
    world = await start_world()
    restoring = asyncio.create_task(world.host.restore(store), name="restoring")
    turns = 0
    while not restoring.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 10
    assert await world.publish("into/1777").outcome() == QUEUED
