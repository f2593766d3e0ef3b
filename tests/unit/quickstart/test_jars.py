"""Jars through Maven: a small script on the PATH plays Maven, so that every way it can end is tried."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mq2mqtt.quickstart.jars import rocketmq_jars
from mq2mqtt.quickstart.prerequisites import PrerequisiteError

SUCCESS = """
echo "$@" >"$CALLS"
for argument; do
  case $argument in -DoutputDirectory=*) mkdir -p "${argument#*=}"; touch "${argument#*=}/a.jar";; esac
done
"""
FAILURE = """
echo "[INFO] Scanning for projects..."
echo "[ERROR] Could not find artifact org.apache.rocketmq:rocketmq-broker"
echo "[ERROR] To see the full stack trace, use -e"
exit 1
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Tell the arguments of the player's last call, and forget them; the cache is fresh."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def last() -> str:
        file = tmp_path / "calls"
        arguments = file.read_text() if file.exists() else ""
        file.unlink(missing_ok=True)
        return arguments

    return last


def play_maven(tmp_path: Path, script: str) -> None:
    program = tmp_path / "bin" / "mvn"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}")
    program.chmod(0o755)


async def test_maven_is_called_once(tmp_path: Path, calls: Callable[[], str]) -> None:
    play_maven(tmp_path, SUCCESS)
    shown: list[str] = []
    directory = await rocketmq_jars("5.3.3", shown.append)
    assert directory == tmp_path / "cache" / "mq2mqtt" / "rocketmq-5.3.3"
    assert [jar.name for jar in directory.iterdir()] == ["a.jar"]
    arguments = calls()
    assert "-Drocketmq.version=5.3.3" in arguments
    assert "no.proxy" not in arguments
    assert shown[-1] == "RocketMQ 5.3.3: 1 jars ready"
    assert await rocketmq_jars("5.3.3", shown.append) == directory
    assert calls() == ""


async def test_version_4_has_no_proxy(tmp_path: Path, calls: Callable[[], str]) -> None:
    play_maven(tmp_path, SUCCESS)
    await rocketmq_jars("4.9.7", lambda _: None)
    assert "-Dno.proxy" in calls()


@pytest.mark.usefixtures("calls")
async def test_a_failed_fetch_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    play_maven(tmp_path, SUCCESS + FAILURE)
    with pytest.raises(PrerequisiteError, match=r"Could not find artifact org\.apache\.rocketmq:rocketmq-broker$"):
        await rocketmq_jars("5.3.3", lambda _: None)
    assert list((tmp_path / "cache" / "mq2mqtt").iterdir()) == []


@pytest.mark.usefixtures("calls")
async def test_progress_counts_jars_and_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq2mqtt.quickstart.jars._REPORT_INTERVAL", 0.0)
    downloads = """
echo "Downloading from somewhere: scheme://host/a.pom"
echo "Downloaded from somewhere: scheme://host/a.pom (12 kB at 1.0 MB/s)"
echo "Downloaded from somewhere: scheme://host/a.jar (4.5 MB at 9.1 MB/s)"
echo "[INFO] Downloaded from somewhere: scheme://host/b.jar (500 kB at 9.1 MB/s)"
"""
    play_maven(tmp_path, downloads + SUCCESS)
    shown: list[str] = []
    await rocketmq_jars("5.3.3", shown.append)
    assert "  2 jars, 5 MB" in shown
