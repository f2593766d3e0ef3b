"""Turns the measurements of all runs into rows, and rows into text."""

import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mq2mqtt.quickstart.cluster import ask, broker_addresses
from tests.bench.experiment import Bench, Measurement
from tests.bench.mosquitto_servers import mosquitto_version

_GET_BROKER_RUNTIME_INFO = 28
_HEADER = ("experiment", "metric", "median", "min-max", "unit", "baseline", "ratio", "runs")


@dataclass(frozen=True)
class Row:
    """One metric of one experiment over all counted runs; `ratio` is the median of each run's value to its baseline."""

    experiment: str
    metric: str
    value: float
    unit: str
    baseline: float | None
    ratio: float | None
    runs: list[float]

    def as_json(self) -> dict[str, Any]:
        """Return the row as `--json` writes it."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """Return the row as a table shows it."""
        return (
            self.experiment,
            self.metric,
            number(self.value),
            f"{number(min(self.runs))}-{number(max(self.runs))}",
            self.unit,
            "-" if self.baseline is None else number(self.baseline),
            "-" if self.ratio is None else f"{self.ratio:.2f}",
            str(len(self.runs)),
        )


def number(value: float) -> str:
    """Write `value` with three digits that count."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.{1 if value >= 10 else 2}f}"


def summarize(experiment: str, runs: list[list[Measurement]]) -> list[Row]:
    """Turn the measurements of all runs into rows, one for each metric."""
    rows: list[Row] = []
    for same in zip(*runs, strict=True):
        values = [measurement.value for measurement in same]
        pairs = [(measurement.value, measurement.baseline) for measurement in same if measurement.baseline]
        rows.append(
            Row(
                experiment,
                same[0].metric,
                statistics.median(values),
                same[0].unit,
                statistics.median(baseline for _, baseline in pairs) if pairs else None,
                statistics.median(value / baseline for value, baseline in pairs) if pairs else None,
                values,
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """Lay the rows out in columns."""
    cells = [_HEADER, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def markdown(rows: list[Row]) -> str:
    """Write the rows as a Markdown table."""
    lines = [_HEADER, ("---",) * len(_HEADER), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(file: Path, rows: list[Row]) -> None:
    """Write what `--json` asks for."""
    file.write_text(json.dumps([row.as_json() for row in rows], indent=2) + "\n")


def load() -> str:
    """Return the load averages of 1, 5 and 15 minutes."""
    return ", ".join(f"{value:.2f}" for value in os.getloadavg())


async def surroundings(bench: Bench, loop: str) -> str:
    """Say on what the figures are measured."""
    now = dt.datetime.now(dt.UTC)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mq2mqtt", "amqtt")]
    namesrv = await bench.namesrv()
    rocketmq = bench.rocketmq_version or await _rocketmq_version(namesrv)
    versions.append(f"Mosquitto {mosquitto_version()}")
    versions += [f"RocketMQ {rocketmq}", f"Python {platform.python_version()}", loop]
    machine = f"{platform.system()} {platform.release()}, {os.cpu_count()} cores of {_processor()}"
    return f"{now:%Y-%m-%d %H:%M} UTC; {', '.join(versions)}; {machine}; load {load()} at the start"


async def _rocketmq_version(namesrv: str) -> str:
    (address, *_) = await broker_addresses(namesrv)
    answer = await ask(address, _GET_BROKER_RUNTIME_INFO)
    found = re.search(rb'"brokerVersionDesc":"V?([^"]+)"', answer.body)
    return found[1].decode().replace("_", ".") if found else "of unknown version"


def _processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()
