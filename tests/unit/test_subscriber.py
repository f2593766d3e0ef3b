"""A host that fetches what devices publish: the bridge tells it the rules, and asks it what goes wrong with each."""

from pathlib import Path

from mq2mqtt.rules import RuleSet
from tests.unit.bridge_world import IN, OUT, World, until

DENIED = "the broker denies sensors/#"


class Subscriber:
    def __init__(self) -> None:
        self.rules = RuleSet()
        self.problems: dict[str, str] = {}

    def go_by(self, rules: RuleSet) -> None:
        self.rules = rules

    def problem_of(self, rule_id: str) -> str | None:
        return self.problems.get(rule_id)


async def test_a_rule_that_cannot_be_fetched_is_down_from_its_birth_and_no_other_is(tmp_path: Path) -> None:
    subscriber = Subscriber()
    subscriber.problems["sensors-out"] = DENIED
    world = World(tmp_path, OUT, IN, subscriber=subscriber)
    assert {rule.id for rule in subscriber.rules} == {"sensors-out", "commands-in"}
    assert DENIED in (world.bridge.telemetry.rules["sensors-out"].reason or "")
    async with world:
        await until(lambda: world.state("commands-in") == "up")
        await until(lambda: world.bridge.telemetry.rules["sensors-out"].reason == DENIED)
        del subscriber.problems["sensors-out"]
        await until(lambda: world.state("sensors-out") == "up")
        # Whoever is told so by /readyz may publish at once: a rule is not up for a moment before it is known.
        subscriber.problems["more-out"] = "not subscribed yet"
        world.reload(OUT, IN, {**OUT, "id": "more-out", "source": "more"})
        assert subscriber.rules.get("more-out") is not None
        assert "not subscribed yet" in (world.bridge.telemetry.rules["more-out"].reason or "")


async def test_a_host_that_is_away_holds_every_rule_down(tmp_path: Path) -> None:
    subscriber = Subscriber()
    async with World(tmp_path, OUT, IN, subscriber=subscriber) as world:
        await until(lambda: world.state("sensors-out") == world.state("commands-in") == "up")
        world.host.go_away("the broker is gone")
        await until(lambda: world.state("sensors-out") == world.state("commands-in") == "down")
        world.host.come_back()
        await until(lambda: world.state("sensors-out") == world.state("commands-in") == "up")
