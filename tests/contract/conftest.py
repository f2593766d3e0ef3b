"""Holds the contract of links to what drivers declare, and shows it as a table."""

from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack

import pytest

from mq2mqtt.link.capabilities import capabilities
from mq2mqtt.link.drivers import DRIVERS
from mq2mqtt.settings import RocketMQSettings
from tests.contract import guarded

_Table = defaultdict[tuple[str, str], Counter[str]]
_TABLE = pytest.StashKey[_Table]()
"""(driver, capability) -> tests by outcome."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = _Table(Counter)


@pytest.fixture
def settings_in(driver: str, guarded_servers: guarded.SettingsIn) -> guarded.SettingsIn:  # noqa: ARG001 - is skipped by it
    """See `guarded.SettingsIn`."""
    return guarded_servers


@pytest.fixture(scope="session")
def guarded_servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, say: Callable[[str], None]
) -> Iterator[guarded.SettingsIn]:
    """See `guarded.SettingsIn`."""
    driver = request.config.getoption("--driver")
    known: dict[str, RocketMQSettings] = {}
    with ExitStack() as stack:

        async def start(kind: str) -> RocketMQSettings:
            if kind not in known:
                server, settings = await guarded.start(kind, driver, tmp_path_factory.mktemp(kind), say)
                stack.callback(server.kill)
                known[kind] = settings.model_copy(update={"driver": driver})
            return known[kind]

        yield start


def _driver(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return "" if callspec is None else callspec.params.get("driver", "")


def _needed(item: pytest.Item) -> set[str]:
    return {name for marker in item.iter_markers("needs") for name in marker.args}


def pytest_runtest_setup(item: pytest.Item) -> None:
    driver = DRIVERS.get(_driver(item))
    if driver is None:
        return
    for capability in driver.capabilities.missing:
        if capability.name in _needed(item):
            pytest.skip(f"{driver.name} lacks {capability.name}: {capability.without}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or not report.passed:
        for name in _needed(item):
            item.config.stash[_TABLE][_driver(item), name][report.outcome] += 1
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash[_TABLE]
    for driver in DRIVERS.values():
        lines = []
        for capability in capabilities():
            if (key := (driver.name, capability.name)) in table:
                can = "yes" if getattr(driver.capabilities, capability.name) else "NO"
                lines.append(f"{capability.name:<22} {can:<4} {_words(table[key])}")
        if lines:
            terminalreporter.section(f"what the driver {driver.name} declares, and the tests that need it")
            for line in lines:
                terminalreporter.write_line(line)


def _words(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
