"""Which hook the quickstart takes, and what it says without one."""

from pathlib import Path

import pytest

from mq2mqtt.quickstart import mosquitto
from mq2mqtt.quickstart.mosquitto import RunningMosquitto, find_hook
from mq2mqtt.quickstart.prerequisites import PrerequisiteError


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mosquitto and a compiler are there, no hook is installed."""

    async def nothing_is_missing(_say: object, *, build: bool = True) -> str:
        return "mosquitto and a compiler" if build else "mosquitto"

    monkeypatch.setattr(mosquitto, "require_mosquitto", nothing_is_missing)
    monkeypatch.setattr(mosquitto, "_INSTALLED", (str(tmp_path / "lib").removeprefix("/"),))
    monkeypatch.setattr(mosquitto, "_SOURCES", tmp_path / "sources")


async def test_an_installed_hook_needs_no_compiler(tmp_path: Path) -> None:
    hook = tmp_path / "lib" / "mq2mqtt_hook.so"
    hook.parent.mkdir()
    hook.touch()
    assert await find_hook(tmp_path / "build", lambda _: None) == ("mosquitto", hook)


async def test_without_one_it_is_built_from_the_sources(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "Makefile").write_text("all:\n\tmkdir -p $(BUILD); touch $(BUILD)/mq2mqtt_hook.so\n")
    found = await find_hook(tmp_path / "build", lambda _: None)
    assert found == ("mosquitto and a compiler", tmp_path / "build" / "mq2mqtt_hook.so")
    assert found[1].exists()


async def test_a_build_that_fails_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "Makefile").write_text("all:\n\tfalse\n")
    with pytest.raises(PrerequisiteError, match=r"^the hook cannot be built: make: .*$"):
        await find_hook(tmp_path / "build", lambda _: None)


async def test_without_sources_it_says_where_a_hook_comes_from(tmp_path: Path) -> None:
    with pytest.raises(
        PrerequisiteError, match=r"no mq2mqtt_hook\.so is installed here: `make -C plugins/mosquitto_hook"
    ):
        await find_hook(tmp_path / "build", lambda _: None)


def test_the_token_is_for_nobody_else(tmp_path: Path) -> None:
    broker = RunningMosquitto(tmp_path, program="mosquitto", hook=tmp_path / "hook.so", port=1883)
    assert broker.token_file.stat().st_mode & 0o077 == 0
    assert len(broker.token_file.read_text().strip()) == 64
