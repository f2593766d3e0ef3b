"""What a fault did to the messages: one row of the table in `docs/reliability.md` for each kind of traffic."""

import itertools
import os
import platform
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from mq2mqtt import __version__
from tests.bridge_process import BridgeProcess
from tests.thorough import FACTOR

_BEGIN = "<!-- fault table on {host}: begin -->"
_END = "<!-- fault table on {host}: end -->"

_HEAD = (
    (
        "| fault | traffic | acknowledged | arrived | missing | duplicated | out of order "
        "| stall | told down | reason | run |"
    ),
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---|---|",
)
_DOWNLINK_OUTCOMES = (
    "delivered",
    "no_subscriber",
    "queued",
    "expired",
    "parked",
    "skipped",
    "dropped",
)


@dataclass(frozen=True, kw_only=True)
class FaultRow:
    """The counts of one kind of traffic under one fault; times are in seconds.

    Attributes:
        fault: what was done, for how long.
        traffic: direction, QoS and rate.
        acknowledged: messages whose sender was told that they are kept: PUBACK, PUBCOMP, or RocketMQ's answer.
        arrived: different messages that came out at the other end.
        missing: acknowledged ones among those that did not.
        duplicated: arrivals of messages that had arrived before.
        out_of_order: messages whose first arrival came before that of one sent earlier.
        longest_stall: the longest time without an acknowledgement while the publisher waited for one; `None` where
            the sender is RocketMQ's side, whose waiting says nothing about the bridge.
        told_down: from the fault to the first `/readyz` that says so; `None` where the rule goes on working.
        reason: what `/readyz` said then.
    """

    fault: str
    traffic: str
    acknowledged: int
    arrived: int
    missing: int
    duplicated: int
    out_of_order: int
    longest_stall: float | None
    told_down: float | None
    reason: str

    @classmethod
    def of(  # noqa: PLR0913 - the columns
        cls,
        *,
        fault: str,
        traffic: str,
        acknowledged: Collection[bytes],
        arrivals: Sequence[bytes],
        longest_stall: float | None,
        told_down: float | None = None,
        reason: str = "",
    ) -> "FaultRow":
        """Count; bodies are numbers in the order of sending."""
        first_seen = list(dict.fromkeys(arrivals))
        numbers = [int(body) for body in first_seen]
        return cls(
            fault=fault,
            traffic=traffic,
            acknowledged=len(acknowledged),
            arrived=len(first_seen),
            missing=len(set(acknowledged) - set(first_seen)),
            duplicated=len(arrivals) - len(first_seen),
            out_of_order=sum(a > b for a, b in itertools.pairwise(numbers)),
            longest_stall=longest_stall,
            told_down=told_down,
            reason=reason,
        )

    @classmethod
    def total(cls, rows: Sequence["FaultRow"]) -> "FaultRow":
        """Return the sum of `rows`, which are of several clients under the same fault and traffic."""
        stalls = [row.longest_stall for row in rows if row.longest_stall is not None]
        return replace(
            rows[0],
            acknowledged=sum(row.acknowledged for row in rows),
            arrived=sum(row.arrived for row in rows),
            missing=sum(row.missing for row in rows),
            duplicated=sum(row.duplicated for row in rows),
            out_of_order=sum(row.out_of_order for row in rows),
            longest_stall=max(stalls, default=None),
        )

    def markdown(self, run: str) -> str:
        """Return the row of a Markdown table; `run` says when and how it was measured."""
        cells = (
            self.fault,
            self.traffic,
            *map(str, (self.acknowledged, self.arrived, self.missing, self.duplicated, self.out_of_order)),
            _seconds(self.longest_stall),
            _seconds(self.told_down),
            self.reason.replace("|", r"\|") or "-",
            run,
        )
        return f"| {' | '.join(cells)} |"


class FaultTable:
    """The rows of one run, with the bridge on the MQTT broker `host`; `broker` is its name and version."""

    def __init__(self, rocketmq_version: str, *, host: str, broker: str) -> None:
        self.rows: list[FaultRow] = []
        self._rocketmq_version = rocketmq_version
        self._host = host
        self._broker = broker

    def add(self, row: FaultRow) -> None:
        """Keep `row`; fail the test when a message is missing or out of order."""
        self.rows.append(row)
        assert row.missing == 0, row
        assert row.out_of_order == 0, row

    def lines(self) -> list[str]:
        """Return where and when it was measured, and the table."""
        return [self._caption(), "", *_HEAD, *(row.markdown(_this_run()) for row in self.rows)]

    def write(self, file: Path) -> None:
        """Bring this host's table in `file` up to date: the rows of a fault replace those of the same fault.

        The others stay as they are, with the run that they are of. A file without the table gets it at its end.
        """
        begin, end = _BEGIN.format(host=self._host), _END.format(host=self._host)
        text = file.read_text() if file.exists() else ""
        before, _, rest = text.partition(begin)
        old, found, after = rest.partition(end)
        if not found:
            before, old, after = text, "", "\n"
        by_fault: defaultdict[str, list[str]] = defaultdict(list)
        for line in old.splitlines():
            if line.startswith("| ") and line not in _HEAD:
                by_fault[line.removeprefix("| ").partition(" | ")[0]].append(line)
        for fault in dict.fromkeys(row.fault for row in self.rows):
            by_fault[fault] = [row.markdown(_this_run()) for row in self.rows if row.fault == fault]
        table = [self._caption(), "", *_HEAD, *(line for lines in by_fault.values() for line in lines)]
        file.write_text("\n".join([f"{before}{begin}", *table, f"{end}{after}"]))

    def _caption(self) -> str:
        load = os.getloadavg()[1]
        return (
            f"Last run {_today()}: mq2mqtt {__version__}, RocketMQ {self._rocketmq_version}, {self._broker}, "
            f"Python {platform.python_version()}, {platform.system()} {platform.release()}, "
            f"{os.cpu_count()} cores, load {load:.1f}."
        )


def _today() -> str:
    return str(datetime.now(tz=UTC).date())


def _this_run() -> str:
    return _today() if FACTOR == 1 else f"{_today()}, MQ2MQTT_THOROUGH={FACTOR}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def assert_invariants(bridge: BridgeProcess) -> None:
    """Assert for every rule that each message has exactly one outcome, or is on its way."""
    values: dict[tuple[str, str], float] = {}
    directions: dict[str, str] = {}
    for family in text_string_to_metric_families(bridge.get("/metrics")[1]):
        for sample in family.samples:
            rule = sample.labels.get("rule", "")
            if sample.name == "mq2mqtt_messages_total":
                values[rule, sample.labels["outcome"]] = sample.value
                directions[rule] = sample.labels["direction"]
            elif sample.name in {"mq2mqtt_lane_messages", "mq2mqtt_in_flight"}:
                values[rule, sample.name] = sample.value
    assert directions, "no rule has metrics"
    for rule, direction in directions.items():
        of_rule = {name: value for (owner, name), value in values.items() if owner == rule}
        if direction == "uplink":
            settled = sum(of_rule[name] for name in ("sent", "parked", "mq2mqtt_lane_messages"))
            assert of_rule["accepted"] == settled, (rule, of_rule)
        else:
            settled = sum(of_rule[name] for name in (*_DOWNLINK_OUTCOMES, "mq2mqtt_in_flight"))
            assert of_rule["received"] == settled, (rule, of_rule)
