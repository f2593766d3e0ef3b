"""Status rules in a whole bridge: who comes and goes is told to RocketMQ, through the rule's lane."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mq2mqtt.errors import LaneError, NotConnectedError
from mq2mqtt.host import CLIENT_EVENTS
from mq2mqtt.link.memory import MemoryCluster
from mq2mqtt.message import ClientEvent, ClientEventType
from mq2mqtt.rules import RuleSet
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.watching import Watcher
from tests.unit.bridge_world import IN, OUT, World, until

STATUS = {"id": "presence", "type": "status", "source": "GID_dev", "target": "mq_status"}
OFF = {"enabled": False}
A, B = "GID_dev@@@a", "GID_dev@@@b"


@pytest.fixture
def cluster() -> MemoryCluster:
    cluster = MemoryCluster()
    for topic in ("mq_status", "mq_other"):
        cluster.create_topic(topic, 1)
    return cluster


def told(cluster: MemoryCluster, topic: str = "mq_status") -> list[dict[str, Any]]:
    """The bodies that RocketMQ has, oldest first."""
    return [json.loads(message.body) for message in cluster.queues(topic)[0]]


def brief(cluster: MemoryCluster, topic: str = "mq_status") -> list[str]:
    """`connect a` for each."""
    return [f"{body['eventType']} {body['clientId'].partition('@@@')[2]}" for body in told(cluster, topic)]


async def test_each_event_goes_to_rocketmq_as_the_contract_says(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, STATUS, cluster=cluster) as world:
        event = ClientEvent(ClientEventType.CONNECT, A, "c1", "192.0.2.7:5000", 1700000000123)
        goodbye = ClientEvent(ClientEventType.DISCONNECT, A, "c1", "192.0.2.7:5000", 1700000000456)
        end = ClientEvent(ClientEventType.TCPCLEAN, A, "c1", "192.0.2.7:5000", 1700000000457)
        for each in (event, goodbye, end):
            world.bridge.intake.on_client_event(each)
        await until(lambda: len(told(cluster)) == 3)
        await until(lambda: world.state("presence") == "up")
        bodies = told(cluster)
        epoch = bodies[0]["epoch"]
        assert bodies[0] == {
            "clientId": A,
            "channelId": "c1",
            "clientIp": "192.0.2.7:5000",
            "eventType": "connect",
            "time": 1700000000123,
            "seq": epoch + 1,
            "epoch": epoch,
            "node": "n1",
        }
        assert [(body["eventType"], body["seq"] - epoch, body["time"] % 1000) for body in bodies] == [
            ("connect", 1, 123),
            ("disconnect", 2, 456),
            ("tcpclean", 3, 457),
        ]
        messages = cluster.queues("mq_status")[0]
        assert [message.properties["TAGS"] for message in messages] == ["connect", "disconnect", "tcpclean"]
        node, rule, offset = messages[0].properties["KEYS"].split(":")
        assert (node, rule) == ("n1", "presence")
        assert messages[2].properties["KEYS"] == f"n1:presence:{int(offset) + 2}"
        assert messages[0].properties["mq2mqttNode"] == "n1"
        assert world.count("presence", "accepted") == world.count("presence", "sent") == 3


async def test_only_clients_of_the_group_are_told_of(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, STATUS, cluster=cluster) as world:
        for client_id in ("plain", "GID_other@@@a", "GID_dev", "GID_dev@@a", A):
            world.host.connect(client_id)
        await until(lambda: brief(cluster) == ["connect a"])


async def test_no_inbound_rule_takes_what_status_rules_tell(tmp_path: Path, cluster: MemoryCluster) -> None:
    inbound = {**IN, "source": "mq_status", "tags": "*", "from": "earliest"}
    async with World(tmp_path, STATUS, inbound, cluster=cluster) as world:
        world.host.connect(A)
        await until(lambda: world.count("commands-in", "skipped") == 1)


async def test_a_take_over_tells_the_end_before_the_beginning(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, STATUS, cluster=cluster) as world:
        for channel in ("c1", "c2", "c2"):
            world.bridge.intake.on_client_event(ClientEvent(ClientEventType.CONNECT, A, channel, "ip", 1))
        # What the host tells late, of a connection that is over, changes nothing.
        world.bridge.intake.on_client_event(ClientEvent(ClientEventType.TCPCLEAN, A, "c1", "ip", 2))
        await until(lambda: len(told(cluster)) == 3)
        assert [(body["eventType"], body["channelId"]) for body in told(cluster)] == [
            ("connect", "c1"),
            ("tcpclean", "c1"),
            ("connect", "c2"),
        ]
        assert set(world.bridge.presence.connections) == {A}


async def test_a_start_tells_that_who_was_connected_is_gone(tmp_path: Path, cluster: MemoryCluster) -> None:
    first = World(tmp_path, STATUS, cluster=cluster)
    async with first:
        first.host.connect(A)
        first.host.connect(B)
        first.host.disconnect(B)
    async with World(tmp_path, STATUS, cluster=cluster):
        await until(lambda: len(told(cluster)) == 4)
        last = told(cluster)[-1]
        assert brief(cluster) == ["connect a", "connect b", "tcpclean b", "tcpclean a"]
        assert last["epoch"] > told(cluster)[0]["seq"]
        assert last["seq"] > last["epoch"]


async def test_a_stop_still_sends_whose_connection_it_has_ended(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, STATUS, cluster=cluster, stop_deadline=60) as world:
        await until(lambda: world.state("presence") == "up")
        clients = [f"GID_dev@@@{number}" for number in range(1500)]
        for client_id in clients:
            world.host.connect(client_id)
        await until(lambda: len(told(cluster)) == len(clients))
        await world.bridge.stop_receiving()
        for client_id in clients:
            world.host.disconnect(client_id)
        await world.bridge.stop()
        assert len(told(cluster)) == 2 * len(clients)


async def test_a_stop_waits_for_no_rocketmq_that_is_away(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, STATUS, cluster=cluster, stop_deadline=60) as world:
        cluster.fail_with("mq_status", NotConnectedError("away"))
        world.host.connect(A)
        await until(lambda: "away" in str(world.bridge.telemetry.rules["presence"].reason))
        # A quarter of the deadline would be 15 s.
        async with asyncio.timeout(14):
            await world.bridge.stop()
    async with World(tmp_path, STATUS, cluster=cluster):
        cluster.fail_with("mq_status", None)
        await until(lambda: brief(cluster) == ["connect a", "tcpclean a"])


async def test_listeners_are_told_of_who_is_lost_at_a_start(tmp_path: Path) -> None:
    async with World(tmp_path) as first:
        first.host.connect("plain")
    world = World(tmp_path)
    ended: list[tuple[str, str]] = []
    world.bridge.presence.listen(
        came=lambda _: None, gone=lambda gone, _, reason: ended.append((gone.client_id, reason))
    )
    assert set(world.bridge.presence.connections) == {"plain"}
    async with world:
        assert ended == [("plain", "broker restarted")]


async def test_a_new_rule_tells_of_who_is_there(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, cluster=cluster) as world:
        for number in range(500):
            world.host.connect(f"GID_dev@@@{number}")
        world.host.disconnect("GID_dev@@@0")
        world.reload(STATUS)
        await until(lambda: len(told(cluster)) == 499)
        assert {body["eventType"] for body in told(cluster)} == {"connect"}
        # What differs meanwhile is told in order for each client.
        world.host.connect("GID_dev@@@1")
        await until(lambda: len(told(cluster)) == 501)
        assert brief(cluster)[-2:] == ["tcpclean 1", "connect 1"]


async def test_a_disabled_rule_tells_later_what_has_changed(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, STATUS, cluster=cluster) as world:
        world.host.connect(A)
        world.host.connect("GID_dev@@@stays")
        await until(lambda: len(told(cluster)) == 2)
        world.reload({**STATUS, **OFF})
        world.host.disconnect(A)
        world.host.connect(B)
        world.host.connect("GID_dev@@@short")
        world.host.disconnect("GID_dev@@@short")
        assert world.state("presence") == "disabled"
        world.reload(STATUS)
        await until(lambda: len(told(cluster)) == 4)
        assert brief(cluster)[2:] == ["tcpclean a", "connect b"]


async def test_another_target_is_told_of_everybody_anew(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, STATUS, cluster=cluster) as world:
        world.host.connect(A)
        world.host.connect(B)
        await until(lambda: len(told(cluster)) == 2)
        world.reload({**STATUS, "target": "mq_other"})
        await until(lambda: brief(cluster, "mq_other") == ["connect a", "connect b"])
        world.host.disconnect(A)
        await until(lambda: brief(cluster, "mq_other")[2:] == ["tcpclean a"])
        assert len(told(cluster)) == 2


async def test_another_group_takes_the_place_of_the_first(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, STATUS, cluster=cluster) as world:
        world.host.connect(A)
        world.host.connect("GID_new@@@x")
        world.reload({**STATUS, "source": "GID_new"})
        world.host.disconnect(A)
        world.host.disconnect("GID_new@@@x")
        await until(lambda: brief(cluster) == ["connect a", "connect x", "tcpclean x"])


async def test_what_a_deleted_rule_has_not_sent_goes_to_its_noted_target(
    tmp_path: Path, cluster: MemoryCluster
) -> None:
    cluster.fail_with("mq_status", NotConnectedError("away"))
    async with World(tmp_path, STATUS, cluster=cluster) as world:
        world.host.connect(A)
        world.reload()
        world.host.connect(B)
        assert world.state("presence") == "draining"
    async with World(tmp_path, cluster=cluster) as world:
        assert world.state("presence") == "draining"
        cluster.fail_with("mq_status", None)
        await until(lambda: not world.bridge.telemetry.rules)
        assert brief(cluster) == ["connect a"]
        assert not (tmp_path / "presence").exists()
        world.reload(STATUS)
        world.host.connect(B)
        await until(lambda: brief(cluster) == ["connect a", "connect b"])


async def test_an_id_changes_between_status_and_outbound(tmp_path: Path, cluster: MemoryCluster) -> None:
    outbound = {**OUT, "id": "presence"}
    cluster.fail_with("mq_status", NotConnectedError("away"))
    async with World(tmp_path, STATUS, cluster=cluster) as world:
        world.host.connect(A)
    async with World(tmp_path, outbound, cluster=cluster) as world:
        route = world.bridge.intake.route("sensors/x")
        assert route is not None
        cluster.fail_with("mq_status", None)
        await until(lambda: brief(cluster) == ["connect a"])
        await until(lambda: world.state("presence") == "up")
        world.publish("sensors/x")
        await until(lambda: world.sent() == [b"x"])
        world.reload(STATUS)
        world.host.connect(B)
        await until(lambda: "connect b" in brief(cluster))


class FullLane:
    """Refuses appends while `full`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        append = Lane.append

        def refusing(lane: Lane, frame: bytes) -> int:
            if self.full:
                raise LaneError(f"lane {lane.path}: the disk is full")
            return append(lane, frame)

        monkeypatch.setattr(Lane, "append", refusing)


async def test_a_full_lane_tells_the_difference_when_it_takes_again(
    tmp_path: Path, cluster: MemoryCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = FullLane(monkeypatch)
    async with World(tmp_path, STATUS, cluster=cluster) as world:
        for client_id in (A, B, "GID_dev@@@stays"):
            world.host.connect(client_id)
        lane.full = True
        world.host.disconnect(A)
        world.host.connect(B)
        world.host.connect("GID_dev@@@new")
        world.host.connect("GID_dev@@@short")
        world.host.disconnect("GID_dev@@@short")
        rule = world.bridge.telemetry.rules["presence"]
        # B's old connection, and its new one.
        assert rule.drops["lane_full"] == 6
        assert "the disk is full" in str(rule.reason)
        lane.full = False
        await until(lambda: len(told(cluster)) == 7)
        assert brief(cluster)[3:] == ["tcpclean a", "tcpclean b", "connect b", "connect new"]
        await until(lambda: rule.up)
    assert world.count("presence", "accepted") == world.count("presence", "sent") == 7


async def test_what_the_lane_refused_is_told_after_a_restart(
    tmp_path: Path, cluster: MemoryCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = FullLane(monkeypatch)
    async with World(tmp_path, STATUS, cluster=cluster) as world:
        world.host.connect(A)
        lane.full = True
        world.host.disconnect(A)
        world.host.connect(B)
    lane.full = False
    async with World(tmp_path, STATUS, cluster=cluster):
        await until(lambda: brief(cluster) == ["connect a", "tcpclean a"])


async def test_a_lane_that_is_lost_is_begun_anew(tmp_path: Path, cluster: MemoryCluster) -> None:
    async with World(tmp_path, STATUS, cluster=cluster) as world:
        world.host.connect(A)
        await until(lambda: len(told(cluster)) == 1)
    shutil.rmtree(tmp_path / "presence")
    async with World(tmp_path, STATUS, cluster=cluster):
        await until(lambda: brief(cluster) == ["connect a", "tcpclean a"])


async def test_a_host_that_sees_no_clients_has_no_status(tmp_path: Path, cluster: MemoryCluster) -> None:
    world = World(tmp_path, STATUS, cluster=cluster)
    world.host.sees_clients = False
    async with world:
        await until(lambda: "cannot see who is connected" in str(world.bridge.telemetry.rules["presence"].reason))


async def test_a_status_rule_says_why_a_host_in_another_process_tells_nothing(
    tmp_path: Path, cluster: MemoryCluster
) -> None:
    class Writer:
        watcher = Watcher()
        problem: str | None = "cannot write lane .clients: no space"

        def go_by(self, rules: RuleSet) -> None: ...

        def problem_of(self, rule_id: str) -> str | None:
            return self.problem if rule_id == CLIENT_EVENTS else None

    writer = Writer()
    async with World(tmp_path, STATUS, cluster=cluster, writer=writer) as world:
        telemetry = world.bridge.telemetry.rules["presence"]
        await until(lambda: telemetry.reason == "cannot write lane .clients: no space")
        writer.problem = None
        await until(lambda: world.state("presence") == "up")
    writer.watcher.close()
