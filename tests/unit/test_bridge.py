"""The bridge whole, between the in-process link and the in-process host."""

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from loguru import logger

from mq2mqtt.errors import LaneError, LaneLockedError, LinkError
from mq2mqtt.link.memory import MemoryCluster
from mq2mqtt.spool.parked import ask_replay, list_parked
from tests.unit.bridge_world import IN, OUT, World, until


async def test_the_round_trip(tmp_path: Path) -> None:
    async with World(tmp_path, OUT, IN) as world:
        world.publish("sensors/room", b"21")
        await until(lambda: world.sent() == [b"21"])
        client = world.host.connect("c1")
        client.subscriptions["devices/#"] = 1
        await world.send(b"on", mqttSecondTopic="/lamp")
        await until(lambda: len(client.received) == 1)
    assert (client.received[0].topic, client.received[0].payload) == ("devices/lamp", b"on")


async def test_readyz_tells_what_is_down_and_why(tmp_path: Path) -> None:
    async with World(tmp_path, OUT, IN) as world:
        await until(lambda: world.bridge.telemetry.ready)
        assert (await world.get("/readyz"))[0] == 200
        world.link.fail_with("mq_sensors", LinkError("no permission"))
        await until(lambda: not world.bridge.telemetry.ready)
        status, text = await world.get("/readyz")
        assert status == 503
        sensors, commands = json.loads(text)["rules"]
        assert (sensors["id"], sensors["state"], sensors["reason"]) == ("sensors-out", "down", "no permission")
        assert commands["state"] == "up"
        assert (await world.get("/healthz"))[0] == 200


def _empty(lane: Path) -> None:
    for file in lane.glob("*.seg"):
        os.truncate(file, 0)


@pytest.mark.parametrize("harm", [shutil.rmtree, _empty])
async def test_a_damaged_lane_hides_no_metrics(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    log: list[str] = []
    async with World(tmp_path, OUT, IN) as world:
        await until(lambda: world.state("sensors-out") == "up")
        world.link.fail_with("mq_sensors", LinkError("away"))
        world.publish("sensors/x", b"waits")
        harm(tmp_path / "sensors-out")
        await until(lambda: world.state("commands-in") == "up")
        sink = logger.add(log.append, level="ERROR", format="{message}")
        for _ in range(2):
            status, text = await world.get("/metrics")
            assert status == 200
            assert 'mq2mqtt_lane_messages{rule="sensors-out"} 1.0' in text
            assert 'mq2mqtt_consumer_lag{rule="commands-in"} 0.0' in text
        logger.remove(sink)
    assert len([line for line in log if "oldest message is not known" in line]) == 1


async def test_a_missing_topic_holds_one_rule_down_only(tmp_path: Path) -> None:
    lost = {**OUT, "id": "lost-out", "source": "lost", "target": "mq_nowhere"}
    async with World(tmp_path, OUT, lost) as world:
        world.publish("lost/x", b"waits")
        world.publish("sensors/x", b"flows")
        await until(lambda: world.sent() == [b"flows"])
        await until(lambda: "mq_nowhere" in (world.bridge.telemetry.rules["lost-out"].reason or ""))
        world.cluster.create_topic("mq_nowhere", 1)
        await until(lambda: len(world.cluster.queues("mq_nowhere")[0]) == 1)


async def test_p2p_between_devices(tmp_path: Path) -> None:
    async with World(tmp_path, OUT) as world:
        target = world.host.connect("target")
        world.publish("sensors/p2p/target", b"psst", qos=2)
        assert [(m.topic, m.payload, m.qos) for m in target.received] == [("sensors/p2p/target", b"psst", 2)]
        world.publish("sensors/p2p/away", b"lost")
        assert world.bridge.telemetry.rules["sensors-out"].drops == {"not_persistent": 1}
        await until(lambda: world.sent() == [b"psst", b"lost"])


async def test_a_bridges_own_message_is_skipped(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.bridge.telemetry.ready)
        await world.send(b"own", mq2mqttNode="other")
        await until(lambda: world.count("commands-in", "skipped") == 1)
        assert world.count("commands-in", "received") == 1


async def test_a_message_without_a_legal_topic_is_parked(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.bridge.telemetry.ready)
        await world.send(b"bad", mqttSecondTopic="/a/+", extra="kept")
        await until(lambda: world.count("commands-in", "parked") == 1)
        assert 'mq2mqtt_parked_messages{rule="commands-in"} 1.0' in (await world.get("/metrics"))[1]
    (parked,) = list_parked(tmp_path / "commands-in")
    assert (parked.frame.payload, parked.frame.topic) == (b"bad", "mq_commands")
    assert b"extra\x01kept" in parked.frame.properties
    assert "wildcard" in parked.reason


NOT_UTF8 = b"/\xc4\xe3".decode("utf-8", "surrogateescape")
"""As librocketmq's driver gives it."""


@pytest.mark.parametrize(
    ("topic", "born_ms"),
    [
        (NOT_UTF8, 1_700_000_000_000),
        ("/a/+", -1),
        ("/a/+", -(2**63)),
        ("/a/+", 1_700_000_000_000_000_000),  # nanoseconds
        ("/a/+", 2**63 - 1),
    ],
)
async def test_whatever_a_producer_says_its_message_is_parked_and_stops_none(
    topic: str, born_ms: int, tmp_path: Path
) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.bridge.telemetry.ready)
        await world.send(b"bad", mqttSecondTopic=".")
        messages = world.cluster.queues("mq_commands")[0]
        messages[0] = messages[0]._replace(properties={"TAGS": "MQ2MQTT", "mqttSecondTopic": topic}, born_ms=born_ms)
        await world.send(b"good", mqttSecondTopic="/x")
        await until(lambda: world.count("commands-in", "no_subscriber") == 1)
        assert world.count("commands-in", "parked") == 1
        assert world.count("commands-in", "received") == 2
        assert world.bridge.telemetry.rules["commands-in"].in_flight == 0
        (parked,) = list_parked(tmp_path / "commands-in")
        text = f"TAGS\x01MQ2MQTT\x02mqttSecondTopic\x01{topic}\x02"
        assert parked.frame.properties == text.encode("utf-8", "surrogateescape")
        assert parked.frame.accepted_us == min(max(born_ms, 0), (2**64 - 1) // 1000) * 1000
        assert ask_replay(tmp_path / "commands-in", parked.key)
        await until(lambda: world.count("commands-in", "parked") == 2)
        (again,) = list_parked(tmp_path / "commands-in")
        assert (again.frame, again.reason) == (parked.frame, parked.reason)


async def test_what_cannot_even_be_parked_is_dropped_and_stops_none(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.bridge.telemetry.ready)
        await world.send(b"bad", mqttSecondTopic="/+")
        messages = world.cluster.queues("mq_commands")[0]
        messages[0] = messages[0]._replace(broker="b" * 300)  # a file's name cannot hold it
        await world.send(b"good", mqttSecondTopic="/x")
        await until(lambda: world.count("commands-in", "no_subscriber") == 1)
        assert world.count("commands-in", "dropped") == 1
        assert world.bridge.telemetry.rules["commands-in"].drops == {"parking_full": 1}
        assert world.bridge.telemetry.rules["commands-in"].in_flight == 0


@pytest.mark.parametrize("born_ms", [-(2**63), -1, 1_700_000_000_000_000_000, 2**63 - 1])
@pytest.mark.parametrize("lifetime", [{}, {"ttlSeconds": "0"}, {"ttlSeconds": "60"}])
async def test_whatever_a_producer_says_of_its_clock_its_message_has_an_outcome(
    born_ms: int, lifetime: dict[str, str], tmp_path: Path
) -> None:
    keeps = {"qoslevel": "1", "cleansessionflag": "false", "receipt": "true"}
    async with World(tmp_path, IN | {"receipts": "mq_sensors"}) as world:
        await until(lambda: world.bridge.telemetry.ready)
        client = world.host.connect("c1")
        client.subscriptions["devices/#"] = 1
        for topic in ("/x", "/p2p/c1", "/p2p/away"):
            await world.send(b"x", mqttSecondTopic=topic, **keeps, **lifetime)
        messages = world.cluster.queues("mq_commands")[0]
        messages[:] = [message._replace(born_ms=born_ms) for message in messages]
        counts = world.bridge.telemetry.rules["commands-in"].outcomes
        await until(lambda: sum(counts[name] for name in ("delivered", "queued", "expired", "dropped")) == 3)
        assert counts["parked"] == 0


async def test_a_spool_that_cannot_hold_parked_messages_is_refused(tmp_path: Path) -> None:
    (tmp_path / "commands-in").mkdir()
    (tmp_path / "commands-in" / "parked").write_text("a file where the directory should be")
    with pytest.raises(LaneError, match="parked"):
        World(tmp_path, IN)


async def test_when_parking_is_full_the_oldest_makes_room_and_is_counted(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.bridge.telemetry.ready)
        for number in range(3):
            await world.send(b"%d" % number * 3_000_000, mqttSecondTopic="/+")
        await world.send(b"good", mqttSecondTopic="/x")
        await until(lambda: world.count("commands-in", "no_subscriber") == 1)
        assert world.count("commands-in", "parked") == 3
        assert world.bridge.telemetry.rules["commands-in"].drops == {"parking_full": 2}
    assert [parked.frame.payload[:1] for parked in list_parked(tmp_path / "commands-in")] == [b"2"]


async def test_when_the_disk_refuses_to_park_what_comes_behind_still_flows(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.bridge.telemetry.ready)
        (tmp_path / "commands-in").write_text("a file where the directory should be")
        await world.send(b"bad", mqttSecondTopic="/+")
        await world.send(b"good", mqttSecondTopic="/x")
        await until(lambda: world.count("commands-in", "no_subscriber") == 1)
        assert world.count("commands-in", "dropped") == 1
        assert world.bridge.telemetry.rules["commands-in"].drops == {"parking_full": 1}
        (tmp_path / "commands-in").unlink()


async def test_a_failing_host_parks_the_message_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.bridge.telemetry.ready)

        def fail(*_: object, **__: object) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(world.host, "publish", fail)
            await world.send(b"bad luck")
            await until(lambda: world.count("commands-in", "parked") == 1)
        await world.send(b"fine")
        await until(lambda: world.count("commands-in", "no_subscriber") == 1)


async def test_an_unacknowledged_message_comes_again_after_a_stop(tmp_path: Path) -> None:
    cluster = MemoryCluster()
    async with World(tmp_path, IN, cluster=cluster) as world:
        await until(lambda: world.bridge.telemetry.ready)
        client = world.host.connect("c1")
        client.acknowledges = False
        await world.send(b"first", mqttSecondTopic="/p2p/c1")
        await world.send(b"second", mqttSecondTopic="/none")
        await until(lambda: world.count("commands-in", "no_subscriber") == 1)
        stop = asyncio.create_task(world.bridge.stop(), name="stop")
        await asyncio.sleep(0.1)
        assert not stop.done()
        await stop
    async with World(tmp_path, IN, cluster=cluster) as world:
        client = world.host.connect("c1")
        await until(lambda: world.count("commands-in", "no_subscriber") == 1)
        received = world.bridge.telemetry.rules["commands-in"].outcomes["received"]
    assert received == 2


async def test_a_stop_waits_for_acknowledgements(tmp_path: Path) -> None:
    cluster = MemoryCluster()
    async with World(tmp_path, IN, cluster=cluster) as world:
        await until(lambda: world.bridge.telemetry.ready)
        client = world.host.connect("c1")
        client.acknowledges = False
        await world.send(b"x", mqttSecondTopic="/p2p/c1")
        await until(lambda: len(client.received) == 1)
        stop = asyncio.create_task(world.bridge.stop(), name="stop")
        await asyncio.sleep(0.05)
        world.host.time_out("c1")
        await stop
    group = "GID_mq2mqtt_commands-in_n1"
    assert cluster.committed("mq_commands", group) == (1,)


async def test_another_bridge_of_the_same_node_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq2mqtt.bridge._GROUP_SECONDS", 0.05)
    cluster = MemoryCluster()
    async with World(tmp_path / "1", IN, cluster=cluster) as world:
        await until(lambda: world.bridge.telemetry.ready)
        other = World(tmp_path / "2", IN, cluster=cluster, client_id="stranger")
        async with other:
            await until(
                lambda: "another bridge uses node n1" in (world.bridge.telemetry.rules["commands-in"].reason or "")
            )
        await until(lambda: world.bridge.telemetry.ready)


async def test_one_spool_serves_one_bridge(tmp_path: Path) -> None:
    world = World(tmp_path, OUT)
    with pytest.raises(LaneLockedError, match="another bridge runs on"):
        World(tmp_path, OUT)
    await world.bridge.stop()


async def test_a_copy_of_a_lane_in_the_spool_is_left_alone(tmp_path: Path) -> None:
    cluster = MemoryCluster()
    first = World(tmp_path, OUT, cluster=cluster)
    first.publish("sensors/x", b"once")
    await first.bridge.stop()
    copy = shutil.copytree(tmp_path / "sensors-out", tmp_path / "sensors-out.bak")
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), format="{message}", level="WARNING")
    async with World(tmp_path, OUT, cluster=cluster) as world:
        logger.remove(sink)
        await until(lambda: world.state("sensors-out") == "up" and world.sent() == [b"once"])
        assert list(world.bridge.telemetry.rules) == ["sensors-out"]
    assert [line for line in lines if str(copy) in line and "left alone" in line]
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before


async def test_the_lane_of_a_deleted_rule_drains_and_goes(tmp_path: Path) -> None:
    cluster = MemoryCluster()
    first = World(tmp_path, OUT, cluster=cluster)
    first.publish("sensors/x", b"left behind")
    await first.bridge.stop()
    async with World(tmp_path, cluster=cluster) as world:
        await until(lambda: world.sent() == [b"left behind"])
        await until(lambda: not (tmp_path / "sensors-out").exists())
        assert not world.bridge.telemetry.rules


async def test_a_disabled_rule_takes_nothing_and_its_lane_still_drains(tmp_path: Path) -> None:
    cluster = MemoryCluster()
    first = World(tmp_path, OUT, cluster=cluster)
    first.publish("sensors/x", b"left behind")
    await first.bridge.stop()
    async with World(tmp_path, {**OUT, "enabled": False}, {**IN, "enabled": False}, cluster=cluster) as world:
        assert world.bridge.intake.route("sensors/x") is None
        await until(lambda: world.sent() == [b"left behind"])
        assert world.bridge.telemetry.ready
        assert {rule.state for rule in world.bridge.telemetry.rules.values()} == {"disabled"}


async def test_the_lag_of_a_rule_that_does_not_receive_is_not_told(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.state("commands-in") == "up")
        assert "mq2mqtt_consumer_lag{" in (await world.get("/metrics"))[1]
        world.reload({**IN, "enabled": False})
        await until(lambda: world.state("commands-in") == "disabled")
        assert "mq2mqtt_consumer_lag{" not in (await world.get("/metrics"))[1]


async def test_stop_is_idempotent_and_may_come_before_start(tmp_path: Path) -> None:
    world = World(tmp_path, OUT, IN)
    await world.bridge.stop()
    await world.bridge.stop()
