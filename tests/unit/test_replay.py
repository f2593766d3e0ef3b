import asyncio
from pathlib import Path

import pytest

from mq2mqtt.errors import LaneError
from mq2mqtt.host import Delivery, Outcome
from mq2mqtt.link import ConsumeFrom
from mq2mqtt.link.memory import MemoryCluster
from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.frame import Frame, FrameKind, decode_frames, encode_publish
from mq2mqtt.spool.parked import ParkedStore, ask_replay, drop, keys_of, list_parked
from tests.unit.bridge_world import IN, OUT, World, until

ROCKET = Frame(
    FrameKind.ROCKETMQ, 0, 5_000_000, "", "mq_commands", b"mqttSecondTopic\x01/a\x02TAGS\x01MQ2MQTT\x02", b"on"
)


def publish_frame(payload: bytes = b"21.5", topic: str = "sensors/t") -> Frame:
    frame = encode_publish(MqttMessage(topic, payload, 1, client_id="c1"), accepted_us=7)
    return decode_frames(frame, 0, max_frames=1)[0][0]


def park(directory: Path, rule: str, frame: Frame, *keys: str) -> Path:
    """Park `frame` under each key, and ask for the replay of all."""
    store = ParkedStore(directory / rule, max_bytes=1 << 20)
    for key in keys:
        store.append(frame, key=key, reason="why")
        assert ask_replay(directory / rule, key)
    return directory / rule


def sums_hold(world: World, *, out: str = "sensors-out", inbound: str = "commands-in") -> bool:
    rules = world.bridge.telemetry.rules
    if out in rules:
        counts = rules[out].outcomes
        assert counts["accepted"] == counts["sent"] + counts["parked"] + rules[out].lane_messages
    if inbound in rules:
        counts = rules[inbound].outcomes
        rest = ("delivered", "no_subscriber", "queued", "expired", "parked", "skipped", "dropped")
        assert counts["received"] == sum(counts[outcome] for outcome in rest) + rules[inbound].in_flight
    return True


async def test_what_was_asked_for_while_the_bridge_was_down_is_sent_once_under_its_key(tmp_path: Path) -> None:
    lane = park(tmp_path, "sensors-out", publish_frame(), "1700000000000000")
    async with World(tmp_path, OUT) as world:
        await until(lambda: world.sent() == [b"21.5"] and not keys_of(lane))
        (message,) = world.cluster.queues("mq_sensors")[0]
        assert message.properties["KEYS"] == "n1:sensors-out:1700000000000000"
        assert message.properties["clientId"] == "c1"
        status, text = await world.get("/metrics")
        assert status == 200
        assert 'mq2mqtt_messages_total{direction="uplink",outcome="accepted",rule="sensors-out"} 1.0' in text
        assert 'mq2mqtt_parked_messages{rule="sensors-out"} 0.0' in text
        assert sums_hold(world)


async def test_what_is_asked_for_while_the_bridge_runs_is_sent_beside_new_messages(tmp_path: Path) -> None:
    async with World(tmp_path, OUT) as world:
        world.publish("sensors/x", b"new")
        lane = park(tmp_path, "sensors-out", publish_frame(), *(str(number) for number in range(300)))
        await until(lambda: len(world.sent()) == 301 and not keys_of(lane))
        world.publish("sensors/x", b"later")
        await until(lambda: len(world.sent()) == 302)
        assert world.count("sensors-out", "accepted") == world.count("sensors-out", "sent") == 302
        assert sums_hold(world)


async def test_what_can_still_not_be_sent_is_parked_again_and_holds_up_no_other(tmp_path: Path) -> None:
    bad = publish_frame(bytes(5 << 20))
    lane = park(tmp_path, "sensors-out", bad, "1")
    park(tmp_path, "sensors-out", publish_frame(), "2")
    async with World(tmp_path, OUT, max_bytes="256MiB") as world:
        await until(lambda: world.sent() == [b"21.5"] and world.count("sensors-out", "parked") == 1)
        (message,) = list_parked(lane)
        assert (message.key, message.replaying) == ("1", False)
        assert "RocketMQ takes 4194304" in message.reason
        assert message.frame == bad
        assert sums_hold(world)


async def test_while_rocketmq_is_away_a_replay_waits(tmp_path: Path) -> None:
    lane = park(tmp_path, "sensors-out", publish_frame(), "1", "2")
    async with World(tmp_path, OUT | {"target": "mq_later"}) as world:
        await asyncio.sleep(1.1)
        assert [message.replaying for message in list_parked(lane)] == [True, True]
        world.cluster.create_topic("mq_later", 1)
        await until(lambda: len(world.sent("mq_later")) == 2 and not keys_of(lane))


async def test_an_inbound_message_reaches_the_subscribers_there_are_now(tmp_path: Path) -> None:
    lane = park(tmp_path, "commands-in", ROCKET, "broker-a/0/7")
    world = World(tmp_path, IN)
    device = world.host.connect("c1")
    device.subscriptions["devices/#"] = 1
    async with world:
        await until(lambda: [message.payload for message in device.received] == [b"on"] and not keys_of(lane))
        assert device.received[0].topic == "devices/a"
        assert world.count("commands-in", "received") == world.count("commands-in", "delivered") == 1
        assert sums_hold(world)


@pytest.mark.parametrize(
    ("topic", "reason"), [("/a", "no_subscriber"), ("/p2p/c1", "not_persistent"), ("/slow", "slow_device")]
)
async def test_an_inbound_message_that_reaches_nobody_stays_for_the_operator(
    topic: str, reason: str, tmp_path: Path
) -> None:
    frame = ROCKET._replace(properties=f"mqttSecondTopic\x01{topic}\x02TAGS\x01MQ2MQTT\x02".encode())
    lane = park(tmp_path, "commands-in", frame, "broker-a/0/7")
    world = World(tmp_path, IN)
    slow = world.host.connect("slow")
    slow.subscriptions["devices/slow"] = 1
    slow.acknowledges = False
    async with world:
        await until(lambda: world.count("commands-in", "received") == 1)
        world.host.time_out("slow")
        await until(lambda: [message.replaying for message in list_parked(lane)] == [False])
        (message,) = list_parked(lane)
        assert (message.key, message.frame) == ("broker-a/0/7", frame)
        assert message.reason == f"replayed to nobody: {reason}"
        assert sums_hold(world)
        device = world.host.connect("c1")
        device.subscriptions["devices/#"] = 1
        assert ask_replay(lane, "broker-a/0/7")
        await until(lambda: len(device.received) == 1)
        world.host.time_out("slow")
        await until(lambda: not keys_of(lane))
        assert sums_hold(world)


async def test_inbound_messages_of_a_queue_are_replayed_in_their_order(tmp_path: Path) -> None:
    for number in range(8, 13):
        park(tmp_path, "commands-in", ROCKET._replace(payload=b"%d" % number), f"broker-a/0/{number}")
    world = World(tmp_path, IN)
    device = world.host.connect("c1")
    device.subscriptions["devices/#"] = 1
    async with world:
        await until(lambda: len(device.received) == 5)
    assert [message.payload for message in device.received] == [b"8", b"9", b"10", b"11", b"12"]


async def test_an_inbound_message_is_forgotten_when_its_device_has_acknowledged_it(tmp_path: Path) -> None:
    keys = [f"broker-a/0/{number}" for number in range(250)]
    lane = park(tmp_path, "commands-in", ROCKET, *keys)
    world = World(tmp_path, IN)
    device = world.host.connect("c1")
    device.subscriptions["devices/#"] = 1
    device.acknowledges = False
    async with world:
        await until(lambda: len(device.received) == 100)
        await asyncio.sleep(1.1)
        # Neither more than that on their way, nor one of them twice.
        assert len(device.received) == 100
        assert len(keys_of(lane)) == 250
        device.acknowledges = True
        for acknowledge in device.unsettled:
            acknowledge(Delivery(Outcome.DELIVERED))
        await until(lambda: not keys_of(lane))
        assert len(device.received) == 250
        assert sums_hold(world)


@pytest.mark.parametrize(("topic", "reason"), [(b"/a/+", "+"), (b"/\xc4\xe3", "not valid UTF-8")])
async def test_an_inbound_message_that_still_has_no_legal_topic_is_parked_again(
    topic: bytes, reason: str, tmp_path: Path
) -> None:
    wrong = ROCKET._replace(properties=b"mqttSecondTopic\x01" + topic + b"\x02")
    lane = park(tmp_path, "commands-in", wrong, "broker-a/0/7")
    async with World(tmp_path, IN) as world:
        await until(lambda: world.count("commands-in", "parked") == 1)
        (message,) = list_parked(lane)
        assert (message.key, message.frame, message.replaying) == ("broker-a/0/7", wrong, False)
        assert reason in message.reason
        assert sums_hold(world)


async def test_inbound_messages_of_the_same_place_are_parked_beside_each_other(tmp_path: Path) -> None:
    rule = IN | {"from": "earliest"}
    async with World(tmp_path, rule) as world:
        world.cluster.create_topic("mq_other", 1)
        await world.send(b"one", mqttSecondTopic="/a/+")
        await until(lambda: world.count("commands-in", "parked") == 1)
        lane = tmp_path / "commands-in"
        (first,) = keys_of(lane)
        assert ask_replay(lane, first)
        await world.send(b"of another topic", topic="mq_other", mqttSecondTopic="/a/+")
        world.reload(rule | {"source": "mq_other"})
        await until(lambda: len(keys_of(lane)) == 2)
    # A topic that is made anew begins at offset 0.
    async with World(tmp_path, rule) as world:
        await world.send(b"of a new topic", mqttSecondTopic="/a/+")
        await until(lambda: len(keys_of(lane)) == 3)
        for key in keys_of(lane):
            assert ask_replay(lane, key)
        await until(lambda: world.count("commands-in", "parked") >= 4)
        await until(lambda: not any(message.replaying for message in list_parked(lane)))
    bodies = {message.frame.payload for message in list_parked(lane)}
    assert bodies == {b"one", b"of another topic", b"of a new topic"}
    assert {key.partition("@")[0] for key in keys_of(lane)} == {"memory/0/0"}


async def test_the_same_inbound_message_again_replaces_its_record(tmp_path: Path) -> None:
    cluster, rule = MemoryCluster(), IN | {"group": "GID_in", "from": "earliest"}
    async with World(tmp_path, rule, cluster=cluster) as world:
        await world.send(b"on", mqttSecondTopic="/a/+")
        await until(lambda: world.count("commands-in", "parked") == 1)
        lane = tmp_path / "commands-in"
        before = list_parked(lane)
    # As after a crash before the commit.
    cluster.offsets("mq_commands", "GID_in", ConsumeFrom.EARLIEST)[0] = 0
    async with World(tmp_path, rule, cluster=cluster) as world:
        await until(lambda: world.count("commands-in", "parked") == 1)
    ((key, parked_us),) = [(message.key, message.parked_us) for message in list_parked(lane)]
    assert key == before[0].key
    assert parked_us > before[0].parked_us


@pytest.mark.parametrize("error", [LaneError("the disk is full"), ValueError("does not fit")])
async def test_an_inbound_message_that_cannot_be_parked_again_yet_stays_as_it_is(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ROCKET._replace(properties=b"mqttSecondTopic\x01/a/+\x02")
    lane = park(tmp_path, "commands-in", wrong, "broker-a/0/7")

    refused: list[object] = []

    def refuse(*_: object, key: str, **__: object) -> int:
        refused.append(key)
        raise error

    async with World(tmp_path, IN) as world:
        with monkeypatch.context() as patch:
            patch.setattr(ParkedStore, "append", refuse)
            await until(lambda: len(refused) > 1)
            assert [message.replaying for message in list_parked(lane)] == [True]
            assert world.bridge.telemetry.rules["commands-in"].drops == {}
            assert sums_hold(world)
        await until(lambda: [message.replaying for message in list_parked(lane)] == [False])
        assert world.count("commands-in", "received") == world.count("commands-in", "parked") == 1
        assert sums_hold(world)


@pytest.mark.parametrize(
    ("rule", "frame", "key"),
    [("sensors-out", ROCKET, "broker-a/0/7"), ("commands-in", publish_frame(), "17"), ("commands-in", ROCKET, "a/b/c")],
)
async def test_a_message_of_another_type_of_rule_is_parked_again_as_it_was(
    rule: str, frame: Frame, key: str, tmp_path: Path
) -> None:
    lane = park(tmp_path, rule, frame, key)
    async with World(tmp_path, OUT, IN) as world:
        await until(lambda: [message.replaying for message in list_parked(lane)] == [False])
        (message,) = list_parked(lane)
        assert (message.key, message.frame) == (key, frame)
        assert "another type" in message.reason
        assert world.bridge.telemetry.rules[rule].outcomes.total() == 0


async def test_a_client_event_goes_to_its_rule_once_more_as_it_was(tmp_path: Path) -> None:
    body = b'{"clientId":"GID_dev@@@1","channelId":"c","eventType":"tcpclean","time":1,"seq":5,"epoch":2,"node":"n1"}'
    lane = park(tmp_path, "presence", Frame(FrameKind.EVENT, 0, 7, "GID_dev@@@1", "", b"", body), "17")
    world = World(tmp_path, {"id": "presence", "type": "status", "source": "GID_dev", "target": "mq_status"})
    world.cluster.create_topic("mq_status", 1)
    async with world:
        await until(lambda: world.sent("mq_status") == [body] and not keys_of(lane))
        (message,) = world.cluster.queues("mq_status")[0]
        assert message.properties["TAGS"] == "tcpclean"
        assert message.properties["KEYS"] == "n1:presence:17"
        assert sums_hold(world, out="presence")


async def test_a_receipt_goes_to_its_topic_once_more_as_it_was(tmp_path: Path) -> None:
    properties = b"TAGS\x01queued\x02KEYS\x01order-1\x02mq2mqttNode\x01n1\x02"
    name = "commands-in.receipts"
    lane = park(tmp_path, name, Frame(FrameKind.ROCKETMQ, 0, 7, "c1", "devices/a", properties, b"{}"), "17")
    world = World(tmp_path, IN | {"receipts": "mq_receipts"})
    world.cluster.create_topic("mq_receipts", 1)
    async with world:
        await until(lambda: world.sent("mq_receipts") == [b"{}"] and not keys_of(lane))
        (message,) = world.cluster.queues("mq_receipts")[0]
        assert {**message.properties, "TAGS": "queued", "KEYS": "order-1"} == message.properties
        assert sums_hold(world, out=name)


async def test_a_disabled_rule_replays_when_it_is_enabled(tmp_path: Path) -> None:
    lane = park(tmp_path, "commands-in", ROCKET, "broker-a/0/7")
    world = World(tmp_path, IN | {"enabled": False})
    device = world.host.connect("c1")
    device.subscriptions["devices/#"] = 1
    async with world:
        await asyncio.sleep(1.1)
        assert (device.received, len(keys_of(lane))) == ([], 1)
        world.reload(IN)
        await until(lambda: len(device.received) == 1 and not keys_of(lane))


async def test_what_a_disabled_rule_has_parked_is_counted_until_it_is_dropped(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.state("commands-in") == "up")
        await world.send(b"on", mqttSecondTopic="/a/+")
        await until(lambda: world.count("commands-in", "parked") == 1)
        world.reload(IN | {"enabled": False})
        assert 'mq2mqtt_parked_messages{rule="commands-in"} 1.0' in (await world.get("/metrics"))[1]
        (key,) = keys_of(tmp_path / "commands-in")
        assert drop(tmp_path / "commands-in", key)
        assert 'mq2mqtt_parked_messages{rule="commands-in"} 0.0' in (await world.get("/metrics"))[1]


async def test_a_damaged_message_is_left_for_the_operator_and_holds_up_no_other(tmp_path: Path) -> None:
    lane = park(tmp_path, "sensors-out", publish_frame(), "1", "2")
    (lane / "parked" / "1.replay").write_bytes(b"damaged")
    async with World(tmp_path, OUT) as world:
        await until(lambda: world.sent() == [b"21.5"])
        await until((lane / "parked" / "1.parked").exists)
        assert drop(lane, "1")
        assert keys_of(lane) == []


async def test_what_cannot_be_deleted_is_not_sent_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def refuse(_: ParkedStore, key: str) -> None:
        refused.append(key)
        raise LaneError("cannot delete it")

    monkeypatch.setattr(ParkedStore, "replayed", refuse)
    lane = park(tmp_path, "sensors-out", publish_frame(), "1", "2")
    async with World(tmp_path, OUT) as world:
        await until(lambda: len(refused) >= 6)
        assert world.sent() == [b"21.5", b"21.5"]
        assert set(refused) == {"1", "2"}
        monkeypatch.undo()
        await until(lambda: not keys_of(lane))
        assert len(world.sent()) == 2


async def test_a_stop_waits_for_no_answer_that_does_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = park(tmp_path, "sensors-out", publish_frame(), "1")
    world = World(tmp_path, OUT)
    sending = []

    async def hang(*_: object) -> None:
        sending.append(1)
        await asyncio.Event().wait()

    monkeypatch.setattr(world.link, "send", hang)
    async with world:
        world.publish("sensors/x")
        await until(lambda: len(sending) == 2)
        async with asyncio.timeout(world.settings().stop_deadline):
            await world.bridge.stop()
    assert [message.replaying for message in list_parked(lane)] == [True]


async def test_a_bridge_that_is_stopped_leaves_what_has_no_outcome_for_its_next_start(tmp_path: Path) -> None:
    lane = park(tmp_path, "commands-in", ROCKET, "broker-a/0/7")
    world = World(tmp_path, IN)
    world.host.go_away("the broker is away")
    async with world:
        await asyncio.sleep(1.1)
    assert [message.replaying for message in list_parked(lane)] == [True]
    world = World(tmp_path, IN)
    device = world.host.connect("c1")
    device.subscriptions["devices/#"] = 1
    async with world:
        await until(lambda: len(device.received) == 1 and not keys_of(lane))
