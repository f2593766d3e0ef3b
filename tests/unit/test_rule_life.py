"""The life of a rule on a running bridge: it appears, changes, is disabled, goes, and comes back."""

import asyncio
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from loguru import logger

from mq2mqtt.errors import LinkError
from mq2mqtt.link.memory import MemoryCluster
from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.parked import list_parked
from mq2mqtt.workers import LaneWorker, OutboundWorker
from tests.unit.bridge_world import IN, OUT, World, until

_T = TypeVar("_T")

OTHER_OUT = {"id": "meters-out", "type": "outbound", "source": "meters", "target": "mq_other"}
GROUP = "GID_mq2mqtt_commands-in_n1"
_OFF = {"enabled": False}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq2mqtt.bridge._WATCH_SECONDS", 0.02)
    monkeypatch.setattr("mq2mqtt.downlink._RETRY_SECONDS", 0.02)


@pytest.fixture
def cluster() -> MemoryCluster:
    cluster = MemoryCluster()
    for topic in ("mq_other", "mq_commands2"):
        cluster.create_topic(topic, 1)
    return cluster


def noted_target(world: World, rule: str = "sensors-out") -> str:
    return str(json.loads((world.directory / rule / "lane.json").read_text())["target"])


# -- outbound --


async def test_another_target_gets_the_backlog_and_lane_json_knows(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, OUT, cluster=cluster) as world:
        world.link.fail_with("mq_sensors", LinkError("away"))
        for number in range(50):
            world.publish("sensors/x", b"%d" % number)
        await until(lambda: world.state("sensors-out") == "down")
        world.reload({**OUT, "target": "mq_other"})
        world.publish("sensors/x", b"50")
        await until(lambda: len(world.sent("mq_other")) == 51)
        await until(lambda: world.state("sensors-out") == "up")
        assert world.sent("mq_other") == [b"%d" % number for number in range(51)]
        assert noted_target(world) == "mq_other"
        world.link.fail_with("mq_sensors", None)
        assert world.sent() == []


async def test_a_target_that_cannot_be_noted_is_noted_later(
    tmp_path: Path, cluster: MemoryCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with World(tmp_path, OUT, cluster=cluster) as world:
        with monkeypatch.context() as patch:
            patch.setattr("mq2mqtt.spool.info.replace_file", _disk_full)
            world.reload({**OUT, "target": "mq_other"})
            world.publish("sensors/x", b"goes all the same")
            await until(lambda: world.sent("mq_other") == [b"goes all the same"])
            assert noted_target(world) == "mq_sensors"
        await until(lambda: noted_target(world) == "mq_other")


def _disk_full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


async def test_a_deleted_rules_lane_drains_and_goes(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, OUT, OTHER_OUT, cluster=cluster) as world:
        world.link.fail_with("mq_sensors", LinkError("away"))
        world.publish("sensors/x", b"left behind")
        world.reload(OTHER_OUT)
        assert world.bridge.intake.route("sensors/x") is None
        assert list(world.bridge.telemetry.rules) == ["meters-out", "sensors-out"]
        await until(lambda: world.bridge.telemetry.rules["sensors-out"].readiness()["reason"] == "away")
        assert world.state("sensors-out") == "draining"
        await until(lambda: world.bridge.telemetry.ready)
        world.link.fail_with("mq_sensors", None)
        await until(lambda: world.state("sensors-out") is None)
        assert world.sent() == [b"left behind"]
        assert not (tmp_path / "sensors-out").exists()


async def test_what_a_deleted_rule_parked_stays_and_harms_nothing(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, OUT, cluster=cluster) as world:
        world.publish("sensors/\x01", b"never")
        await until(lambda: world.count("sensors-out", "parked") == 1)
        world.reload()
        await until(lambda: world.state("sensors-out") is None)
        assert [path.name for path in (tmp_path / "sensors-out").iterdir()] == ["parked"]
    async with World(tmp_path, cluster=cluster) as world:
        assert not world.bridge.telemetry.rules
        world.reload(OUT)
        world.publish("sensors/x", b"back")
        await until(lambda: world.sent() == [b"back"])
    assert [parked.frame.payload for parked in list_parked(tmp_path / "sensors-out")] == [b"never"]


async def test_a_rule_that_comes_back_takes_over_its_draining_lane(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, OUT, cluster=cluster) as world:
        world.link.fail_with("mq_sensors", LinkError("away"))
        world.publish("sensors/x", b"first")
        lane = (tmp_path / "sensors-out" / "lane.json").read_text()
        world.reload()
        await asyncio.sleep(0.1)
        world.reload(OUT)
        assert (tmp_path / "sensors-out" / "lane.json").read_text() == lane
        world.publish("sensors/x", b"second")
        world.link.fail_with("mq_sensors", None)
        await until(lambda: world.sent() == [b"first", b"second"])
        await until(lambda: world.state("sensors-out") == "up")
        assert world.bridge.telemetry.rules["sensors-out"].outcomes == {"accepted": 2, "sent": 2}


async def test_disabled_it_takes_nothing_and_drains_and_enabled_it_takes_again(
    tmp_path: Path, cluster: MemoryCluster
) -> None:
    async with World(tmp_path, OUT, cluster=cluster) as world:
        world.link.fail_with("mq_sensors", LinkError("away"))
        world.publish("sensors/x", b"before")
        world.reload({**OUT, **_OFF})
        assert world.bridge.intake.route("sensors/x") is None
        assert world.state("sensors-out") == "disabled"
        world.link.fail_with("mq_sensors", None)
        await until(lambda: world.sent() == [b"before"])
        assert (tmp_path / "sensors-out").is_dir()
        world.reload(OUT)
        assert world.state("sensors-out") == "down"
        world.publish("sensors/x", b"after")
        await until(lambda: world.sent() == [b"before", b"after"])
        await until(lambda: world.state("sensors-out") == "up")


async def test_a_disabled_rule_without_a_lane_needs_none_and_goes_at_once(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        world.reload({**OUT, **_OFF})
        assert world.state("sensors-out") == "disabled"
        assert not (tmp_path / "sensors-out").exists()
        world.reload()
        assert world.state("sensors-out") is None


async def test_rules_may_swap_their_sources(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, OUT, OTHER_OUT, cluster=cluster) as world:
        world.publish("sensors/x", b"1")
        world.publish("meters/x", b"2")
        world.reload({**OUT, "source": "meters"}, {**OTHER_OUT, "source": "sensors"})
        world.publish("sensors/x", b"3")
        world.publish("meters/x", b"4")
        await until(lambda: (world.sent(), world.sent("mq_other")) == ([b"1", b"4"], [b"2", b"3"]))


async def test_a_lane_that_cannot_be_opened_holds_its_own_rule_down_until_it_can(
    tmp_path: Path, cluster: MemoryCluster
) -> None:
    async with World(tmp_path, cluster=cluster) as world:
        (tmp_path / "sensors-out").write_text("a file where the directory should be")
        world.reload(OUT, OTHER_OUT)
        world.publish("meters/x", b"flows")
        await until(lambda: world.sent("mq_other") == [b"flows"])
        assert "sensors-out" in (world.bridge.telemetry.rules["sensors-out"].reason or "")
        assert world.state("sensors-out") == "down"
        route = world.bridge.intake.route("sensors/x")
        assert route is not None
        waiting = world.bridge.intake.accept(route, MqttMessage("sensors/x", b"waits", 1, client_id="c"))
        assert waiting is not None
        (tmp_path / "sensors-out").unlink()
        await asyncio.wait_for(asyncio.ensure_future(waiting), 15)
        await until(lambda: world.sent() == [b"waits"])
        await until(lambda: world.state("sensors-out") == "up")


async def test_one_workers_bug_keeps_no_other_from_its_work(
    tmp_path: Path, cluster: MemoryCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with World(tmp_path, {**OTHER_OUT, "id": "old-out"}, cluster=cluster) as world:
        with monkeypatch.context() as patch:
            for step in ("open", "watch", "refresh_gauges"):
                patch.setattr(OutboundWorker, step, _failing_for("bad-out", getattr(OutboundWorker, step)))
            patch.setattr(OutboundWorker, "is_done", property(_failing_for("bad-out", _is_done)))
            world.reload({**OUT, "id": "bad-out", "source": "bad"}, OUT)
            world.publish("sensors/x", b"flows")
            await until(lambda: world.sent() == [b"flows"])
            await until(lambda: world.state("old-out") is None)
            assert (await world.get("/metrics"))[0] == 200
            assert world.state("bad-out") == "down"
        await until(lambda: world.bridge.telemetry.ready)


def _is_done(worker: OutboundWorker) -> bool:
    is_done: bool = LaneWorker.is_done.__get__(worker)
    return is_done


def _failing_for(rule_id: str, method: Callable[[OutboundWorker], _T]) -> Callable[[OutboundWorker], _T]:
    def call(worker: OutboundWorker) -> _T:
        if worker.telemetry.rule_id == rule_id:
            raise ZeroDivisionError
        return method(worker)

    return call


async def test_p2p_is_private_as_soon_as_the_rule_is_there(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        assert world.bridge.intake.route("sensors/p2p/c1") is None
        world.reload({**OUT, **_OFF})
        route = world.bridge.intake.route("sensors/p2p/c1")
        assert route is not None
        assert (route.outbound, route.p2p_target) == (None, "c1")
        world.reload()
        assert world.bridge.intake.route("sensors/p2p/c1") is None


# -- inbound --


def members(world: World, topic: str = "mq_commands") -> list[object]:
    return list(world.cluster.members_of(topic))


async def test_another_target_or_description_leaves_the_consumer_alone(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.state("commands-in") == "up")
        before = members(world)
        client = world.host.connect("c1")
        client.subscriptions["new/#"] = 1
        world.reload({**IN, "target": "new", "description": "moved"})
        await asyncio.sleep(0)
        await world.send(b"on", mqttSecondTopic="/lamp")
        await until(lambda: [m.topic for m in client.received] == ["new/lamp"])
        assert members(world) == before
        assert world.state("commands-in") == "up"


@pytest.mark.parametrize(
    ("change", "topic", "tag"),
    [
        ({"tags": "blue"}, "mq_commands", "blue"),
        ({"group": "GID_another"}, "mq_commands", "MQ2MQTT"),
        ({"source": "mq_commands2"}, "mq_commands2", "MQ2MQTT"),
    ],
)
async def test_another_source_tag_or_group_joins_anew(
    tmp_path: Path, cluster: MemoryCluster, change: dict[str, Any], topic: str, tag: str
) -> None:
    async with World(tmp_path, IN, OUT, cluster=cluster) as world:
        await until(lambda: world.bridge.telemetry.ready)
        client = world.host.connect("c1")
        client.subscriptions["devices/#"] = 1
        await world.send(b"before")
        await until(lambda: len(client.received) == 1)
        (before,) = members(world)
        world.reload({**IN, **change}, OUT)
        await until(lambda: members(world, topic) not in ([], [before]))
        await world.send(b"after", topic=topic, TAGS=tag)
        await until(lambda: [m.payload for m in client.received] == [b"before", b"after"])
        await until(lambda: world.state("commands-in") == "up")
        assert len(members(world)) + len(members(world, "mq_commands2")) == 1
        assert cluster.committed("mq_commands", GROUP)[0] >= 1


async def test_a_change_that_is_taken_back_at_once_changes_nothing(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.state("commands-in") == "up")
        before = members(world)
        world.reload({**IN, "tags": "*"})
        assert world.state("commands-in") == "down"
        world.reload(IN)
        await until(lambda: world.state("commands-in") == "up")
        assert members(world) == before


async def test_a_disabled_rule_keeps_its_place(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.state("commands-in") == "up")
        await world.send(b"1")
        await until(lambda: world.count("commands-in", "received") == 1)
        world.reload({**IN, **_OFF})
        await until(lambda: members(world) == [])
        assert world.state("commands-in") == "disabled"
        await world.send(b"2")
        world.reload(IN)
        await until(lambda: world.count("commands-in", "no_subscriber") == 2)
        await until(lambda: world.state("commands-in") == "up")
        assert world.count("commands-in", "received") == 2


async def test_a_deleted_rule_awaits_what_devices_were_handed(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.state("commands-in") == "up")
        client = world.host.connect("c1")
        client.acknowledges = False
        await world.send(b"x", mqttSecondTopic="/p2p/c1")
        await until(lambda: len(client.received) == 1)
        world.reload()
        await asyncio.sleep(0.2)
        assert world.state("commands-in") == "draining"
        assert world.cluster.committed("mq_commands", GROUP) == (0,)
        world.host.time_out("c1")
        await until(lambda: world.state("commands-in") is None)
        assert world.cluster.committed("mq_commands", GROUP) == (1,)
        assert members(world) == []


@pytest.mark.parametrize("change", ["source", "deleted"])
async def test_a_database_that_is_away_holds_up_no_change(
    tmp_path: Path, cluster: MemoryCluster, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr("mq2mqtt.downlink._SETTLING_SECONDS", 0.3)
    async with World(tmp_path, IN, cluster=cluster) as world:
        await until(lambda: world.state("commands-in") == "up")
        telemetry = world.bridge.telemetry.rules["commands-in"]
        blocker = sqlite3.connect(f"{tmp_path}.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        await world.send(b"kept", mqttSecondTopic="/p2p/c1", cleansessionflag="false", qoslevel="1")
        await until(lambda: telemetry.in_flight == 1)
        if change == "source":
            world.reload({**IN, "source": "mq_commands2"})
            await until(lambda: members(world, "mq_commands2"))
            await world.send(b"next", topic="mq_commands2", mqttSecondTopic="/lamp")
            await until(lambda: telemetry.outcomes["no_subscriber"] == 1)
        else:
            world.reload()
            await until(lambda: world.state("commands-in") is None)
        assert (telemetry.in_flight, members(world)) == (1, [])
        assert cluster.committed("mq_commands", GROUP) == (0,)
        blocker.execute("ROLLBACK")
        blocker.close()
        await until(lambda: telemetry.outcomes["queued"] == 1)
        assert telemetry.in_flight == 0


async def test_a_rule_that_comes_back_while_it_settles_goes_on_where_it_was(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.state("commands-in") == "up")
        client = world.host.connect("c1")
        client.acknowledges = False
        await world.send(b"x", mqttSecondTopic="/p2p/c1")
        await until(lambda: len(client.received) == 1)
        (before,) = members(world)
        world.reload()
        await asyncio.sleep(0.05)
        world.reload({**IN, "tags": "*"})
        world.host.time_out("c1")
        await until(lambda: members(world) not in ([], [before]))
        await world.send(b"y", TAGS="any")
        await until(lambda: world.count("commands-in", "no_subscriber") == 1)
        assert world.count("commands-in", "received") == 2
        assert len(client.received) == 1


@pytest.mark.parametrize("between", [[], [{**OUT, "id": "commands-in"}]], ids=["deleted", "outbound"])
async def test_a_rule_that_comes_back_after_its_end_but_before_the_next_watch_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr("mq2mqtt.bridge._WATCH_SECONDS", 3600)
    async with World(tmp_path, IN) as world:
        watch = world.bridge._rules.watch  # noqa: SLF001 - its time is what this is about
        await until(lambda: members(world) != [])
        await watch()
        assert world.state("commands-in") == "up"
        world.reload(*between)
        await until(lambda: _ended("mq2mqtt.downlink[commands-in]"))
        world.reload(IN)
        assert list(world.bridge.telemetry.rules) == ["commands-in"]
        await until(lambda: members(world) != [])
        await watch()
        assert world.state("commands-in") == "up"


def _ended(task: str) -> bool:
    return task not in {running.get_name() for running in asyncio.all_tasks()}


async def test_rules_may_swap_their_groups(tmp_path: Path, cluster: MemoryCluster) -> None:
    second = {**IN, "id": "other-in", "source": "mq_commands2", "target": "others", "group": "GID_two"}
    first = {**IN, "group": "GID_one"}
    async with World(tmp_path, first, second, cluster=cluster) as world:
        await until(lambda: world.bridge.telemetry.ready)
        world.reload({**first, "group": "GID_two"}, {**second, "group": "GID_one"})
        await until(lambda: cluster.members_of("mq_commands", "GID_two") and cluster.members_of("mq_commands2"))
        await world.send(b"1")
        await world.send(b"2", topic="mq_commands2")
        await until(lambda: world.count("commands-in", "received") == world.count("other-in", "received") == 1)
        await until(lambda: world.bridge.telemetry.ready)


async def test_a_place_for_parked_messages_that_cannot_be_read_holds_its_own_rule_down(tmp_path: Path) -> None:
    async with World(tmp_path, OUT) as world:
        (tmp_path / "commands-in").mkdir()
        (tmp_path / "commands-in" / "parked").write_text("a file where the directory should be")
        world.reload(IN, OUT)
        await until(lambda: "parked" in (world.bridge.telemetry.rules["commands-in"].reason or ""))
        (tmp_path / "commands-in" / "parked").unlink()
        await until(lambda: world.bridge.telemetry.ready)


async def test_a_place_for_parked_messages_that_cannot_be_read_any_more_is_one_line(tmp_path: Path) -> None:
    lines: list[str] = []
    async with World(tmp_path, IN) as world:
        await until(lambda: world.bridge.telemetry.ready)
        (tmp_path / "commands-in").mkdir()
        (tmp_path / "commands-in" / "parked").write_text("a file where the directory should be")
        sink = logger.add(lambda line: lines.append(str(line)), format="{message}", level="ERROR")
        assert (await world.get("/metrics"))[0] == 200
        logger.remove(sink)
    parked = tmp_path / "commands-in" / "parked"
    assert lines == [f"rule commands-in: cannot read {parked}: Not a directory\n"]


# -- all rules --


async def test_rules_that_stay_the_same_notice_nothing(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, OUT, IN, cluster=cluster) as world:
        await until(lambda: world.bridge.telemetry.ready)
        tasks = {task for task in asyncio.all_tasks() if task.get_name().endswith("[sensors-out]")}
        before, since = members(world), [rule.since for rule in world.bridge.telemetry.rules.values()]
        world.reload(IN, OTHER_OUT, OUT)
        world.reload(IN, OUT)
        await until(lambda: world.state("meters-out") is None)
        assert members(world) == before
        assert all(not task.done() for task in tasks)
        assert list(world.bridge.telemetry.rules) == ["commands-in", "sensors-out"]
        assert sorted(since) == sorted(rule.since for rule in world.bridge.telemetry.rules.values())


async def test_an_id_that_becomes_inbound_drains_its_lane_first(tmp_path: Path, cluster: MemoryCluster) -> None:
    now_inbound = {**IN, "id": "sensors-out"}
    async with World(tmp_path, OUT, cluster=cluster) as world:
        world.link.fail_with("mq_sensors", LinkError("away"))
        world.publish("sensors/x", b"left behind")
        world.reload(now_inbound)
        await asyncio.sleep(0.1)
        assert world.state("sensors-out") == "draining"
        status, text = await world.get("/readyz")
        assert status == 503
        (entry,) = json.loads(text)["rules"]
        assert (entry["id"], entry["state"]) == ("sensors-out", "down")
        assert "waits until the uplink rule that had its id is done" in entry["reason"]
        assert 'mq2mqtt_rule_up{rule="sensors-out"} 0.0' in (await world.get("/metrics"))[1]
        world.reload({**now_inbound, **_OFF})
        assert world.bridge.telemetry.ready
    # Stopped meanwhile: the next start finds the lane under the inbound rule's id.
    async with World(tmp_path, now_inbound, cluster=cluster) as world:
        assert world.state("sensors-out") == "draining"
        world.link.fail_with("mq_sensors", None)
        await until(lambda: world.sent() == [b"left behind"])
        await until(lambda: world.state("sensors-out") == "up")
        await world.send(b"in")
        await until(lambda: world.count("sensors-out", "received") == 1)
        assert world.bridge.telemetry.ready


async def test_an_id_that_becomes_outbound_acknowledges_nothing_before_it_has_a_lane(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.state("commands-in") == "up")
        client = world.host.connect("c1")
        client.acknowledges = False
        await world.send(b"x", mqttSecondTopic="/p2p/c1")
        await until(lambda: len(client.received) == 1)
        world.reload({**OUT, "id": "commands-in"})
        route = world.bridge.intake.route("sensors/x")
        assert route is not None
        waiting = world.bridge.intake.accept(route, MqttMessage("sensors/x", b"waits", 1, client_id="c"))
        assert waiting is not None
        future = asyncio.ensure_future(waiting)
        world.publish("sensors/x", b"lost", qos=0)
        world.reload({**OUT, "id": "commands-in", "description": "again"})
        await asyncio.sleep(0.1)
        assert not future.done()
        world.host.time_out("c1")
        await asyncio.wait_for(future, 15)
        await until(lambda: world.sent() == [b"waits"])
        assert sum(world.bridge.telemetry.rules["commands-in"].drops.values()) == 2  # and the device's


async def test_a_reload_before_the_start_and_a_stop_right_after_it(tmp_path: Path, cluster: MemoryCluster) -> None:
    world = World(tmp_path, cluster=cluster)
    world.reload(OTHER_OUT, IN)
    async with world:
        world.publish("meters/x", b"x")
        await until(lambda: world.sent("mq_other") == [b"x"])
        world.reload(OUT)
    world = World(tmp_path, OUT, cluster=cluster)
    await world.bridge.start()
    await world.bridge.stop()


def _lanes(spool: Path) -> int:
    return sum(path.is_dir() and not path.name.startswith(".") for path in spool.iterdir())


async def test_many_new_rules_open_their_lanes_bit_by_bit_and_lose_nothing(tmp_path: Path) -> None:
    rules = [{**OUT, "id": f"rule-{number}", "source": f"s{number}"} for number in range(30)]
    async with World(tmp_path) as world:
        world.reload(*rules)
        assert _lanes(tmp_path) == 10
        accepted = []
        for number in range(30):
            route = world.bridge.intake.route(f"s{number}/x")
            assert route is not None
            message = MqttMessage(f"s{number}/x", b"%d" % number, 1, client_id="c")
            accepted.append(world.bridge.intake.accept(route, message))
        await asyncio.wait_for(asyncio.gather(*filter(None, accepted)), 15)
        await until(lambda: set(world.sent()) == {b"%d" % number for number in range(30)})
        world.reload()
        await until(lambda: not world.bridge.telemetry.rules)
        assert _lanes(tmp_path) == 0
