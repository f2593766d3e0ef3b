"""Runs experiments and prints their figures as a table: `scripts/bench [EXPERIMENT ...]`."""

# ruff: noqa: T201 - a program for the terminal

import argparse
import asyncio
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench.experiment import Bench, Experiment, Measurement

MODULES = ("tests.bench.rocketmq_client", "tests.bench.spool")
"""Each has `EXPERIMENTS`: name -> function."""


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


async def run_all(chosen: dict[str, Experiment], bench: Bench, *, runs: int) -> list[Row]:
    """Run each experiment once to warm up and then `runs` times."""
    rows: list[Row] = []
    for name, experiment in chosen.items():
        results: list[list[Measurement]] = []
        for number in range(runs + 1):
            print(f"{name}: {'warm-up' if number == 0 else f'run {number} of {runs}'}", file=sys.stderr)
            results.append(await experiment(bench))
        rows += summarize(name, results[1:])
    return rows


def table(rows: list[Row]) -> str:
    """Lay the rows out in columns."""
    cells = [("experiment", "metric", "median", "min-max", "unit", "baseline", "ratio", "runs")]
    cells += [
        (
            row.experiment,
            row.metric,
            f"{row.value:,.0f}",
            f"{min(row.runs):,.0f}-{max(row.runs):,.0f}",
            row.unit,
            "-" if row.baseline is None else f"{row.baseline:,.0f}",
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            str(len(row.runs)),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def surroundings(loop: str) -> str:
    """Say on what the figures were measured."""
    version = importlib.metadata.version("mq2mqtt")
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"mq2mqtt {version}, Python {platform.python_version()}, {loop}, {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores, load {load}"
    )


def main() -> None:
    """Parse arguments, run, print."""
    known: dict[str, Experiment] = {}
    for module in MODULES:
        known |= importlib.import_module(module).EXPERIMENTS
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("experiment", nargs="*", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="counted runs of each (%(default)s)")
    parser.add_argument("--rocketmq", metavar="HOST:PORT", help="name server to use instead of starting one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--plain-asyncio", action="store_true", help="do not use uvloop")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.experiment if name not in known]:
        parser.error(f"unknown experiment: {', '.join(unknown)}")
    if arguments.runs < 1:
        parser.error("--runs must be at least 1")
    chosen = {name: known[name] for name in arguments.experiment or known}
    loop_name, loop_factory = "asyncio", asyncio.new_event_loop
    if not arguments.plain_asyncio and importlib.util.find_spec("uvloop"):
        uvloop = importlib.import_module("uvloop")
        loop_name, loop_factory = f"uvloop {importlib.metadata.version('uvloop')}", uvloop.new_event_loop
    before = surroundings(loop_name)
    bench = Bench(namesrv=arguments.rocketmq)
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            rows = runner.run(run_all(chosen, bench, runs=arguments.runs))
    finally:
        bench.close()
    print(f"{before} at the start\n{table(rows)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
