"""Runs experiments and prints their figures as a table: `scripts/bench [EXPERIMENT ...]`."""

# ruff: noqa: T201 - a program for the terminal

import argparse
import asyncio
import importlib
import importlib.metadata
import importlib.util
import os
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

from mq2mqtt.cli import collect_rarely
from mq2mqtt.errors import BridgeError
from mq2mqtt.log import quiet_client
from mq2mqtt.quickstart.prerequisites import PrerequisiteError, require_mosquitto
from tests.bench import report
from tests.bench.experiment import SLOW_RUNS, Bench, Experiment, Measurement

MODULES = (
    "tests.bench.uplink",
    "tests.bench.drain",
    "tests.bench.downlink",
    "tests.bench.latency",
    "tests.bench.growth",
    "tests.bench.rocketmq_client",
    "tests.bench.spool",
    "tests.bench.offline",
    "tests.bench.status",
    "tests.bench.soak",
)
"""Each has `EXPERIMENTS`: name -> experiment."""


async def run_all(chosen: dict[str, Experiment], bench: Bench, *, runs: int) -> tuple[list[report.Row], list[str]]:
    """Run each experiment; return the rows of those that worked, and the names of those that did not."""
    rows: list[report.Row] = []
    failed: list[str] = []
    for name, experiment in chosen.items():
        begin, load = time.monotonic(), os.getloadavg()[0]
        try:
            new = await _run(name, experiment, bench, runs=runs)
        except pytest.skip.Exception as skipped:
            _say(f"{name}: left out: {skipped}")
            continue
        # The figures of the others, of maybe hours, are not to be lost.
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001
            traceback.print_exception(error)
            _say(f"{name}: failed: {error}")
            failed.append(name)
            continue
        finally:
            # What others would go on to use may be what broke.
            if not bench.quick or name in failed:
                bench.end_experiment()
        _say(report.table(new))
        _say(f"{name}: {time.monotonic() - begin:.0f} s, load {load:.2f} before, {os.getloadavg()[0]:.2f} after")
        rows += new
    return rows, failed


async def _run(name: str, experiment: Experiment, bench: Bench, *, runs: int) -> list[report.Row]:
    """Run it once to warm up and then `runs` times; `quick`, and what is slow, without the former."""
    counted = 1 if experiment.long else min(runs, SLOW_RUNS) if experiment.slow else runs
    warm_up = not (experiment.long or experiment.slow or bench.quick)
    results: list[list[Measurement]] = []
    for number in range(0 if warm_up else 1, counted + 1):
        bench.run = number
        _say(f"{name}: {f'run {number} of {counted}' if number else 'warm-up'}")
        results.append(await experiment.measure(bench))
    return report.summarize(name, results[-counted:])


def parse(known: dict[str, Experiment]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("experiment", nargs="*", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="counted runs of each (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one short run of each, to see that all of it works")
    parser.add_argument("--rocketmq", metavar="HOST:PORT", help="name server to use instead of starting one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/benchmarks.md has it")
    parser.add_argument("--plain-asyncio", action="store_true", help="do not use uvloop, neither here nor in servers")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.experiment if name not in known]:
        parser.error(f"unknown experiment: {', '.join(unknown)}")
    if arguments.runs < 1:
        parser.error("--runs must be at least 1")
    return arguments


def forbid_uvloop(directory: Path) -> None:
    """Have every Python that is started from now on fail to import uvloop, as if it were not installed."""
    (directory / "uvloop.py").write_text('raise ImportError("plain asyncio is wanted")\n')
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH"))))


async def prepare(chosen: dict[str, Experiment]) -> None:
    """Get what experiments on Mosquitto need, as far as it can be had; without it they are left out."""
    if any("mosquitto" in name for name in chosen):
        try:
            await require_mosquitto(_say)
        except PrerequisiteError as error:
            _say(str(error))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


async def measure(chosen: dict[str, Experiment], arguments: argparse.Namespace, loop_name: str) -> int:
    """Run `chosen`, print and write the figures; return the exit code."""
    bench = Bench(namesrv=arguments.rocketmq, quick=arguments.quick)
    try:
        await prepare(chosen)
        try:
            before = await report.surroundings(bench, loop_name)
        except BridgeError as error:
            _say(f"there is no RocketMQ to measure: {error}")
            return 2
        rows, failed = await run_all(chosen, bench, runs=1 if arguments.quick else arguments.runs)
    finally:
        bench.close()
    print(f"{before}; load {report.load()} at the end\n")
    print(report.markdown(rows) if arguments.markdown else report.table(rows))
    if arguments.json is not None:
        report.write_json(arguments.json, rows)
    if failed:
        _say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def main() -> int:
    """Parse arguments, run, print."""
    known: dict[str, Experiment] = {}
    for module in MODULES:
        known |= importlib.import_module(module).EXPERIMENTS
    arguments = parse(known)
    quiet_client()
    # Some experiments run parts of the bridge in here.
    collect_rarely()
    # A thousand clients are a thousand sockets, here and in the servers, which inherit it.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    all_of_them = [name for name, experiment in known.items() if arguments.quick or not experiment.long]
    chosen = {name: known[name] for name in arguments.experiment or all_of_them}
    loop_name, loop_factory = "asyncio", asyncio.new_event_loop
    with tempfile.TemporaryDirectory(prefix="mq2mqtt-bench-") as directory:
        if arguments.plain_asyncio:
            forbid_uvloop(Path(directory))
        elif importlib.util.find_spec("uvloop"):
            uvloop = importlib.import_module("uvloop")
            loop_name, loop_factory = f"uvloop {importlib.metadata.version('uvloop')}", uvloop.new_event_loop
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(measure(chosen, arguments, loop_name))


if __name__ == "__main__":
    sys.exit(main())
