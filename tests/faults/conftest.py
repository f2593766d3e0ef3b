"""The fault table: collected over a run, printed at its end, and written where it is asked for."""

import asyncio
import contextlib
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from mq2mqtt.quickstart.rocketmq import RocketMQ
from tests.conftest import run_on_jvm
from tests.faults.report import FaultTable
from tests.faults.small_disk import SmallDisk
from tests.new_bridge import host
from tests.rocket_peer import RocketPeer

_TABLE = pytest.StashKey[FaultTable]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("mq2mqtt").addoption(
        "--fault-table", type=Path, metavar="FILE", help="bring the fault table in FILE up to date with this run's rows"
    )


@pytest.fixture(scope="session")
def fault_table(request: pytest.FixtureRequest) -> FaultTable:
    """Take the rows of this run; `add` fails the test when a message is missing or out of order."""
    table = FaultTable(request.config.getoption("--rocketmq-version"), host=host(), broker=_broker())
    request.config.stash[_TABLE] = table
    return table


def _broker() -> str:
    if host() == "amqtt":
        return f"amqtt {version('amqtt')}"
    shown = subprocess.run(["mosquitto", "-h"], check=False, capture_output=True, text=True).stdout
    return shown.partition("\n")[0].replace("mosquitto version", "Mosquitto")


@pytest.fixture(scope="session")
def broker_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk | None]:
    """Give a disk for the broker's messages that can be filled, where one can be had."""
    with contextlib.ExitStack() as stack:
        disk: SmallDisk | None = None
        with contextlib.suppress(pytest.skip.Exception):
            disk = stack.enter_context(SmallDisk(tmp_path_factory.mktemp("broker") / "disk", megabytes=256))
        yield disk


@pytest.fixture(scope="session")
def own(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    say: Callable[[str], None],
    broker_disk: SmallDisk | None,
) -> Iterator[RocketMQ]:
    """Start the RocketMQ that the faults happen to; each test leaves it in working order, whatever happens."""
    # It looks at its disk every second instead of every 10, and refuses messages on one that is fuller than this.
    conf = {"cleanResourceInterval": "1000", "cleanFileForciblyEnable": "false"}
    full = {"rocketmq.broker.diskSpaceWarningLevelRatio": "0.8"}
    if broker_disk is not None:
        conf["storePathCommitLog"] = str(broker_disk.path / "commitlog")
    server = asyncio.run(
        run_on_jvm(
            tmp_path_factory.mktemp("rocketmq"),
            say=say,
            version=request.config.getoption("--rocketmq-version"),
            broker_conf=conf,
            java_properties=full if broker_disk is not None else {},
        )
    )
    yield server
    server.kill()


@pytest.fixture
def peer(own: RocketMQ) -> Iterator[RocketPeer]:
    """Give an application at that RocketMQ."""
    with RocketPeer(own.namesrv) as peer:
        yield peer


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash.get(_TABLE, None)
    if table is None or not table.rows:
        return
    terminalreporter.section("faults")
    for line in table.lines():
        terminalreporter.write_line(line)
    # Not known when this file was found by way of a directory above.
    file = config.getoption("--fault-table", default=None)
    if file is not None:
        table.write(file)
