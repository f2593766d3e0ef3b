"""Builds the hook once; a Mosquitto with it for each test that asks."""

import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.hook.mosquitto import Mosquitto, Sidecar, table_of
from tests.unit.hook.driver import build

LANES = {"telemetry-out": "sensors", "alarms-out": "alarms"}
PARENTS = ("devices",)


@pytest.fixture(scope="session")
def hook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hook")
    if os.environ.get("MQ2MQTT_HOOK") == "sanitize":
        return build("sanitize", directory) / "sanitize" / "mq2mqtt_hook.so"
    return build("all", directory) / "mq2mqtt_hook.so"


@pytest.fixture
async def stopped(hook: Path, tmp_path: Path) -> AsyncIterator[Mosquitto]:
    """A broker that the test configures and starts."""
    broker = Mosquitto(tmp_path, hook)
    yield broker
    await broker.stop()


@pytest.fixture
async def broker(stopped: Mosquitto) -> Mosquitto:
    """A broker that has got the lane table once."""
    (stopped.spool / "lanes.table").write_bytes(table_of(LANES, PARENTS))
    return await stopped.start()


@pytest.fixture
async def sidecar(broker: Mosquitto) -> AsyncIterator[Sidecar]:
    connected = await Sidecar.connect(broker, parents=LANES.values())
    yield connected
    await connected.client.drop()


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path], None]]:
    """`small_disk(directory)` puts a file system of 64 KiB there; it goes when the broker has ended."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a file system")
    mounted: list[Path] = []

    def mount(directory: Path) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", directory], check=True)
        mounted.append(directory)

    yield mount
    for directory in mounted:
        subprocess.run(["umount", "-l", directory], check=True)
