"""Whatever rule sets follow each other: the end is that of the last one, and every accepted message has a right target.

RocketMQ is away for some of the changes, so that lanes have backlogs and drain across them.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mq2mqtt.errors import ConfigError, LinkError
from mq2mqtt.link.memory import MemoryCluster
from mq2mqtt.message import MqttMessage
from mq2mqtt.rules import OutboundRule, RuleSet
from mq2mqtt.settings import Settings
from tests.unit.bridge_world import World, until

_IDS = ("rule-a", "rule-b", "rule-c")
_PARENTS = ("p1", "p2", "p3")
_TOPICS = ("mq_1", "mq_2", "mq_3")

_enabled = st.booleans()
_outbound = st.fixed_dictionaries(
    {"type": st.just("outbound"), "source": st.sampled_from(_PARENTS), "target": st.sampled_from(_TOPICS)}
    | {"enabled": _enabled}
)
_inbound = st.fixed_dictionaries(
    {"type": st.just("inbound"), "source": st.sampled_from(_TOPICS), "target": st.sampled_from(_PARENTS)}
    | {"tags": st.sampled_from(("*", "MQ2MQTT")), "group": st.sampled_from((None, "G1")), "enabled": _enabled}
)


def _is_valid(rules: list[dict[str, Any]]) -> bool:
    try:
        RuleSet(Settings.model_validate({"rules": rules}).rules)
    except ConfigError:
        return False
    return True


_rule_sets = (
    st.dictionaries(st.sampled_from(_IDS), _outbound | _outbound | _inbound)
    .map(lambda rules: [{"id": rule_id, **rule} for rule_id, rule in rules.items()])
    .filter(_is_valid)
)


@dataclass
class _Step:
    rules: list[dict[str, Any]]
    away: bool
    """Whether RocketMQ takes nothing from here to the next step."""
    pause: float


_steps = st.lists(
    st.builds(_Step, _rule_sets, st.booleans(), st.sampled_from((0, 0.005, 0.03))), min_size=1, max_size=6
)


@dataclass
class _Sent:
    """A publish: in which lanes it may be, and which targets these have had since."""

    body: bytes
    topic: str
    waiting: Awaitable[None] | None
    lanes: set[str]
    targets: set[str] = field(default_factory=set)


class _Story:
    """Applies the steps to one bridge, and keeps account of what it was given."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rules = RuleSet()
        self.sent: list[_Sent] = []

    async def take(self, step: _Step) -> None:
        for topic in _TOPICS:
            self._world.cluster.fail_with(topic, LinkError("away") if step.away else None)
        loaded = self._world.settings(*step.rules)
        self._rules = loaded.rule_set
        # Those that wait may be accepted within the reload, by the new rules.
        waiting = [sent for sent in self.sent if isinstance(sent.waiting, asyncio.Future) and not sent.waiting.done()]
        self._world.bridge.reload(loaded)
        for sent in waiting:
            if (owner := self._rules.outbound(sent.topic)) is not None:
                sent.lanes.add(owner.id)
        for sent in self.sent:
            self._note_targets(sent)
        for parent in _PARENTS:
            self._publish(f"{parent}/x")
        await asyncio.sleep(step.pause)

    def _note_targets(self, sent: _Sent) -> None:
        for rule_id in sent.lanes:
            rule = self._rules.get(rule_id)
            if isinstance(rule, OutboundRule):
                sent.targets.add(rule.target)

    def _publish(self, topic: str) -> None:
        route = self._world.bridge.intake.route(topic)
        owner = self._rules.outbound(topic)
        assert (None if route is None else route.outbound) == (None if owner is None else owner.id)
        if route is None or owner is None:
            return
        body = b"%d" % len(self.sent)
        waiting = self._world.bridge.intake.accept(route, MqttMessage(topic, body, 1, client_id="c"))
        self.sent.append(_Sent(body, topic, waiting, {owner.id}))
        self._note_targets(self.sent[-1])

    def arrived(self) -> Iterator[tuple[str, bytes]]:
        for topic in _TOPICS:
            yield from ((topic, body) for body in self._world.sent(topic))

    def check(self) -> None:
        """Every accepted message came once, to a target that a lane it may have been in has had since."""
        places: dict[bytes, list[str]] = {}
        for topic, body in self.arrived():
            places.setdefault(body, []).append(topic)
        for sent in self.sent:
            if isinstance(sent.waiting, asyncio.Future):
                assert sent.waiting.done(), "a device waits for ever"
            found = places.get(sent.body, [])
            assert len(found) == 1 or (not found and sent.waiting is not None), sent
            assert set(found) <= sent.targets, sent


def _picture(world: World) -> tuple[object, ...]:
    """What a bridge looks like from outside once everything has settled."""
    rules = [
        (rule.rule_id, str(rule.direction), str(rule.state), rule.reason)
        for rule in world.bridge.telemetry.rules.values()
    ]
    routes = [world.bridge.intake.route(f"{parent}{rest}") for parent in _PARENTS for rest in ("/x", "/p2p/c")]
    members = sorted((m.topic, m.group, m._tags.expression) for t in _TOPICS for m in world.cluster.members_of(t))  # noqa: SLF001
    return rules, routes, members


def _has_settled(world: World) -> bool:
    return all(rule.state in {"up", "disabled"} for rule in world.bridge.telemetry.rules.values())


def _cluster() -> MemoryCluster:
    cluster = MemoryCluster()
    for topic in _TOPICS:
        cluster.create_topic(topic, 1)
    return cluster


async def _compare(directory: Path, steps: list[_Step]) -> None:
    last = steps[-1].rules
    async with World(directory / "started", *last, cluster=_cluster()) as world:
        await until(lambda: _has_settled(world))
        expected = _picture(world)
    async with World(directory / "reloaded", cluster=_cluster()) as world:
        story = _Story(world)
        for step in steps:
            await story.take(step)
        await story.take(_Step(last, away=False, pause=0))
        await until(lambda: _picture(world) == expected and not any(rule.lane_messages for rule in _lanes(world)))
        story.check()


def _lanes(world: World) -> list[Any]:
    world.bridge._rules.refresh_gauges()  # noqa: SLF001 - as a scrape does
    return list(world.bridge.telemetry.rules.values())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(_steps, st.sampled_from((0.01, 0.3)))
def test_any_sequence_ends_like_a_start_with_the_last_one(
    monkeypatch: pytest.MonkeyPatch, steps: list[_Step], watch_seconds: float
) -> None:
    # Between two reloads, what is left of a rule ends before it is looked after, or after that.
    monkeypatch.setattr("mq2mqtt.bridge._WATCH_SECONDS", watch_seconds)
    monkeypatch.setattr("mq2mqtt.downlink._RETRY_SECONDS", 0.01)
    monkeypatch.setattr("mq2mqtt.uplink._BACKOFF_FIRST", 0.01)
    monkeypatch.setattr("mq2mqtt.uplink._BACKOFF_MAX", 0.02)
    monkeypatch.setattr("mq2mqtt.uplink.PROBE_SECONDS", 0.02)
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(_compare(Path(directory), steps))
