"""The configuration file of a running bridge: what is taken from it, when, and what is refused."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from loguru import logger

from mq2mqtt.bridge import Bridge
from mq2mqtt.host.memory import MemoryHost
from mq2mqtt.link.memory import MemoryLink
from mq2mqtt.reload import ConfigFile
from tests.waiting import until

OUT = {"id": "sensors-out", "type": "outbound", "source": "sensors", "target": "mq_sensors"}
MORE = {"id": "meters-out", "type": "outbound", "source": "meters", "target": "mq_meters"}


class Running:
    """A bridge and the file it was started from."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "mq2mqtt.yaml"
        self.write(OUT)
        self.file = ConfigFile(self.path)
        self.bridge = Bridge(self.file.load(), MemoryHost(), link=MemoryLink())
        self.log: list[str] = []

    def text(self, *rules: dict[str, Any], **changes: Any) -> str:  # noqa: ANN401 - any section
        config = {"spool": {"path": "spool"}, "admin": {"listen": "127.0.0.1:0"}, "rules": list(rules), **changes}
        return yaml.safe_dump(config)

    def write(self, *rules: dict[str, Any], **changes: Any) -> None:  # noqa: ANN401
        self.path.write_text(self.text(*rules, **changes))

    @property
    def rules(self) -> list[str]:
        return list(self.bridge.telemetry.rules)

    @property
    def reloads(self) -> dict[str, int]:
        return {str(outcome): count for outcome, count in self.bridge.telemetry.reloads.items()}


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    running = Running(tmp_path)
    await running.bridge.start()
    sink = logger.add(lambda message: running.log.append(str(message)), format="{level} {message}")
    yield running
    logger.remove(sink)
    await running.bridge.stop()


@asynccontextmanager
async def watched(running: Running, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr("mq2mqtt.reload._POLL_SECONDS", 0.05)
    task = asyncio.create_task(running.file.watch(running.bridge), name="watch")
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_an_added_rule_takes_publishes_at_once_and_stands_where_the_file_has_it(running: Running) -> None:
    running.write(MORE, OUT)
    assert running.bridge.intake.route("meters/x") is None
    await running.file.reload(running.bridge)
    assert running.bridge.intake.route("meters/x") is not None
    assert running.rules == ["meters-out", "sensors-out"]
    assert running.reloads == {"applied": 1}
    assert "INFO configuration reloaded: added meters-out\n" in running.log


@pytest.mark.parametrize(
    "text",
    [
        "rules: [",
        "",
        "rules:\n- {id: sensors-out, type: outbound, source: sensors/x, target: mq_sensors}\n",
        yaml.safe_dump({"rules": [OUT, {**MORE, "source": "sensors"}]}),
        yaml.safe_dump({"rules": [OUT], "nodes": "typo"}),
    ],
    ids=["no YAML", "empty", "wrong rule", "rules in conflict", "unknown key"],
)
async def test_a_wrong_file_changes_nothing(running: Running, text: str) -> None:
    running.path.write_text(text)
    since = running.bridge.telemetry.configured_at
    await running.file.reload(running.bridge)
    assert running.rules == ["sensors-out"]
    assert running.bridge.intake.route("sensors/x") is not None
    assert running.reloads == {"invalid": 1}
    assert running.bridge.telemetry.configured_at == since
    (line,) = (line for line in running.log if line.startswith("ERROR"))
    assert "going on as before" in line
    assert "mq2mqtt.yaml" in line


async def test_a_change_beside_the_rules_is_named_and_the_rules_are_taken(running: Running) -> None:
    running.write(OUT, MORE, node="other", rocketmq={"namesrv": "127.0.0.1:1"}, limits={"topic_chars": 9})
    await running.file.reload(running.bridge)
    assert running.rules == ["sensors-out", "meters-out"]
    assert (
        "WARNING changed outside the rules, needs a restart: node, rocketmq.namesrv, limits.topic_chars\n"
        in running.log
    )
    assert not running.bridge.intake.over_limit("meters/x/too/long", 1)


@pytest.mark.parametrize("rules", ["rules: []", "rules: null", ""], ids=["empty", "null", "missing"])
async def test_a_file_without_rules_is_applied_with_a_warning(running: Running, rules: str) -> None:
    running.path.write_text(f"spool: {{path: spool}}\nadmin: {{listen: '127.0.0.1:0'}}\n{rules}\n")
    await running.file.reload(running.bridge)
    assert running.reloads == {"applied": 1}
    assert [line for line in running.log if line.startswith("WARNING the configuration has no rules")]


async def test_the_environment_stays_above_the_file(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQ2MQTT_RULES", json.dumps([MORE]))
    running.write(OUT)
    await running.file.reload(running.bridge)
    await until(lambda: running.rules == ["meters-out"])


async def test_requests_during_a_reload_make_one_more(running: Running) -> None:
    request = asyncio.Event()
    task = asyncio.create_task(running.file.reload_on(request, running.bridge), name="reload")
    running.write(OUT, MORE)
    request.set()
    request.set()
    await until(lambda: running.rules == ["sensors-out", "meters-out"])
    running.write(MORE)
    request.set()
    await until(lambda: running.rules == ["meters-out"])
    assert running.reloads == {"applied": 2}
    task.cancel()


async def test_after_the_stop_nothing_is_taken(running: Running) -> None:
    await running.bridge.stop_receiving()
    running.write(OUT, MORE)
    await running.file.reload(running.bridge)
    assert running.rules == ["sensors-out"]


async def test_a_changed_file_is_taken_once_it_rests(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(running, monkeypatch):
        await asyncio.sleep(0.3)
        assert running.reloads == {}
        running.write(OUT, MORE)
        await until(lambda: running.rules == ["sensors-out", "meters-out"])
        await asyncio.sleep(0.3)
        assert running.reloads == {"applied": 1}


async def test_a_file_that_is_moved_into_place_is_taken(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(running, monkeypatch):
        other = running.path.with_name("new.yaml")
        # Neither its size nor its time differ.
        before = running.path.stat()
        other.write_text(running.text({**OUT, "target": "mq_sensorz"}))
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert other.stat().st_size == before.st_size
        other.replace(running.path)
        await until(lambda: running.reloads == {"applied": 1})
    assert any("changed sensors-out" in line for line in running.log)


async def test_a_file_that_is_still_being_written_is_left_alone(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mq2mqtt.reload._POLL_SECONDS", 0.05)
    polls: list[int] = []
    fingerprint = running.file._fingerprint  # noqa: SLF001 - the file grows between two looks, however slow they are

    def grow() -> tuple[int, int, int] | None:
        if len(polls) < 10:
            polls.append(1)
            running.path.write_text(f"# {len(polls)}\n" * len(polls) + running.text())
        return fingerprint()

    monkeypatch.setattr(running.file, "_fingerprint", grow)
    task = asyncio.create_task(running.file.watch(running.bridge), name="watch")
    await until(lambda: len(polls) == 10)
    assert running.reloads == {}
    await until(lambda: running.reloads == {"applied": 1})
    task.cancel()


async def test_a_broken_or_missing_file_is_told_once(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(running, monkeypatch):
        running.path.write_text("rules: [")
        await until(lambda: running.reloads == {"invalid": 1})
        await asyncio.sleep(0.3)
        assert running.reloads == {"invalid": 1}
        running.path.unlink()
        await until(lambda: running.reloads == {"invalid": 2})
        await asyncio.sleep(0.3)
        assert running.reloads == {"invalid": 2}
        running.write(OUT, MORE)
        await until(lambda: running.reloads == {"invalid": 2, "applied": 1})
