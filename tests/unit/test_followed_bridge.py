"""A bridge whose host writes the lanes itself and may be away, between the in-process link and such a host's twin."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mq2mqtt.message import MqttMessage
from mq2mqtt.rules import OutboundRule, RuleSet
from mq2mqtt.spool.frame import encode_publish
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.watching import Watcher
from tests.unit.bridge_world import IN, OUT, World, until


class Writer:
    """Writes the lanes of the rules that it was told, when `work` is called."""

    def __init__(self, spool: Path) -> None:
        self.watcher = Watcher()
        self._spool = spool
        self._rules = RuleSet()
        self.lanes: dict[str, Lane] = {}
        self.problems: dict[str, str] = {}

    def go_by(self, rules: RuleSet) -> None:
        self._rules = rules

    def problem_of(self, rule_id: str) -> str | None:
        return self.problems.get(rule_id)

    def work(self) -> None:
        wanted = {rule.id for rule in self._rules if isinstance(rule, OutboundRule) and rule.enabled}
        for gone in set(self.lanes) - wanted:
            self.lanes.pop(gone).close()
        for new in wanted - set(self.lanes):
            self.lanes[new] = Lane.open(self._spool / new, max_bytes=64 << 10, target="unknown to it")

    def publish(self, rule: str, payload: bytes, *, client_id: str = "c1") -> None:
        message = MqttMessage("sensors/x", payload, 1, client_id=client_id)
        self.lanes[rule].append(encode_publish(message, accepted_us=1))

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.close()
        self.watcher.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq2mqtt.bridge._WATCH_SECONDS", 0.02)
    monkeypatch.setattr("mq2mqtt.downlink._RETRY_SECONDS", 0.02)


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[Writer]:
    writer = Writer(tmp_path)
    yield writer
    writer.close()


async def test_a_lane_is_followed_from_when_it_is_begun(tmp_path: Path, writer: Writer) -> None:
    async with World(tmp_path, OUT, writer=writer) as world:
        await until(lambda: "not begun" in (world.bridge.telemetry.rules["sensors-out"].reason or ""))
        assert not (tmp_path / "sensors-out").exists()
        writer.work()
        for number in range(100):
            writer.publish("sensors-out", b"%d" % number)
        await until(lambda: len(world.sent()) == 100)
        await until(lambda: world.state("sensors-out") == "up")
        assert world.sent() == [b"%d" % number for number in range(100)]
        await world.get("/metrics")
        assert world.count("sensors-out", "accepted") == world.count("sensors-out", "sent") == 100


async def test_a_gone_rules_lane_is_drained_and_removed_when_its_writer_lets_go(tmp_path: Path, writer: Writer) -> None:
    async with World(tmp_path, OUT, writer=writer) as world:
        writer.work()
        await until(lambda: world.state("sensors-out") == "up")
        world.reload()
        # It has not heard of it yet.
        writer.publish("sensors-out", b"late")
        await until(lambda: world.sent() == [b"late"])
        await asyncio.sleep(0.2)
        assert world.state("sensors-out") == "draining"
        writer.work()
        await until(lambda: world.state("sensors-out") is None)
        assert not (tmp_path / "sensors-out").exists()
        world.reload(OUT)
        writer.work()
        writer.publish("sensors-out", b"again")
        await until(lambda: world.sent() == [b"late", b"again"])


async def test_what_was_written_while_the_bridge_was_away_is_sent(tmp_path: Path, writer: Writer) -> None:
    async with World(tmp_path, OUT, writer=writer) as world:
        writer.work()
        await until(lambda: world.state("sensors-out") == "up")
    for number in range(50):
        writer.publish("sensors-out", b"%d" % number)
    async with World(tmp_path, OUT, writer=writer, cluster=world.cluster) as world:
        await until(lambda: len(world.sent()) == 50)


async def test_what_the_writer_says_of_a_lane_is_told(tmp_path: Path, writer: Writer) -> None:
    async with World(tmp_path, OUT, writer=writer) as world:
        writer.problems["sensors-out"] = "cannot be opened"
        await until(lambda: "cannot be opened" in (world.bridge.telemetry.rules["sensors-out"].reason or ""))
        writer.problems.clear()
        writer.work()
        await until(lambda: world.state("sensors-out") == "up")
        writer.problems["sensors-out"] = "is full"
        await until(lambda: world.bridge.telemetry.rules["sensors-out"].reason == "is full")
        writer.problems.clear()
        await until(lambda: world.state("sensors-out") == "up")


async def test_news_of_the_writer_is_looked_at_at_once(
    tmp_path: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mq2mqtt.bridge._WATCH_SECONDS", 3600)
    async with World(tmp_path, OUT, writer=writer) as world:
        await until(lambda: "not begun" in (world.bridge.telemetry.rules["sensors-out"].reason or ""))
        writer.work()
        world.bridge.look()
        await until(lambda: world.state("sensors-out") == "up")


async def test_nothing_is_taken_for_a_host_that_is_away(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        await until(lambda: world.state("commands-in") == "up")
        device = world.host.connect("dev")
        device.subscriptions["devices/#"] = 1
        world.host.go_away("the broker is away")
        await world.send(b"1", mqttSecondTopic="/x")
        await until(lambda: world.state("commands-in") == "down")
        assert world.bridge.telemetry.rules["commands-in"].reason == "the broker is away"
        await world.send(b"2", mqttSecondTopic="/x")
        await asyncio.sleep(0.2)
        assert world.count("commands-in", "received") == 0
        world.host.come_back()
        await until(lambda: [message.payload for message in device.received] == [b"1", b"2"])
        await until(lambda: world.state("commands-in") == "up")


async def test_a_shown_topic_that_the_host_cannot_show_is_counted(tmp_path: Path) -> None:
    async with World(tmp_path, IN) as world:
        world.host.shows_topics = False
        await until(lambda: world.state("commands-in") == "up")
        await world.send(b"1", mqttSecondTopic="/x", mqttRealTopic="/shown")
        await until(lambda: world.count("commands-in", "no_subscriber") == 1)
        assert world.bridge.telemetry.rules["commands-in"].invalid_properties == {"mqttRealTopic": 1}
