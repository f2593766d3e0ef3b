import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mq2mqtt.host import Delivery, DropReason, Outcome
from mq2mqtt.metrics import METRICS, build_registry, markdown
from mq2mqtt.telemetry import Direction, Histogram, RuleState, RuleTelemetry, Telemetry, Trouble

ROOT = Path(__file__).parents[2]


@pytest.fixture
def telemetry() -> Telemetry:
    telemetry = Telemetry()
    telemetry.add(RuleTelemetry("up-rule", direction=Direction.UPLINK))
    telemetry.add(RuleTelemetry("down-rule", direction=Direction.DOWNLINK))
    return telemetry


@pytest.fixture
def registry(telemetry: Telemetry) -> CollectorRegistry:
    return build_registry(telemetry, connected_clients=lambda: 3, refresh=lambda: None)


def test_a_rule_is_down_until_the_first_proof(telemetry: Telemetry) -> None:
    rule = telemetry.rules["up-rule"]
    assert rule.readiness()["state"] == "down"
    assert rule.readiness()["reason"] == "not proven yet"
    rule.rule_up(Trouble.LINK)
    assert rule.readiness()["state"] == "up"
    assert rule.readiness()["reason"] is None


def test_every_trouble_must_end_before_a_rule_is_up_again() -> None:
    rule = RuleTelemetry("r-1", direction=Direction.UPLINK)
    rule.rule_up(Trouble.LINK)
    rule.rule_down(Trouble.LANE, "lane full")
    rule.rule_down(Trouble.LINK, "no broker")
    assert (rule.state, rule.reason) == (RuleState.DOWN, "lane full; no broker")
    rule.rule_up(Trouble.LANE)
    assert (rule.state, rule.reason) == (RuleState.DOWN, "no broker")
    rule.rule_up(Trouble.LINK)
    assert (rule.state, rule.reason) == (RuleState.UP, None)


def test_since_changes_with_the_state_not_with_the_reason() -> None:
    rule = RuleTelemetry("r-1", direction=Direction.UPLINK)
    since = rule.since
    rule.rule_down(Trouble.LINK, "another reason")
    assert rule.since == since
    rule.rule_up(Trouble.LINK)
    assert rule.since >= since


def test_a_disabled_rule_does_not_make_the_bridge_unready() -> None:
    telemetry = Telemetry()
    rule = telemetry.add(RuleTelemetry("off", direction=Direction.UPLINK, state=RuleState.DISABLED))
    rule.rule_down(Trouble.LINK, "no broker")
    assert rule.readiness() | {"since": None} == {"id": "off", "state": "disabled", "reason": None, "since": None}
    assert telemetry.ready


def test_every_exported_name_type_and_label_is_the_contract(registry: CollectorRegistry, telemetry: Telemetry) -> None:
    telemetry.rules["up-rule"].dropped(DropReason.LANE_FULL)
    telemetry.rules["down-rule"].invalid_properties["qoslevel"] += 1
    telemetry.rules["up-rule"].lane_limit_bytes = 1024
    telemetry.rules["down-rule"].lag = 0
    exported = text_string_to_metric_families(generate_latest(registry).decode())
    families = {family.name: family for family in exported if not family.name.startswith("process_")}
    assert {name.removesuffix("_total") for name in METRICS} == set(families)
    for name, (kind, labels, _) in METRICS.items():
        family = families[name.removesuffix("_total")]
        assert family.type == kind
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(labels)


def test_a_downlink_message_is_counted_once_and_the_sum_holds(
    registry: CollectorRegistry, telemetry: Telemetry
) -> None:
    rule = telemetry.rules["down-rule"]
    rule.outcomes["received"] += 5
    rule.in_flight += 5
    rule.settled(Delivery(Outcome.DELIVERED))
    rule.settled(Delivery(Outcome.DROPPED, DropReason.SLOW_DEVICE))
    rule.skipped()
    rule.parked("broker/0/1", "bad topic", evicted=0)

    def count(outcome: str) -> float:
        labels = {"rule": "down-rule", "direction": "downlink", "outcome": outcome}
        return registry.get_sample_value("mq2mqtt_messages_total", labels) or 0.0

    outcomes = ("delivered", "no_subscriber", "queued", "expired", "parked", "skipped", "dropped")
    in_flight = registry.get_sample_value("mq2mqtt_in_flight", {"rule": "down-rule", "direction": "downlink"})
    assert count("received") == sum(map(count, outcomes)) + (in_flight or 0.0)
    assert in_flight == 1.0
    assert registry.get_sample_value("mq2mqtt_dropped_total", {"rule": "down-rule", "reason": "slow_device"}) == 1.0


def test_latencies_land_in_their_buckets(
    registry: CollectorRegistry, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = telemetry.rules["up-rule"]
    now_ns = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    rule.sent([now_ns // 1000 - 300_000, now_ns // 1000 - 20_000_000])

    def bucket(bound: str) -> float | None:
        return registry.get_sample_value("mq2mqtt_uplink_seconds_bucket", {"rule": "up-rule", "le": bound})

    assert (bucket("0.25"), bucket("0.5"), bucket("10.0"), bucket("+Inf")) == (0.0, 1.0, 1.0, 2.0)


def test_a_clock_that_runs_behind_counts_as_zero_seconds() -> None:
    histogram = Histogram()
    histogram.observe(-4.0)
    assert histogram.counts[0] == 1
    assert histogram.total == 0.0


def test_the_documentation_is_up_to_date() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == markdown()


def test_the_process_is_measured_too(registry: CollectorRegistry) -> None:
    assert registry.get_sample_value("process_start_time_seconds") == pytest.approx(time.time(), abs=86_400)
    assert registry.get_sample_value("process_resident_memory_bytes")


def test_a_rule_without_a_lane_has_no_limit(registry: CollectorRegistry, telemetry: Telemetry) -> None:
    labels = {"rule": "up-rule"}
    assert registry.get_sample_value("mq2mqtt_lane_limit_bytes", labels) is None
    telemetry.rules["up-rule"].lane_limit_bytes = 65_536
    assert registry.get_sample_value("mq2mqtt_lane_limit_bytes", labels) == 65_536


def test_a_lag_that_nobody_knows_is_missing_not_zero(registry: CollectorRegistry, telemetry: Telemetry) -> None:
    labels = {"rule": "down-rule"}
    assert registry.get_sample_value("mq2mqtt_consumer_lag", labels) is None
    telemetry.rules["down-rule"].lag = 0
    assert registry.get_sample_value("mq2mqtt_consumer_lag", labels) == 0


def test_every_reason_is_documented() -> None:
    assert all(f"| `{reason}` |" in markdown() for reason in DropReason)


def test_a_rule_that_is_enabled_again_must_prove_itself_and_a_draining_one_says_what_holds_it_up() -> None:
    rule = RuleTelemetry("r-1", direction=Direction.UPLINK)
    rule.rule_up(Trouble.LINK)
    rule.end(RuleState.DISABLED)
    rule.rule_down(Trouble.LINK, "no broker")
    assert rule.readiness()["reason"] is None
    rule.rule_down(Trouble.LANE, "lane full")
    rule.begin()
    assert (rule.state, rule.reason) == (RuleState.DOWN, "not proven yet; lane full")
    rule.rule_up(Trouble.LANE)
    rule.rule_up(Trouble.LINK)
    assert rule.up
    rule.rule_down(Trouble.LINK, "no broker")
    rule.end(RuleState.DRAINING)
    assert (rule.readiness()["state"], rule.readiness()["reason"]) == ("draining", "no broker")
    rule.rule_up(Trouble.LINK)
    assert rule.readiness()["reason"] is None


def test_what_cannot_be_decoded_is_received_and_dropped() -> None:
    rule = RuleTelemetry("commands-in", direction=Direction.DOWNLINK)
    rule.unreadable(0)
    assert not rule.outcomes
    rule.unreadable(2)
    assert (rule.outcomes, rule.drops) == ({"received": 2, "dropped": 2}, {"unreadable": 2})


def test_rules_stand_in_the_order_of_the_configuration_and_what_drains_behind_them() -> None:
    telemetry = Telemetry()
    for rule_id in ("gone", "b", "a"):
        telemetry.add(RuleTelemetry(rule_id, direction=Direction.UPLINK))
    telemetry.arrange(["a", "b", "unknown"])
    assert list(telemetry.rules) == ["a", "b", "gone"]


def test_reloads_are_counted(telemetry: Telemetry, registry: CollectorRegistry) -> None:
    telemetry.reload_refused("a slip")
    telemetry.reload_applied("1 rule added", needs_restart=["node"])
    text = generate_latest(registry).decode()
    assert 'mq2mqtt_reload_total{outcome="invalid"} 1.0' in text
    assert 'mq2mqtt_reload_total{outcome="applied"} 1.0' in text


@pytest.mark.parametrize("ages", [(0.2,), (0.2, 0.11, 0.24), (0.0001, 0.2), (-5.0, 0.2), (-5.0, -4.0), (400.0, 500.0)])
def test_a_batch_is_counted_as_its_messages_one_by_one(
    ages: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_us = 1_800_000_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: now_us * 1000)
    batch, one_by_one = Histogram(), Histogram()
    batch.observe_batch([now_us - round(age * 1e6) for age in ages])
    for age in ages:
        one_by_one.observe(age)
    assert batch.counts == one_by_one.counts
    assert batch.total == pytest.approx(one_by_one.total)


def test_a_birth_before_1970_does_not_swallow_other_durations() -> None:
    rule = RuleTelemetry("commands-in", direction=Direction.DOWNLINK)
    rule.handed(-(2**63))
    before = rule.latency.total
    rule.latency.observe(0.001)
    assert rule.latency.total - before == pytest.approx(0.001, abs=1e-5)
