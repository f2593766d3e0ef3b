"""Drivers by name: what they declare, how a missing package is told, and what is refused."""

import ast
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mq2mqtt import cli
from mq2mqtt.checks import _check_driver
from mq2mqtt.errors import ConfigError
from mq2mqtt.link import drivers
from mq2mqtt.link.capabilities import capabilities
from mq2mqtt.link.drivers import DRIVERS, library, open_link
from mq2mqtt.link.native import NativeLink
from mq2mqtt.link.refusals import refusals
from mq2mqtt.settings import RocketMQSettings, Settings
from tests.unit.bridge_world import IN, OUT, World

ROOT = Path(__file__).parents[3]
CONTRACT = ROOT / "tests" / "contract" / "test_link.py"
STATUS = {"id": "presence", "type": "status", "source": "GID_dev", "target": "mq_status"}


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401 - a function with any capabilities
    """`lacking("shows_lag", ...)`: from now on the native driver is declared to lack these."""

    def lack(*names: str) -> None:
        native = DRIVERS["native"]
        poorer = replace(native.capabilities, **dict.fromkeys(names, False))
        monkeypatch.setitem(drivers.DRIVERS, "native", replace(native, capabilities=poorer))

    return lack


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory that Python looks for packages in."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(site: Path, name: str) -> None:
    """Install a package as pip leaves it, that has the import name of all RocketMQ packages."""
    (site / "rocketmq").mkdir(exist_ok=True)
    (site / "rocketmq" / "__init__.py").touch()
    information = site / f"{name.replace('-', '_')}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "RECORD").write_text("rocketmq/__init__.py,,\n")


def settings_of(driver: str, **fields: Any) -> RocketMQSettings:  # noqa: ANN401 - as YAML has them
    proxy = {"proxy": "127.0.0.1:8081"} if driver == "grpc" else {}
    return RocketMQSettings.model_validate({"driver": driver, **proxy, **fields})


# What is declared


def test_every_capability_is_told_in_two_sentences() -> None:
    told = list(capabilities())
    assert len({capability.name for capability in told}) == len(told) > 0
    for capability in told:
        for words in (capability.means, capability.without):
            assert words[0].isupper() or words[0] == "`", capability
            assert words.endswith("."), capability


def test_the_default_driver_lacks_nothing() -> None:
    assert DRIVERS["native"].capabilities.missing == ()


@pytest.mark.parametrize("name", DRIVERS)
def test_a_driver_can_be_looked_at_where_its_package_is_missing(name: str) -> None:
    assert DRIVERS[name].name == name
    module = importlib.import_module(f"mq2mqtt.link.{name}")
    assert callable(module.make_link)
    assert callable(module.library)


def needs_of_tests() -> Iterator[frozenset[str]]:
    """What each test of the contract needs, or one set of its parameters."""
    for function in ast.walk(ast.parse(CONTRACT.read_text())):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        all_need: frozenset[str] = frozenset()
        some_need: list[frozenset[str]] = []
        for decorator in function.decorator_list:
            for call in ast.walk(decorator):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "needs":
                    names = frozenset(ast.literal_eval(name) for name in call.args)
                    if call is decorator:
                        all_need |= names
                    else:
                        some_need.append(names)
        yield all_need
        yield from (all_need | names for names in some_need)


@pytest.mark.parametrize("name", DRIVERS)
def test_each_capability_that_a_driver_has_is_tested_and_for_each_that_it_lacks_a_test_is_skipped(name: str) -> None:
    lacks = {capability.name for capability in DRIVERS[name].capabilities.missing}
    needs = list(needs_of_tests())
    assert {one for needed in needs for one in needed} == {capability.name for capability in capabilities()}
    tested = {one for needed in needs if not needed & lacks for one in needed}
    assert tested == {capability.name for capability in capabilities()} - lacks


def test_the_contract_of_links_skips_for_nothing_else() -> None:
    assert "skip" not in {
        node.attr.removesuffix("if")
        for node in ast.walk(ast.parse(CONTRACT.read_text()))
        if isinstance(node, ast.Attribute)
    }


def test_the_docs_have_the_table() -> None:
    """Renew it with: python -c 'from mq2mqtt.link import drivers; print(drivers.markdown(), end="")'."""
    assert drivers.markdown() in (ROOT / "docs" / "drivers.md").read_text()


# How one is made


def test_the_native_link_is_made_of_the_settings() -> None:
    settings = settings_of("native", namesrv="127.0.0.1:1", access_key="a", secret_key="b", tls=True)  # noqa: S106 - none
    assert isinstance(open_link(settings, client_id="c"), NativeLink)
    assert library(DRIVERS["native"]).startswith("mq2mqtt ")


@pytest.mark.parametrize("name", [name for name, driver in DRIVERS.items() if driver.package])
def test_a_missing_or_wrong_package_is_one_line_with_the_remedy(name: str, site: Path) -> None:
    package = DRIVERS[name].package
    assert package is not None
    needs = f"rocketmq.driver {name} needs the Python package {package}; "
    remedy = f"in mq2mqtt's sources: pip install '.[{name}]'"

    def problem() -> str:
        with pytest.raises(ConfigError) as raised:
            open_link(settings_of(name), client_id="c")
        return str(raised.value)

    if "rocketmq" not in sys.modules and importlib.util.find_spec("rocketmq") is None:
        assert problem() == needs + remedy
    install(site, "some-rocketmq")
    assert problem().startswith(needs)
    assert problem().endswith(f"then {remedy}")
    assert "some-rocketmq" in problem()


# What is refused


@pytest.mark.parametrize(
    ("lacks", "rule", "where"),
    [
        ("keeps_order", OUT, "rules[0] (sensors-out): type"),
        ("keeps_order", STATUS, "rules[0] (presence): type"),
        ("keeps_order", {**IN, "receipts": "mq_receipts"}, "rules[0] (commands-in): receipts"),
        ("keeps_order", {**OUT, "enabled": False}, "rules[0] (sensors-out): type"),
        ("receives_in_order", IN, "rules[0] (commands-in): type"),
        ("starts_earliest", {**IN, "from": "earliest"}, "rules[0] (commands-in): from"),
    ],
)
def test_a_rule_that_needs_what_the_driver_lacks_is_refused(
    lacking: Any,  # noqa: ANN401
    lacks: str,
    rule: dict[str, Any],
    where: str,
) -> None:
    settings = Settings.model_validate({"rules": [rule]})
    assert refusals(settings.rocketmq, settings.rules) == []
    lacking(lacks)
    (line,) = refusals(settings.rocketmq, settings.rules)
    assert line.startswith(f"{where}: rocketmq.driver native can't do this: ")
    assert line.endswith(" Change it or the driver: docs/drivers.md")


@pytest.mark.parametrize(
    ("lacks", "field", "value"),
    [
        ("uses_access_keys", "access_key", {"access_key": "a", "secret_key": "b"}),
        ("uses_tls", "tls", {"tls": True}),
        ("uses_tls", "tls", {"tls": {"check_hostname": False}}),
        ("maps_addresses", "address_map", {"address_map": {"a:1": "b:1"}}),
    ],
)
def test_a_setting_that_the_driver_cannot_follow_is_refused(
    lacking: Any,  # noqa: ANN401
    lacks: str,
    field: str,
    value: dict[str, Any],
) -> None:
    lacking(lacks)
    (line,) = refusals(settings_of("native", **value), ())
    assert line.startswith(f"rocketmq.{field}: rocketmq.driver native can't do this: ")
    assert refusals(settings_of("native"), ()) == []


@pytest.mark.parametrize("command", ["run", "sidecar", "check"])
def test_the_command_ends_with_the_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lacking: Any,  # noqa: ANN401
    command: str,
) -> None:
    lacking("starts_earliest", "uses_tls")
    config = tmp_path / "mq2mqtt.yaml"
    host = {"host": {"url": "mqtt://127.0.0.1:1"}} if command == "sidecar" else {}
    config.write_text(yaml.safe_dump({"rocketmq": {"tls": True}, "rules": [OUT, {**IN, "from": "earliest"}], **host}))
    monkeypatch.setattr(sys, "argv", ["mq2mqtt", command, "-c", str(config)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "can't do this" in line]
    assert [line.partition(": rocketmq.driver")[0] for line in lines] == (
        ["PROBLEM  rocketmq.tls", "PROBLEM  rules[1] (commands-in): from"]
        if command == "check"
        else ["mq2mqtt: rocketmq.tls", "rules[1] (commands-in): from"]
    )
    assert ended.value.code == (1 if command == "check" else 2)
    assert "Traceback" not in said.err


async def test_a_reload_that_the_running_driver_cannot_follow_changes_nothing(
    tmp_path: Path,
    lacking: Any,  # noqa: ANN401
) -> None:
    lacking("starts_earliest")
    async with World(tmp_path / "spool", OUT) as world:
        world.reload(OUT, {**IN, "from": "earliest"})
        assert list(world.bridge.telemetry.rules) == ["sensors-out"]
        assert {str(outcome): count for outcome, count in world.bridge.telemetry.reloads.items()} == {"invalid": 1}
        world.reload(OUT, IN)
        assert list(world.bridge.telemetry.rules) == ["sensors-out", "commands-in"]


def test_check_shows_driver_and_library_and_what_it_lacks(
    capsys: pytest.CaptureFixture[str],
    lacking: Any,  # noqa: ANN401
) -> None:
    lacking("shows_lag")
    assert _check_driver(Settings()) == 0
    ok, lacks = capsys.readouterr().out.splitlines()
    assert ok.startswith("ok       rocketmq.driver native: mq2mqtt ")
    assert lacks.startswith("lacks    rocketmq.driver native: shows_lag: `mq2mqtt_consumer_lag` is missing")
