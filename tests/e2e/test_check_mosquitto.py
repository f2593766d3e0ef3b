"""`mq2mqtt check` with a sidecar's configuration, against a real Mosquitto."""

import asyncio
import contextlib
import io
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import yaml

from mq2mqtt import settings
from mq2mqtt_mosquitto.checks import check_host
from tests.mosquitto import TOKEN, Mosquitto
from tests.mosquitto_bridge import MosquittoBridge

pytestmark = pytest.mark.e2e

RULES = [{"id": "telemetry-out", "type": "outbound", "source": "sensors", "target": "mq_sensors"}]

_NOBODY = 65534

Check = Callable[..., list[str]]
"""`check(broker, spool=..., token=...)`: its lines; the exit code is asserted."""


class WithoutHook(Mosquitto):
    def hook_lines(self) -> list[str]:
        return []


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """`brokers(...)` starts one; its spool is for root alone."""
    started: list[Mosquitto] = []

    def start(*options: str, kind: type[Mosquitto] = Mosquitto) -> Mosquitto:
        spool = tmp_path / "spool"
        spool.mkdir(mode=0o700)
        started.append(kind(tmp_path / "mosquitto", spool=spool, options=options))
        started[-1].start()
        return started[-1]

    yield start
    for broker in started:
        broker.kill()


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    def run(broker: Mosquitto, *, spool: Path | None = None, token: str = TOKEN) -> list[str]:
        config: dict[str, Any] = {
            "spool": {"path": str(spool or broker.spool)},
            "host": {"url": broker.url, "token": token},
            "rules": RULES,
        }
        (tmp_path / "mq2mqtt.yaml").write_text(yaml.safe_dump(config))
        loaded = settings.load(tmp_path / "mq2mqtt.yaml")
        code = asyncio.run(check_host(loaded, broker.directory / "mosquitto.conf"))
        lines = capsys.readouterr().out.splitlines()
        assert code == any(line.startswith("PROBLEM  ") for line in lines)
        return lines

    return run


def problems(lines: list[str]) -> list[str]:
    return [line.removeprefix("PROBLEM  ") for line in lines if line.startswith("PROBLEM  ")]


def test_a_broker_that_fits_has_no_problem(brokers: Callable[..., Mosquitto], check: Check, tmp_path: Path) -> None:
    broker = brokers("persistence true", f"persistence_location {tmp_path}/")
    no_stall = "ok       messages that follow one another at once do not wait (set_tcp_nodelay)"
    for _ in range(3):
        lines = check(broker)
        if no_stall in lines:  # else the machine itself has stalled
            break
    # The tests' token is for nobody to guess, and for everybody to read.
    assert [line for line in problems(lines) if "/token is open" not in line] == []
    assert any(f"auth allow, acl allow, spool {broker.spool}" in line for line in lines)
    assert no_stall in lines


def test_a_stall_is_measured(brokers: Callable[..., Mosquitto], check: Check) -> None:
    lines = check(brokers("set_tcp_nodelay false"))
    found = [re.search(r"a message that follows another at once waits (\d+) ms", line) for line in problems(lines)]
    assert any(waits is not None and int(waits[1]) >= 40 for waits in found), lines


def test_a_wrong_token_is_named(brokers: Callable[..., Mosquitto], check: Check) -> None:
    lines = check(brokers(), token="not the token of this broker")  # noqa: S106 - the point of it
    assert any(line.endswith("; is host.token the line in plugin_opt_token_file?") for line in problems(lines)), lines


def test_a_broker_without_the_hook_is_named(brokers: Callable[..., Mosquitto], check: Check) -> None:
    lines = check(brokers(kind=WithoutHook))
    assert any("no hook answers" in line for line in problems(lines)), lines


def test_a_broker_that_is_away_is_named(brokers: Callable[..., Mosquitto], check: Check) -> None:
    broker = brokers()
    broker.kill()
    assert f"host.url {broker.url}: Connection refused" in problems(check(broker))


def test_another_directory_is_named(brokers: Callable[..., Mosquitto], check: Check, tmp_path: Path) -> None:
    broker = brokers()
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    assert f"the hook writes to {broker.spool}, but spool.path is {other}" in problems(check(broker, spool=other))


@pytest.mark.parametrize(
    ("mode", "problem"),
    [
        (0o2777, "is open to everybody, with what devices publish: chmod o= "),
        (0o770, "what is made in it is not its group's, as mode 770 has it: chmod g+s "),
    ],
)
def test_a_spool_with_the_wrong_mode_is_named(
    brokers: Callable[..., Mosquitto], check: Check, mode: int, problem: str
) -> None:
    broker = brokers()
    broker.spool.chmod(mode)
    assert any(problem in line for line in problems(check(broker)))


def _lines(loaded: settings.Settings) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        asyncio.run(check_host(loaded, None))
    return printed.getvalue().splitlines()


def _lines_as_nobody(loaded: settings.Settings) -> list[str]:
    # What it imports is for root alone too.
    _lines(loaded)
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=_answer_as_nobody, args=(loaded, there))
    process.start()
    assert here.poll(60)
    lines: list[str] = here.recv()
    process.join(60)
    return lines


def _answer_as_nobody(loaded: settings.Settings, answer: Connection) -> None:
    os.setuid(_NOBODY)
    answer.send(_lines(loaded))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_user_who_cannot_see_whether_a_sidecar_runs_does_not_take_its_place(free_port: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        spool = Path(directory)
        spool.chmod(0o755)
        (spool / "instance").touch(mode=0o600)
        loaded = settings.Settings.model_validate(
            {"spool": {"path": spool}, "host": {"url": f"mqtt://127.0.0.1:{free_port}", "token": TOKEN}, "rules": RULES}
        )
        assert f"host.url {loaded.host.url}: Connection refused" in problems(_lines(loaded))
        lines = _lines_as_nobody(loaded)
        assert any(line.startswith(f"ok       a sidecar runs on {spool}") for line in lines), lines
        assert not any("host.url" in line for line in problems(lines)), lines


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_user_who_may_not_look_is_told_so(free_port: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        spool = Path(directory) / "spool"
        spool.mkdir(mode=0o700)
        (spool / "instance").touch()
        loaded = settings.Settings.model_validate(
            {"spool": {"path": spool}, "host": {"url": f"mqtt://127.0.0.1:{free_port}", "token": TOKEN}, "rules": RULES}
        )
        assert f"ok       spool.path {spool}: mode 700, group root" in _lines(loaded)
        assert f"spool.path {spool}: this user may not write there; run check as the sidecar's user" in problems(
            _lines_as_nobody(loaded)
        )


def test_a_sidecar_that_runs_is_asked_and_keeps_its_connection(tmp_path: Path, free_port: int) -> None:
    disabled = {"id": "off", "type": "outbound", "source": "off", "target": "mq_off", "enabled": False}
    bridge = MosquittoBridge(tmp_path, namesrv=f"127.0.0.1:{free_port}", rules=[*RULES, disabled])
    bridge.start(ready=False)
    try:
        answer = bridge.command("check")
        assert answer.returncode == 1
        assert f"ok       a sidecar runs on {bridge.spool}" in answer.stdout
        assert f"PROBLEM  {bridge.admin_url}/readyz: rule telemetry-out is down: " in answer.stdout
        assert "rule off" not in answer.stdout
        assert "already connected, closing old connection" not in bridge.broker.log()
    finally:
        bridge.kill()
