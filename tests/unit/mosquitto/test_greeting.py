from pathlib import Path

import pytest

from mq2mqtt_mosquitto.control import Welcome, WelcomeFlags
from mq2mqtt_mosquitto.greeting import objection


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ((0, 1), "the hook is of version 0.1, this sidecar needs 0.2: install both of one release, restart both"),
        ((0, 2), None),
        ((0, 3), None),
        ((1, 0), "the hook is of version 1.0, this sidecar needs 0.2: install both of one release, restart both"),
    ],
)
def test_the_hooks_version(version: tuple[int, int], problem: str | None, tmp_path: Path) -> None:
    welcome = Welcome(
        version=version,
        boot_epoch=0,
        table_crc=0,
        flags=WelcomeFlags(0),
        broker_version="2.0",
        spool_path=str(tmp_path),
        problems=(),
    )
    assert objection(welcome, tmp_path) == problem
