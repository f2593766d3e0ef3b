"""What a machine lacks is said in one line."""

import os
from pathlib import Path

import pytest

from mq2mqtt.quickstart import prerequisites
from mq2mqtt.quickstart.prerequisites import (
    PrerequisiteError,
    find_program,
    require_java,
    require_mosquitto,
    require_postgresql,
    require_programs,
)


@pytest.fixture
def bin_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory with programs, headers and a policy for services; the user is not root."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(prerequisites, "_SYSTEM_PROGRAMS", str(tmp_path))
    monkeypatch.setattr(prerequisites, "_INCLUDES", (tmp_path,))
    monkeypatch.setattr(prerequisites, "_POSTGRESQL", tmp_path / "postgresql")
    monkeypatch.setattr(prerequisites, "_POLICY", tmp_path / "policy-rc.d")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return tmp_path


def program(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.usefixtures("bin_directory")
async def test_missing_programs_are_named_with_their_packages() -> None:
    with pytest.raises(PrerequisiteError) as caught:
        await require_programs(["java", "mvn"], lambda _: None)
    assert str(caught.value) == (
        "missing here: java, mvn; `apt install default-jre-headless maven`, "
        "or name a RocketMQ that runs already: --rocketmq HOST:PORT"
    )


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        ('openjdk version "17.0.15" 2025-04-15', True),
        ('openjdk version "21" 2023-09-19', True),
        ('java version "1.8.0_392"', False),
        ('openjdk version "11.0.2" 2019-01-15', False),
        ("no version at all", False),
    ],
)
async def test_java_must_be_17_or_newer(bin_directory: Path, version: str, accepted: bool) -> None:  # noqa: FBT001
    program(bin_directory, "java", f"echo '{version}' >&2")
    if accepted:
        await require_java(lambda _: None)
    else:
        with pytest.raises(PrerequisiteError):
            await require_java(lambda _: None)


async def test_root_gets_them_from_apt(bin_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    program(bin_directory, "apt-get", f'echo "Setting up $*"; /bin/ln -sf /bin/true {bin_directory}/mvn')
    shown: list[str] = []
    await require_programs(["mvn"], shown.append)
    assert shown[0] == "installing maven with apt"
    assert shown[-1] == "  Setting up install -y --no-install-recommends maven"


async def test_a_failing_apt_is_one_line(bin_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    program(bin_directory, "apt-get", 'echo "E: no network"; exit 100')
    with pytest.raises(PrerequisiteError, match="`apt-get update` failed: E: no network; `apt install maven`"):
        await require_programs(["mvn"], lambda _: None)


@pytest.mark.usefixtures("bin_directory")
async def test_what_mosquittos_hook_is_built_with_is_named_with_its_packages() -> None:
    with pytest.raises(PrerequisiteError) as caught:
        await require_mosquitto(lambda _: None)
    assert str(caught.value) == (
        "missing here: mosquitto, cc, make, mosquitto_plugin.h, stdlib.h; "
        "`apt install mosquitto gcc make mosquitto-dev libc6-dev`"
    )


@pytest.mark.parametrize("own_policy", [False, True])
async def test_a_mosquitto_from_apt_does_not_start_its_service(
    bin_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_policy: bool,  # noqa: FBT001
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    policy = bin_directory / "policy-rc.d"
    if own_policy:
        policy.write_text("of this machine")
    # As invoke-rc.d asks it.
    program(
        bin_directory,
        "apt-get",
        f'{policy} mosquitto start; echo "Setting up: $?"; /bin/ln -sf /bin/true {bin_directory}/mosquitto',
    )
    shown: list[str] = []
    assert await require_mosquitto(shown.append, build=False) == str(bin_directory / "mosquitto")
    assert (shown[-1] == "  Setting up: 101") is not own_policy
    assert policy.exists() is own_policy


async def test_postgresql_is_found_where_debian_has_it(bin_directory: Path) -> None:
    with pytest.raises(PrerequisiteError) as caught:
        await require_postgresql(lambda _: None)
    assert str(caught.value) == "missing here: initdb, postgres; `apt install postgresql`"

    for version in ("13", "15"):
        directory = bin_directory / "postgresql" / version / "bin"
        directory.mkdir(parents=True)
        program(directory, "initdb", "")
        program(directory, "postgres", "")
    await require_postgresql(lambda _: None)
    assert find_program("postgres") == str(bin_directory / "postgresql" / "15" / "bin" / "postgres")
