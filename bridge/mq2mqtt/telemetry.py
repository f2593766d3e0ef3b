"""What happens to messages and rules, said once: each event drives its log line and its metrics.

Counters are plain integers that `mq2mqtt.metrics` reads at scrape time, because a message on the hot path must not
pay for a locked counter. Names and invariants: design section 8.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from enum import StrEnum

from loguru import logger

from mq2mqtt.host import Delivery, DropReason, Outcome

__all__ = [
    "Direction",
    "Ending",
    "Histogram",
    "OfflineTelemetry",
    "ReloadOutcome",
    "RuleState",
    "RuleTelemetry",
    "Telemetry",
    "Trouble",
]

_LATENCY_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


_UNPROVEN = "not proven yet"


class Direction(StrEnum):
    """Value of the label `direction`."""

    UPLINK = "uplink"
    DOWNLINK = "downlink"


class RuleState(StrEnum):
    """What `/readyz` says of a rule."""

    UP = "up"
    DOWN = "down"
    DISABLED = "disabled"
    DRAINING = "draining"


class ReloadOutcome(StrEnum):
    """Value of the label `outcome` of `mq2mqtt_reload_total`."""

    APPLIED = "applied"
    INVALID = "invalid"


class Trouble(StrEnum):
    """What can hold a rule down, each on its own."""

    LINK = "link"
    LANE = "lane"
    GROUP = "group"
    PREDECESSOR = "predecessor"
    HOST = "host"
    STORE = "store"


class Ending(StrEnum):
    """How a kept message left the store: value of the label `outcome` of `mq2mqtt_offline_total`."""

    DELIVERED = "delivered"
    EXPIRED = "expired"
    EVICTED = "evicted"
    DROPPED = "dropped"


# Not of RocketMQ's side.
_LOCAL_TROUBLES = frozenset((Trouble.LANE, Trouble.HOST, Trouble.STORE))


class Histogram:
    """A latency histogram in seconds with fixed bounds."""

    __slots__ = ("counts", "total")

    bounds = _LATENCY_BOUNDS

    def __init__(self) -> None:
        self.counts = [0] * (len(_LATENCY_BOUNDS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration; a negative one (clocks differ) counts as zero."""
        seconds = max(seconds, 0.0)
        self.counts[bisect_left(_LATENCY_BOUNDS, seconds)] += 1
        self.total += seconds

    def observe_batch(self, starts_us: Sequence[int]) -> None:
        """Count the durations from each of these times, at least one, until now; in microseconds since 1970."""
        now_us = time.time_ns() // 1000
        longest = bisect_left(_LATENCY_BOUNDS, (now_us - min(starts_us)) / 1e6)
        # A batch's messages nearly always belong into one bucket: 220 ns of each saved, 4 % of its way.
        if longest == bisect_left(_LATENCY_BOUNDS, (now_us - max(starts_us)) / 1e6) > 0:
            self.counts[longest] += len(starts_us)
            self.total += (now_us * len(starts_us) - sum(starts_us)) / 1e6
            return
        for at in starts_us:
            self.observe((now_us - at) / 1e6)


class RuleTelemetry:
    """Counters and state of one rule.

    `state`, `reason` and `since` (seconds since 1970) are what `/readyz` shows.
    """

    def __init__(self, rule_id: str, *, direction: Direction, state: RuleState = RuleState.DOWN) -> None:
        self.rule_id = rule_id
        self.direction = direction
        self.state = state
        self._troubles: dict[Trouble, str] = {Trouble.LINK: _UNPROVEN}
        self.reason: str | None = _UNPROVEN if state is RuleState.DOWN else None
        self.since = time.time()
        self.outcomes: Counter[str] = Counter()
        self.drops: Counter[str] = Counter()
        self.invalid_properties: Counter[str] = Counter()
        self.latency = Histogram()
        self.in_flight = 0
        self.lane_messages = 0
        self.lane_bytes = 0
        self.lane_limit_bytes = 0
        self.lane_oldest_seconds = 0.0
        self.lag: int | None = None
        """`None`: the driver cannot tell, or the rule does not receive."""
        self.parked_messages = 0

    @property
    def up(self) -> bool:
        """Whether the last proof succeeded and nothing else stands in the way."""
        return self.state is RuleState.UP

    def begin(self) -> None:
        """The rule is at work from now on; it is down until RocketMQ has answered."""
        # Those of RocketMQ's side are proven anew.
        others = {source: reason for source, reason in self._troubles.items() if source in _LOCAL_TROUBLES}
        self._troubles = {Trouble.LINK: _UNPROVEN} | others
        if self.state is not RuleState.DOWN:
            self.state, self.since = RuleState.DOWN, time.time()
        self.reason = self._listed_troubles()

    def end(self, state: RuleState) -> None:
        """The rule takes nothing more: it is `DISABLED`, or gone, and what is left of it is `DRAINING`."""
        if state is not self.state:
            self.state, self.since = state, time.time()
            self.reason = self._listed_troubles() if state is RuleState.DRAINING else None

    def rule_up(self, source: Trouble) -> None:
        """`source` is fine now: for the link, RocketMQ has just answered a send, fetch or probe of this rule."""
        if self._troubles.pop(source, None) is not None:
            self._update()

    def rule_down(self, source: Trouble, reason: str) -> None:
        """The rule cannot do its work now; `reason` is for an operator."""
        if self._troubles.get(source) != reason:
            self._troubles[source] = reason
            self._update()

    def rule_has(self, source: Trouble, problem: str | None) -> None:
        """The rule is down for this reason, or up without one."""
        if problem is None:
            self.rule_up(source)
        else:
            self.rule_down(source, problem)

    def _listed_troubles(self) -> str | None:
        return "; ".join(self._troubles.values()) or None

    def _update(self) -> None:
        reason = self._listed_troubles()
        if self.state is RuleState.DRAINING:
            self.reason = reason
        if self.state not in (RuleState.UP, RuleState.DOWN):
            return
        state = RuleState.DOWN if self._troubles else RuleState.UP
        if state is not self.state:
            self.state, self.since = state, time.time()
        if reason is None:
            logger.info("rule {} is up", self.rule_id)
        elif reason != self.reason:
            logger.warning("rule {} is down: {}", self.rule_id, reason)
        self.reason = reason

    def sent(self, accepted_us: Sequence[int]) -> None:
        """RocketMQ has stored messages; `accepted_us` is when the lane accepted each, microseconds since 1970."""
        self.outcomes["sent"] += len(accepted_us)
        self.latency.observe_batch(accepted_us)

    def handed(self, born_ms: int) -> None:
        """A message born at `born_ms` was written to one device's connection."""
        # Its producer's clock may say anything, and one sum of 2**63 would swallow every duration after it.
        self.latency.observe(time.time() - max(born_ms, 0) / 1e3)

    def settled(self, delivery: Delivery) -> None:
        """A downlink message has its outcome."""
        self.outcomes[delivery.outcome] += 1
        self.in_flight -= 1
        if delivery.outcome is Outcome.DROPPED:
            self.drops[delivery.reason or DropReason.DISCONNECTED] += 1

    def skipped(self) -> None:
        """A downlink message is not for this rule: a bridge sent it (loop guard)."""
        self.outcomes["skipped"] += 1
        self.in_flight -= 1

    def unreadable(self, count: int) -> None:
        """So many downlink messages came that could not be decoded; the link has logged each."""
        if count:
            self.outcomes["received"] += count
            self.outcomes["dropped"] += count
            self.drops[DropReason.UNREADABLE] += count

    def dropped(self, reason: DropReason, *, count: int = 1) -> None:
        """Publishes were dropped before they became messages of this rule."""
        if self.drops[reason] == 0:
            logger.warning("rule {} drops messages: {} (counted from here on)", self.rule_id, reason)
        self.drops[reason] += count

    def parked(self, where: str, reason: str, *, evicted: int) -> None:
        """A message that can never go on as it is was put aside; `where` names it for `parked show`.

        `evicted` older ones were dropped to make room for it.
        """
        self.outcomes["parked"] += 1
        if evicted:
            self.drops[DropReason.PARKING_FULL] += evicted
        if self.direction is Direction.DOWNLINK:
            self.in_flight -= 1
        logger.warning("rule {} parked {}: {}", self.rule_id, where, reason)

    def readiness(self) -> dict[str, str | None]:
        """Return this rule's entry in `/readyz`."""
        since = datetime.fromtimestamp(self.since, tz=UTC).isoformat(timespec="milliseconds")
        return {"id": self.rule_id, "state": self.state, "reason": self.reason, "since": since.replace("+00:00", "Z")}


class OfflineTelemetry:
    """Counters of the messages kept for clients, over all rules; `messages` are kept now."""

    def __init__(self) -> None:
        self.messages = 0
        self.outcomes: Counter[str] = Counter()

    def found(self, count: int) -> None:
        """So many messages are in the store at the start."""
        self.outcomes["stored"] += count
        self.messages += count
        if count:
            logger.info("{} messages are kept for clients that were away", count)

    def stored(self) -> None:
        """A message is in the store."""
        self.outcomes["stored"] += 1
        self.messages += 1

    def left(self, ending: Ending) -> None:
        """A message has left the store."""
        self.outcomes[ending] += 1
        self.messages -= 1


class Telemetry:
    """All rules' telemetry, in the order of the configuration; what only drains comes last.

    `successors`, by id, are of rules that wait until what has their id now is done: they tell whether the rule is up.
    `reloads` counts by outcome, `configured_at` is when the rules at work were read, in seconds since 1970.
    """

    def __init__(self) -> None:
        self.rules: dict[str, RuleTelemetry] = {}
        self.successors: dict[str, RuleTelemetry] = {}
        self.offline = OfflineTelemetry()
        self.relay: RuleTelemetry | None = None
        """Of the lane of P2P messages between devices; no rule, and only told of while it has troubles."""
        self.reloads: Counter[ReloadOutcome] = Counter()
        self.configured_at = time.time()

    def add(self, rule: RuleTelemetry) -> RuleTelemetry:
        """Register a rule and return it."""
        self.rules[rule.rule_id] = rule
        return rule

    def remove(self, rule_id: str) -> None:
        """Forget a rule whose lane has been drained and removed."""
        self.rules.pop(rule_id, None)

    def arrange(self, rule_ids: Iterable[str]) -> None:
        """Put the rules in this order; those not in it follow."""
        order = [rule_id for rule_id in rule_ids if rule_id in self.rules]
        ordered = set(order)
        rest = [rule_id for rule_id in self.rules if rule_id not in ordered]
        self.rules = {rule_id: self.rules[rule_id] for rule_id in (*order, *rest)}

    def reload_applied(self, changes: str, *, needs_restart: Sequence[str]) -> None:
        """The rules of a changed configuration are at work; `needs_restart` names what else changed in it."""
        self.reloads[ReloadOutcome.APPLIED] += 1
        self.configured_at = time.time()
        logger.info("configuration reloaded: {}", changes)
        if needs_restart:
            logger.warning("changed outside the rules, needs a restart: {}", ", ".join(needs_restart))

    def reload_refused(self, reason: str) -> None:
        """A changed configuration is wrong, and changes nothing."""
        self.reloads[ReloadOutcome.INVALID] += 1
        logger.error("configuration not reloaded, going on as before: {}", reason)

    @property
    def told(self) -> list[RuleTelemetry]:
        """What tells the state of each rule: its own telemetry, or that of its successor."""
        told = [self.successors.get(rule_id, rule) for rule_id, rule in self.rules.items()]
        if self.relay is not None and self.relay.state is RuleState.DOWN:
            told.append(self.relay)
        return told

    @property
    def ready(self) -> bool:
        """Whether no enabled rule is down."""
        return all(rule.state is not RuleState.DOWN for rule in self.told)
