"""Compares the drivers of the link, each in the environment that has it: `scripts/bench --links`."""

# ruff: noqa: T201 - a program for the terminal

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mq2mqtt.link.drivers import DRIVERS
from mq2mqtt.log import quiet_client
from mq2mqtt.quickstart.jars import rocketmq_jars
from mq2mqtt.quickstart.prerequisites import PrerequisiteError
from mq2mqtt.quickstart.proxy import Proxy
from mq2mqtt.quickstart.rocketmq import DEFAULT_VERSION
from tests.bench import report
from tests.bench.experiment import Bench, Measurement

ROOT = Path(__file__).parents[2]

Run = dict[str, Any]
"""What link_speed.py prints."""

_RUN_SECONDS = 300.0
_BASELINE = "native"


def python_of(driver: str) -> str:
    """Return the interpreter of the environment that has `driver`."""
    return sys.executable if DRIVERS[driver].package is None else str(ROOT / f".venv-{driver}" / "bin" / "python")


def measure(driver: str, *, namesrv: str, proxy: str, quick: bool, python: str) -> Run:
    """Measure `driver` once.

    Raises:
        RuntimeError: it could not be measured; with its last words.
    """
    command = [python, "-m", "tests.bench.link_speed", driver, "--namesrv", namesrv]
    command += ["--proxy", proxy] if driver == "grpc" else []
    command += ["--quick"] if quick else []
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=_RUN_SECONDS)
    if done.returncode != 0:
        raise RuntimeError(f"{driver} was not measured: {done.stderr[-2000:]}")
    run: Run = json.loads(done.stdout.splitlines()[-1])
    return run


def rows(runs: dict[str, list[Run]]) -> list[tuple[str, ...]]:
    """Lay out what was measured: a line for each figure, a column for each driver."""
    lines: list[tuple[str, ...]] = [("", *runs), tuple("---" for _ in range(len(runs) + 1))]
    first = next(iter(runs.values()))[0]
    for way in first["speeds"]:
        for unit, name in (("rate", "msg/s"), ("cpu_us", "us of CPU each")):
            cells = [_spread(run["speeds"][way][unit] for run in of) for of in runs.values()]
            lines.append((f"{_metric(way)}, {name}", *cells))
    for way in first["nul"]:
        cells = [", ".join(sorted({run["nul"][way] for run in of})) for of in runs.values()]
        lines.append((f"a body with NUL, {way}", *cells))
    return lines


def figures(runs: dict[str, list[Run]]) -> list[report.Row]:
    """Turn the speeds into the rows of `--json`: `links-DRIVER`, with those of `native` in the same run as baseline."""
    found: list[report.Row] = []
    for driver, of in runs.items():
        beside = runs.get(_BASELINE) if driver != _BASELINE else None
        measured = [_measurements(run, beside[number] if beside else None) for number, run in enumerate(of)]
        found += report.summarize(f"links-{driver}", measured)
    return found


def _measurements(run: Run, beside: Run | None) -> list[Measurement]:
    return [
        Measurement(f"{_metric(way)}{suffix}", speed[key], unit, None if beside is None else beside["speeds"][way][key])
        for way, speed in run["speeds"].items()
        for key, suffix, unit in (("rate", "", "msg/s"), ("cpu_us", ", CPU", "us/msg"))
    ]


def _metric(way: str) -> str:
    return way if way == "received" else f"sent {way}"


def _spread(values: Iterable[float]) -> str:
    sorted_values = sorted(values)
    median = report.number(statistics.median(sorted_values))
    if len(sorted_values) == 1:
        return median
    return f"{median} ({report.number(sorted_values[0])}-{report.number(sorted_values[-1])})"


def table(lines: Sequence[tuple[str, ...]]) -> str:
    """Write the rows as a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench --links", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="runs of each (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one short run of each, to see that all of it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error("--runs must be at least 1")
    return arguments


async def start_servers(bench: Bench) -> tuple[str, Proxy]:
    """Start a RocketMQ and its proxy."""
    namesrv = await bench.namesrv()
    jars = await rocketmq_jars(DEFAULT_VERSION, print)
    proxy = await Proxy.on_jvm(bench.directory / "proxy", namesrv=namesrv, jars=jars, java_flags=bench.java_flags)
    return namesrv, proxy


def measure_all(*, namesrv: str, proxy: str, quick: bool, runs: int) -> dict[str, list[Run]]:
    """Measure each driver `runs` times; return the runs of those that worked, and say which did not."""
    measured: dict[str, list[Run]] = {driver: [] for driver in DRIVERS}
    for number in range(runs):
        # What drifts, drifts for all.
        for driver in list(measured)[:: 1 if number % 2 else -1]:
            _say(f"{driver}: run {number + 1}")
            try:
                run = measure(driver, namesrv=namesrv, proxy=proxy, quick=quick, python=python_of(driver))
            # The figures of the others are not to be lost.
            except Exception as error:  # noqa: BLE001
                _say(f"links-{driver}: failed: {error}")
                del measured[driver]
            else:
                measured[driver].append(run)
    return measured


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def main() -> int:
    """Run all, print the table; return the exit code."""
    arguments = parse()
    quiet_client()
    bench = Bench(namesrv=None, quick=arguments.quick)
    try:
        try:
            namesrv, proxy = asyncio.run(start_servers(bench))
        except PrerequisiteError as error:
            _say(str(error))
            return 2
        try:
            before = asyncio.run(report.surroundings(bench, "uvloop"))
            count = 1 if arguments.quick else arguments.runs
            runs = measure_all(namesrv=namesrv, proxy=proxy.address, quick=arguments.quick, runs=count)
        finally:
            proxy.kill()
    finally:
        bench.close()
    print(f"{before}; load {report.load()} at the end\n")
    for driver, of in runs.items():
        print(f"{driver}: {of[0]['library']}")
    if runs:
        print(f"\n{table(rows(runs))}")
    if arguments.json is not None:
        report.write_json(arguments.json, figures(runs))
    return 0 if len(runs) == len(DRIVERS) else 1


if __name__ == "__main__":
    sys.exit(main())
