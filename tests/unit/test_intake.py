import asyncio
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from mq2mqtt.errors import LaneError
from mq2mqtt.host.memory import MemoryHost
from mq2mqtt.intake import BridgeIntake, LaneIntake
from mq2mqtt.message import MqttMessage
from mq2mqtt.presence import Presence
from mq2mqtt.rules import InboundRule, OutboundRule, RuleSet
from mq2mqtt.settings import Limits
from mq2mqtt.spool.frame import encode_publish
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.telemetry import Direction, RuleTelemetry, Telemetry, Trouble

MAX_BYTES = 64 * 1024
BIG = b"x" * 10_000


def frame(payload: bytes) -> bytes:
    return encode_publish(MqttMessage("sensors/x", payload, 1, client_id="c"), accepted_us=1)


class Full:
    """A lane that a few big messages fill, and its writing end."""

    def __init__(self, path: Path) -> None:
        self.telemetry = RuleTelemetry("rule-1", direction=Direction.UPLINK)
        self.telemetry.rule_up(Trouble.LINK)
        self.lane = Lane.open(path / "rule-1", max_bytes=MAX_BYTES, target="t")
        self.reader = LaneReader(self.lane)
        self.intake = LaneIntake(lane=self.lane, telemetry=self.telemetry)
        while self.lane.unsent_bytes + len(frame(BIG)) <= MAX_BYTES:
            assert self.intake.accept(frame(BIG), qos=1) is None

    def send_one(self) -> bytes:
        (entry,) = self.reader.read(max_messages=1)
        self.reader.settle([entry.offset])
        return entry.frame.payload

    def close(self) -> None:
        self.intake.close()
        self.reader.close()
        self.lane.close()


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Full]:
    full = Full(tmp_path)
    yield full
    full.close()


async def test_a_full_lane_holds_qos_1_back_until_there_is_space(full: Full) -> None:
    waiting = asyncio.ensure_future(full.intake.accept(frame(BIG), qos=1) or asyncio.sleep(0))
    await asyncio.sleep(0.6)
    assert not waiting.done()
    assert not full.telemetry.up
    assert "max_bytes" in (full.telemetry.reason or "")
    full.send_one()
    await asyncio.wait_for(waiting, 20)
    assert full.telemetry.up


async def test_a_full_lane_drops_qos_0_and_counts_it(full: Full) -> None:
    assert full.intake.accept(frame(BIG), qos=0) is None
    assert full.telemetry.drops == {"lane_full": 1}
    accepted = full.telemetry.outcomes["accepted"]
    assert full.lane.messages == accepted


async def test_waiting_publishes_enter_in_their_order_and_before_later_ones(full: Full) -> None:
    waiting = [
        asyncio.ensure_future(full.intake.accept(frame(b"%d" % n + BIG), qos=1) or asyncio.sleep(0)) for n in range(3)
    ]
    # Small enough to fit now, but not before those that came first.
    late = asyncio.ensure_future(full.intake.accept(frame(b"late"), qos=1) or asyncio.sleep(0))
    await asyncio.sleep(0)
    assert not late.done()
    stored = full.lane.messages
    for _ in range(stored):
        full.send_one()
    await asyncio.wait_for(asyncio.gather(*waiting, late), 20)
    assert [full.send_one()[:4] for _ in range(4)] == [b"0xxx", b"1xxx", b"2xxx", b"late"]


async def test_a_publish_whose_connection_is_lost_never_enters(full: Full) -> None:
    lost = asyncio.ensure_future(full.intake.accept(frame(b"lost" + BIG), qos=1) or asyncio.sleep(0))
    kept = asyncio.ensure_future(full.intake.accept(frame(b"kept" + BIG), qos=1) or asyncio.sleep(0))
    await asyncio.sleep(0)
    lost.cancel()
    await asyncio.sleep(0)
    stored = full.lane.messages
    for _ in range(stored):
        full.send_one()
    await asyncio.wait_for(kept, 20)
    assert full.lane.messages == 1
    assert full.send_one()[:4] == b"kept"


async def test_what_a_lost_connection_gave_up_takes_no_memory(full: Full) -> None:
    held = full.intake.accept(frame(BIG), qos=1)
    lost = full.intake.accept(frame(BIG), qos=1)
    assert isinstance(held, asyncio.Future)
    assert isinstance(lost, asyncio.Future)
    lost.cancel()
    await asyncio.sleep(0)
    gone = weakref.ref(lost)
    del lost
    assert gone() is None
    assert not held.done()
    full.intake.close()


async def test_a_lane_is_not_up_because_nobody_waits_any_more(full: Full) -> None:
    lost = full.intake.accept(frame(BIG), qos=1)
    assert isinstance(lost, asyncio.Future)
    lost.cancel()
    await asyncio.sleep(0.4)  # longer than until the next try
    assert not full.telemetry.up


async def test_a_publish_larger_than_the_lane_does_not_hold_up_those_behind_it(full: Full) -> None:
    waiting = [full.intake.accept(frame(payload), qos=1) for payload in (BIG, bytes(MAX_BYTES), b"last")]
    full.send_one()
    full.send_one()
    assert [isinstance(future, asyncio.Future) and future.done() for future in waiting] == [True] * 3
    assert full.telemetry.drops == {"too_large": 1}
    assert full.telemetry.up


async def test_after_a_dropped_qos_0_publish_the_next_that_fits_shows_that_there_is_space(full: Full) -> None:
    assert full.intake.accept(frame(BIG), qos=0) is None
    assert not full.telemetry.up
    assert full.intake.accept(frame(b"small"), qos=0) is None
    assert full.telemetry.up


async def test_after_close_nobody_who_waits_is_acknowledged(full: Full) -> None:
    future = full.intake.accept(frame(BIG), qos=1)
    assert isinstance(future, asyncio.Future)
    full.intake.close()
    with pytest.raises(asyncio.CancelledError):
        await future


async def test_power_mode_answers_after_the_disk(tmp_path: Path) -> None:
    synced: list[int] = []
    machine = Machine(sync=synced.append)
    lane = Lane.open(tmp_path / "rule-1", max_bytes=MAX_BYTES, target="t", durability="power", machine=machine)
    intake = LaneIntake(lane=lane, telemetry=RuleTelemetry("rule-1", direction=Direction.UPLINK))
    before = len(synced)
    awaitable = intake.accept(frame(b"x"), qos=1)
    assert awaitable is not None
    await asyncio.wait_for(awaitable, 20)
    assert len(synced) > before
    lane.close()


async def test_power_mode_never_answers_when_the_disk_fails(tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    lane = Lane.open(
        tmp_path / "rule-1", max_bytes=MAX_BYTES, target="t", durability="power", machine=Machine(sync=fail)
    )
    telemetry = RuleTelemetry("rule-1", direction=Direction.UPLINK)
    intake = LaneIntake(lane=lane, telemetry=telemetry)
    awaitable = intake.accept(frame(b"x"), qos=1)
    assert awaitable is not None
    with pytest.raises(LaneError):
        await asyncio.wait_for(awaitable, 20)
    assert isinstance(intake.accept(frame(b"y"), qos=1), asyncio.Future)
    assert "Input/output error" in (telemetry.reason or "")
    intake.close()
    lane.close()


async def test_without_a_lane_everything_waits_until_there_is_one(tmp_path: Path) -> None:
    telemetry = RuleTelemetry("rule-1", direction=Direction.UPLINK)
    telemetry.rule_up(Trouble.LINK)
    intake = LaneIntake(telemetry=telemetry)
    intake.refuse("cannot be opened")
    waiting = [intake.accept(frame(payload), qos=1) for payload in (b"a", b"x" * MAX_BYTES, b"b")]
    assert intake.accept(frame(b"c"), qos=0) is None
    await asyncio.sleep(0.3)
    assert telemetry.readiness()["reason"] == "cannot be opened"
    lane = Lane.open(tmp_path / "rule-1", max_bytes=MAX_BYTES, target="t")
    intake.attach(lane)
    await asyncio.wait_for(asyncio.gather(*filter(None, waiting)), 20)
    assert lane.messages == telemetry.outcomes["accepted"] == 2
    assert telemetry.drops == {"lane_not_open": 1, "too_large": 1}
    assert telemetry.up
    lane.close()


def bridge_intake(rules: RuleSet) -> BridgeIntake:
    return BridgeIntake(
        rules=rules, lanes={}, limits=Limits(), host=MemoryHost(), presence=Presence(), telemetry=Telemetry()
    )


async def test_what_waits_goes_where_the_new_rules_send_it(full: Full, tmp_path: Path) -> None:
    first = OutboundRule(id="rule-1", type="outbound", source="sensors", target="t")
    second = OutboundRule(id="rule-2", type="outbound", source="meters", target="t")
    swapped = [first.model_copy(update={"source": "meters"}), second.model_copy(update={"source": "sensors"})]
    lane = Lane.open(tmp_path / "rule-2", max_bytes=MAX_BYTES, target="t")
    other = LaneIntake(lane=lane, telemetry=RuleTelemetry("rule-2", direction=Direction.UPLINK))
    bridge = bridge_intake(RuleSet([first, second]))
    lanes = {"rule-1": full.intake, "rule-2": other}
    bridge.apply(RuleSet([first, second]), lanes)
    route = bridge.route("sensors/x")
    assert route is not None
    waiting = [bridge.accept(route, MqttMessage("sensors/x", b"%d" % n + BIG, 1, client_id="c")) for n in range(3)]
    bridge.apply(RuleSet(swapped), lanes)
    await asyncio.wait_for(asyncio.gather(*filter(None, waiting)), 20)
    reader = LaneReader(lane)
    assert [entry.frame.payload[:1] for entry in reader.read(max_messages=9)] == [b"0", b"1", b"2"]
    reader.close()
    lane.close()


async def test_what_waits_for_a_deleted_rule_is_let_through(full: Full) -> None:
    rules = RuleSet([OutboundRule(id="rule-1", type="outbound", source="sensors", target="t")])
    bridge = bridge_intake(rules)
    bridge.apply(rules, {"rule-1": full.intake})
    route = bridge.route("sensors/x")
    assert route is not None
    message = MqttMessage("sensors/x", BIG, 1, client_id="c")
    waiting, cancelled = (asyncio.ensure_future(bridge.accept(route, message) or asyncio.sleep(0)) for _ in range(2))
    cancelled.cancel()
    accepted = full.telemetry.outcomes["accepted"]
    bridge.apply(RuleSet(), {})
    await asyncio.wait_for(waiting, 20)
    assert full.telemetry.outcomes["accepted"] == accepted
    # A route that was looked up before and used after is nobody's any more.
    assert bridge.accept(route, message) is None
    assert bridge.route("sensors/x") is None


async def test_p2p_of_a_rule_that_went_meanwhile_counts_nowhere() -> None:
    rules = RuleSet([OutboundRule(id="rule-1", type="outbound", source="sensors", target="t")])
    bridge = bridge_intake(rules)
    route = bridge.route("sensors/p2p/away")
    assert route is not None
    bridge.deliver_p2p(route, MqttMessage("sensors/p2p/away", b"x", 1, client_id="c"))


@pytest.fixture
def intake() -> BridgeIntake:
    rules = RuleSet(
        [
            OutboundRule(id="sensors-out", type="outbound", source="sensors", target="t"),
            InboundRule(id="commands-in", type="inbound", source="t2", target="devices"),
            OutboundRule(id="off", type="outbound", source="off", target="t3", enabled=False),
        ]
    )
    limits = Limits(topic_chars=20, payload_bytes=100)
    return BridgeIntake(
        rules=rules, lanes={}, limits=limits, host=MemoryHost(), presence=Presence(), telemetry=Telemetry()
    )


@pytest.mark.parametrize(
    ("topic", "outbound", "target"),
    [
        ("sensors", "sensors-out", None),
        ("sensors/a/b", "sensors-out", None),
        ("sensors/", "sensors-out", None),
        ("sensors/p2p/c1", "sensors-out", "c1"),
        ("devices/p2p/c1", None, "c1"),
        ("off/p2p/c1", None, "c1"),
    ],
)
def test_routes(intake: BridgeIntake, topic: str, outbound: str | None, target: str | None) -> None:
    route = intake.route(topic)
    assert route is not None
    assert (route.outbound, route.p2p_target) == (outbound, target)
    assert intake.route(topic) is route


@pytest.mark.parametrize(
    "topic",
    ["sensors2/x", "Sensors/x", "off/x", "devices/x", "x/p2p/c1", "$SYS/x", "$sensors", "sensors/+", "", "/sensors"],
)
def test_topics_of_no_rule(intake: BridgeIntake, topic: str) -> None:
    assert intake.route(topic) is None


def test_limits_are_inclusive(intake: BridgeIntake) -> None:
    assert not intake.over_limit("sensors/" + "x" * 12, 100)
    assert intake.over_limit("sensors/" + "x" * 13, 100)
    assert intake.over_limit("sensors", 101)
