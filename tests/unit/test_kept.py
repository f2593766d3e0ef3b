"""A whole bridge that keeps messages for clients: from RocketMQ, from devices, over its restart, with receipts."""

import asyncio
import json
import sqlite3
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mq2mqtt.bridge import Bridge
from mq2mqtt.errors import ConfigError, LaneError, StoreError
from mq2mqtt.host.memory import MemoryClient
from mq2mqtt.message import MqttMessage, MqttProperties
from mq2mqtt.offline import replay
from mq2mqtt.spool.frame import encode_publish
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.reader import Entry, LaneReader
from mq2mqtt.store import StoredMessage
from tests.unit.bridge_world import IN, OUT, World, until

RECEIPTS = {**IN, "receipts": "mq_receipts"}
KEPT = {"qoslevel": "1", "cleansessionflag": "false"}


def world_with(path: Path, *rules: dict[str, Any], **parts: Any) -> World:  # noqa: ANN401 - those of World
    world = World(path / "spool", *rules, **parts)
    world.cluster.create_topic("mq_receipts", 1)
    return world


def p2p(world: World, client_id: str, payload: bytes, *, qos: int = 1, clean: bool = False) -> bool:
    """Publish to a client as a device does; return whether PUBACK may go out."""
    topic = f"sensors/p2p/{client_id}"
    route = world.bridge.intake.route(topic)
    assert route is not None
    message = MqttMessage(topic, payload, qos, client_id="sender", clean_session=clean)
    return world.bridge.intake.deliver_p2p(route, message) is None


def payloads(client: MemoryClient) -> list[bytes]:
    return [message.payload for message in client.received]


def receipts(world: World) -> list[tuple[str, str, str | None]]:
    """Tag, keys and client id of each receipt that RocketMQ has."""
    stored = [message.properties for message in world.cluster.queues("mq_receipts")[0]]
    return [(of["TAGS"], of["KEYS"], of.get("clientId")) for of in stored]


def rename(database: Path, table: str, name: str) -> None:
    with sqlite3.connect(database, timeout=15) as connection:
        connection.execute(f"ALTER TABLE {table} RENAME TO {name}")


def kept(world: World) -> int:
    return world.bridge.telemetry.offline.messages


async def test_a_p2p_message_outlives_the_bridge_and_reaches_its_client(tmp_path: Path) -> None:
    async with world_with(tmp_path, IN) as world:
        await until(lambda: world.state("commands-in") == "up")
        await world.send(b"x", mqttSecondTopic="/p2p/c1", **KEPT)
        await until(lambda: world.count("commands-in", "queued") == 1)
    async with world_with(tmp_path, IN, cluster=world.cluster) as second:
        assert kept(second) == 1
        client = second.host.connect("c1")
        await until(lambda: kept(second) == 0)
        assert [(m.topic, m.payload, m.retain) for m in client.received] == [("devices/p2p/c1", b"x", False)]
        assert second.count("commands-in", "received") == 0


async def test_what_a_persistent_session_missed_comes_with_the_qos_of_its_subscription(tmp_path: Path) -> None:
    async with world_with(tmp_path, IN) as world:
        client = world.host.connect("c1", clean_session=False)
        client.subscriptions["devices/#"] = 1
        world.host.disconnect("c1")
        await until(lambda: world.state("commands-in") == "up")
        await world.send(b"x", mqttSecondTopic="/news", mqttRealTopic="shown", qoslevel="2")
        await until(lambda: world.count("commands-in", "queued") == 1)
        client = world.host.connect("c1", clean_session=False)
        await until(lambda: kept(world) == 0)
        assert [(m.topic, m.qos) for m in client.received] == [("devices/shown", 1)]


@pytest.mark.parametrize("second_topic", ["/p2p/c1", "/news"])
async def test_what_is_over_is_not_delivered(tmp_path: Path, second_topic: str) -> None:
    world = world_with(tmp_path, {**RECEIPTS, "from": "earliest"})
    world.cluster.create_topic("mq_commands", 1)
    await world.send(b"x", mqttSecondTopic=second_topic, ttlSeconds="1", receipt="true", KEYS="k", **KEPT)
    await asyncio.sleep(1.1)
    async with world:
        client = world.host.connect("c1")
        client.subscriptions["devices/#"] = 1
        await until(lambda: len(receipts(world)) == 1)
        assert world.count("commands-in", "expired") == 1
        assert [tag for tag, _, _ in receipts(world)] == ["expired"]
        assert client.received == []


async def test_a_lifetime_of_zero_is_for_who_is_there(tmp_path: Path) -> None:
    async with world_with(tmp_path, IN) as world:
        client = world.host.connect("c1")
        await until(lambda: world.state("commands-in") == "up")
        await world.send(b"x", mqttSecondTopic="/p2p/c1", ttlSeconds="0", **KEPT)
        await world.send(b"y", mqttSecondTopic="/p2p/c2", ttlSeconds="0", **KEPT)
        await until(lambda: world.bridge.telemetry.rules["commands-in"].drops == {"not_persistent": 1})
        assert payloads(client) == [b"x"]


@pytest.mark.parametrize("broker_keeps", [False, True])
@pytest.mark.parametrize("zero", ["ttlSeconds", "mqtt5MsgExpireInterval"])
async def test_a_lifetime_of_zero_is_one_second_for_a_broker_that_keeps_messages_by_itself(
    tmp_path: Path,
    broker_keeps: bool,  # noqa: FBT001
    zero: str,
) -> None:
    world = world_with(tmp_path, IN)
    world.host.sees_acknowledgements = not broker_keeps
    async with world:
        client = world.host.connect("c1")
        client.subscriptions["devices/#"] = 1
        await until(lambda: world.state("commands-in") == "up")
        await world.send(b"x", mqttSecondTopic="/news", **{zero: "0"}, **KEPT)
        await world.send(b"x", mqttSecondTopic="/p2p/c1", **{zero: "0"}, **KEPT)
        await until(lambda: len(client.received) == 2)
        told = [None if m.properties is None else m.properties.expiry_seconds for m in client.received]
        assert told == [1 if broker_keeps else None if zero == "ttlSeconds" else 0] * 2
        assert kept(world) == 0


async def test_subscribers_are_told_what_is_left_of_a_messages_time(tmp_path: Path) -> None:
    async with world_with(tmp_path, IN) as world:
        client = world.host.connect("c1")
        client.subscriptions["devices/#"] = 1
        await until(lambda: world.state("commands-in") == "up")
        await world.send(b"x", mqttSecondTopic="/news", ttlSeconds="3600", mqtt5MsgExpireInterval="7200")
        await until(lambda: len(client.received) == 1)
        properties = client.received[0].properties
        assert properties is not None
        assert properties.expiry_seconds in range(3500, 3601)


async def test_receipts_of_a_p2p_message_queued_and_then_delivered(tmp_path: Path) -> None:
    async with world_with(tmp_path, RECEIPTS) as world:
        await until(lambda: world.state("commands-in.receipts") == world.state("commands-in") == "up")
        await world.send(b"x", mqttSecondTopic="/p2p/c1", receipt="true", KEYS="k1", UNIQ_KEY="id1", **KEPT)
        await world.send(b"x", mqttSecondTopic="/p2p/c1", KEYS="k2", **KEPT)
        await until(lambda: world.count("commands-in", "queued") == 2)
        world.host.connect("c1")
        await until(lambda: len(receipts(world)) == 2)
        assert receipts(world) == [("queued", "k1", "c1"), ("delivered", "k1", "c1")]
        first = world.cluster.queues("mq_receipts")[0][0]
        said = {"clientId": "c1", "mqttTopic": "devices/p2p/c1", "origMsgId": first.properties["origMsgId"]}
        assert json.loads(first.body) == {"outcome": "queued", "keys": "k1", **said}
        assert first.properties["mqttTopic"] == "devices/p2p/c1"
        assert first.properties["mq2mqttNode"] == "n1"


async def test_a_receipt_of_a_topic_is_of_the_message_as_a_whole(tmp_path: Path) -> None:
    async with world_with(tmp_path, RECEIPTS) as world:
        client = world.host.connect("c1")
        client.subscriptions["devices/#"] = 1
        await until(lambda: world.state("commands-in.receipts") == world.state("commands-in") == "up")
        await world.send(b"x", mqttSecondTopic="/news", receipt="true", KEYS="k1")
        await world.send(b"x", mqttSecondTopic="/other", receipt="false", KEYS="k2")
        await until(lambda: len(receipts(world)) == 1)
        assert receipts(world) == [("delivered", "k1", None)]


@pytest.mark.parametrize("shows_topics", [True, False])
async def test_a_receipt_has_the_topic_that_receivers_see(
    tmp_path: Path,
    shows_topics: bool,  # noqa: FBT001
) -> None:
    world = world_with(tmp_path, RECEIPTS)
    world.host.shows_topics = shows_topics
    async with world:
        client = world.host.connect("c1")
        client.subscriptions["devices/#"] = 1
        await until(lambda: world.state("commands-in.receipts") == world.state("commands-in") == "up")
        await world.send(b"x", mqttSecondTopic="/news", mqttRealTopic="shown", receipt="true", KEYS="k1")
        await until(lambda: len(receipts(world)) == 1)
        (receipt,) = world.cluster.queues("mq_receipts")[0]
        seen = "devices/shown" if shows_topics else "devices/news"
        assert [message.topic for message in client.received] == [receipt.properties["mqttTopic"]] == [seen]


async def test_receipts_wait_in_their_lane_and_outlive_their_rule(tmp_path: Path) -> None:
    world = World(tmp_path / "spool", RECEIPTS)
    async with world:
        await until(lambda: world.state("commands-in") == "up")
        assert world.state("commands-in.receipts") == "down"  # the topic is missing
        world.host.connect("c1")
        await world.send(b"x", mqttSecondTopic="/p2p/c1", receipt="true", KEYS="k", **KEPT)
        await until(lambda: world.count("commands-in", "delivered") == 1)
        world.reload(IN)
        assert world.state("commands-in.receipts") == "draining"
        await world.send(b"x", mqttSecondTopic="/p2p/c1", receipt="true", KEYS="late", **KEPT)
        await until(lambda: world.count("commands-in", "delivered") == 2)
        world.cluster.create_topic("mq_receipts", 1)
        await until(lambda: world.state("commands-in.receipts") is None)
        assert receipts(world) == [("delivered", "k", "c1")]
        assert not (tmp_path / "spool" / "commands-in.receipts").exists()
        assert world.state("commands-in") == "up"


async def test_receipts_that_wait_are_found_at_the_start(tmp_path: Path) -> None:
    async with World(tmp_path / "spool", RECEIPTS) as world:
        world.host.connect("c1")
        await until(lambda: world.state("commands-in") == "up")
        await world.send(b"x", mqttSecondTopic="/p2p/c1", receipt="true", KEYS="k", **KEPT)
        await until(lambda: world.count("commands-in", "delivered") == 1)
    async with world_with(tmp_path, cluster=world.cluster) as second:
        await until(lambda: receipts(second) == [("delivered", "k", "c1")])
        await until(lambda: second.state("commands-in.receipts") is None)


async def test_a_full_lane_of_receipts_holds_up_no_message(tmp_path: Path) -> None:
    async with World(tmp_path / "spool", RECEIPTS, max_bytes="64KiB") as world:
        world.host.connect("c1")
        await until(lambda: world.state("commands-in") == "up")
        for number in range(600):
            await world.send(b"x", mqttSecondTopic="/p2p/c1", receipt="true", KEYS=f"k{number}", **KEPT)
        await until(lambda: world.count("commands-in", "delivered") == 600)
        telemetry = world.bridge.telemetry.rules["commands-in.receipts"]
        assert telemetry.drops["lane_full"] + telemetry.outcomes["accepted"] == 600
        assert telemetry.drops["lane_full"] > 0


async def test_p2p_of_a_device_is_kept_before_puback_and_handed_on(tmp_path: Path) -> None:
    async with world_with(tmp_path, OUT) as world:
        assert p2p(world, "c1", b"kept")
        assert p2p(world, "c1", b"dropped", clean=True)
        await until(lambda: kept(world) == 1)
        assert world.bridge.telemetry.rules["sensors-out"].drops == {"not_persistent": 1}
        client = world.host.connect("c1")
        await until(lambda: kept(world) == 0)
        assert p2p(world, "c1", b"live")
        await until(lambda: payloads(client) == [b"kept", b"live"])
        relay = world.bridge.telemetry.relay
        assert relay is not None
        await until(lambda: relay.outcomes["sent"] == relay.outcomes["accepted"] == 2)
        assert (
            'mq2mqtt_messages_total{direction="uplink",outcome="sent",rule=".p2p"} 2.0'
            in (await world.get("/metrics"))[1]
        )


async def test_p2p_of_a_device_that_was_not_handed_on_is_handed_on_by_the_next_life(tmp_path: Path) -> None:
    world = world_with(tmp_path, OUT)
    assert p2p(world, "c1", b"kept")  # before the bridge runs
    await world.bridge.stop()
    async with world_with(tmp_path, OUT) as second:
        client = second.host.connect("c1")
        await until(lambda: payloads(client) == [b"kept"])


async def test_p2p_of_a_device_waits_for_space_and_makes_the_bridge_unready_meanwhile(tmp_path: Path) -> None:
    async with world_with(tmp_path, OUT, max_bytes="64KiB") as world:
        await until(lambda: world.state("sensors-out") == "up")
        world.host.go_away("no broker")  # nothing is handed on
        while p2p(world, "c1", bytes(5000)):
            await asyncio.sleep(0)
        assert (await world.get("/readyz"))[0] == 503
        world.host.come_back()
        await until(lambda: world.bridge.telemetry.ready)


async def test_a_relay_that_could_not_be_read_is_well_again_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world_with(tmp_path, OUT) as world:
        client = world.host.connect("c1")
        await until(lambda: world.bridge.telemetry.ready)

        def fail(*_: object, **__: object) -> list[Entry]:
            raise LaneError("the disk fails")

        with monkeypatch.context() as patch:
            patch.setattr(LaneReader, "read", fail)
            assert p2p(world, "c1", b"x")
            await until(lambda: not world.bridge.telemetry.ready)
            assert "the disk fails" in (await world.get("/readyz"))[1]
        await until(lambda: payloads(client) == [b"x"])
        await until(lambda: world.bridge.telemetry.ready)


async def test_p2p_of_a_device_with_a_lifetime_of_zero_is_for_who_is_there(tmp_path: Path) -> None:
    lane = Lane.open(tmp_path / "spool" / ".p2p", max_bytes=1 << 20, target="")
    for client_id in ("c1", "c2"):
        message = MqttMessage(
            f"sensors/p2p/{client_id}", b"x", 1, clean_session=False, properties=MqttProperties(expiry_seconds=0)
        )
        lane.append(encode_publish(message, accepted_us=time.time_ns() // 1000))
    lane.close()
    world = world_with(tmp_path, OUT)
    client = world.host.connect("c1")
    async with world:
        await until(lambda: world.bridge.telemetry.rules["sensors-out"].drops == {"not_persistent": 1})
        assert (payloads(client), kept(world)) == ([b"x"], 0)


async def test_a_foreign_frame_in_the_relay_stops_nothing(tmp_path: Path) -> None:
    lane = Lane.open(tmp_path / "spool" / ".p2p", max_bytes=1 << 20, target="")
    for topic in ("sensors/not-p2p", "gone/p2p/c1"):
        lane.append(encode_publish(MqttMessage(topic, b"x", 1, clean_session=False), accepted_us=1))
    lane.close()
    async with world_with(tmp_path, OUT) as world:
        client = world.host.connect("c1")
        await until(lambda: [m.topic for m in client.received] == ["gone/p2p/c1"])
        relay = world.bridge.telemetry.relay
        assert relay is not None
        await until(lambda: relay.outcomes["sent"] == 2)


async def test_what_a_clean_session_gave_up_is_given_up_for_the_next_life_too(tmp_path: Path) -> None:
    async with world_with(tmp_path, IN) as world:
        client = world.host.connect("c1", clean_session=False)
        client.subscriptions["devices/#"] = 1
        world.host.disconnect("c1")
        await until(lambda: world.state("commands-in") == "up")
        await world.send(b"old", mqttSecondTopic="/news")
        await world.send(b"p2p", mqttSecondTopic="/p2p/c1", **KEPT)
        await until(lambda: world.count("commands-in", "queued") == 2)
        world.host.go_away("nothing is handed over")
        world.host.connect("c1")
    async with world_with(tmp_path, IN, cluster=world.cluster) as second:
        client = second.host.connect("c1", clean_session=False)
        await until(lambda: kept(second) == 0)
        assert payloads(client) == [b"p2p"]


async def test_kept_messages_outlive_their_rule(tmp_path: Path) -> None:
    async with world_with(tmp_path, IN) as world:
        await until(lambda: world.state("commands-in") == "up")
        await world.send(b"x", mqttSecondTopic="/p2p/c1", **KEPT)
        await until(lambda: world.count("commands-in", "queued") == 1)
        world.reload()
        await until(lambda: world.state("commands-in") is None)
        client = world.host.connect("c1")
        await until(lambda: payloads(client) == [b"x"])


async def test_on_a_host_without_acknowledgements_a_kept_message_survives_the_end_of_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "CONFIRM_SECONDS", 2.0)
    async with world_with(tmp_path, IN) as world:
        world.host.sees_acknowledgements = False
        await until(lambda: world.state("commands-in") == "up")
        world.host.connect("c1")
        await world.send(b"x", mqttSecondTopic="/p2p/c1", **KEPT)
        await until(lambda: world.count("commands-in", "delivered") == 1)
        client = world.host.connect("c1")
        await until(lambda: kept(world) == 0)
        assert payloads(client) == [b"x"]


async def test_a_store_that_takes_nothing_holds_up_what_comes_from_rocketmq(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world_with(tmp_path, IN) as world:
        await until(lambda: world.state("commands-in") == "up")
        assert world.bridge.store is not None

        def refuse(_message: StoredMessage) -> asyncio.Future[None]:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.set_exception(StoreError("too much waits"))
            return future

        with monkeypatch.context() as patch:
            patch.setattr(world.bridge.store.offline, "add", refuse)
            await world.send(b"0", mqttSecondTopic="/p2p/c1", **KEPT)
            await until(lambda: world.count("commands-in", "received") == 1)
            for number in range(1, 100):
                await world.send(b"%d" % number, mqttSecondTopic="/p2p/c1", **KEPT)
            await asyncio.sleep(0.3)
            assert world.count("commands-in", "received") == 1
        await until(lambda: world.count("commands-in", "queued") == 100)


async def test_a_batch_that_is_kept_for_many_sessions_is_taken_in_turns(tmp_path: Path) -> None:
    world = world_with(tmp_path, {**IN, "from": "earliest"})
    world.cluster.create_topic("mq_commands", 1)
    for _ in range(32):
        await world.send(b"x", mqttSecondTopic="/news", qoslevel="1")
    for number in range(500):
        client = world.host.connect(f"c{number}", clean_session=False)
        client.subscriptions["devices/news"] = 1
        world.host.disconnect(client.client_id)
    async with world:
        received = [0]
        while received[-1] < 32:
            await asyncio.sleep(0)
            received.append(world.count("commands-in", "received"))
        assert max(after - before for before, after in pairwise(received)) < 10
        await until(lambda: world.count("commands-in", "queued") == 32)


async def test_a_store_that_cannot_be_read_or_written_holds_the_rules_down(tmp_path: Path) -> None:
    async with world_with(tmp_path, IN, OUT) as world:
        await until(lambda: world.bridge.telemetry.ready)
        await asyncio.to_thread(rename, tmp_path / "spool.db", "offline", "away")
        # Nobody wants anything kept: what looks for messages that are over finds out.
        await until(lambda: world.state("commands-in") == "down")
        relay = world.bridge.telemetry.relay
        assert relay is not None
        assert relay.up
        assert p2p(world, "c1", b"x")
        await until(lambda: "no such table: offline" in str(relay.reason))
        await asyncio.to_thread(rename, tmp_path / "spool.db", "away", "offline")
        await until(lambda: kept(world) == 1)
        await until(lambda: world.bridge.telemetry.ready and relay.up)


async def test_a_store_that_cannot_be_opened_is_one_clear_line(tmp_path: Path) -> None:
    world = World(tmp_path / "spool", IN)
    settings = world.settings(IN).model_copy(
        update={"store": world.settings().store.model_copy(update={"url": "sqlite+aiosqlite:////dev/null/x.db"})}
    )
    await world.bridge.stop()
    bridge = Bridge(settings, world.host, link=world.link)
    with pytest.raises(ConfigError, match=r"^store\.url: "):
        await bridge.start()
    await bridge.stop()
