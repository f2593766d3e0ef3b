"""Mosquitto as a server under test: by itself, and with the hook and the sidecar beside it."""

import asyncio
import re
import subprocess
import uuid
from pathlib import Path
from typing import Any, Self

import pytest

from tests.bench.experiment import Bench
from tests.bench.servers import BridgeServer
from tests.mosquitto import Mosquitto, mosquitto_program
from tests.mosquitto_bridge import MosquittoBridge
from tests.plain_mosquitto import PlainMosquitto

_LOG_TYPES = ("error", "warning", "notice")
"""What a broker says that is used: a line for each packet would be most of its work."""


def mosquitto_version() -> str:
    """Return the version of the broker that is started, or that there is none."""
    try:
        program = mosquitto_program()
    except (pytest.skip.Exception, pytest.fail.Exception):
        return "not installed"
    said = subprocess.run([program, "-h"], check=False, capture_output=True, text=True).stdout
    found = re.search(r"version (\S+)", said)
    return found[1] if found else "of unknown version"


class AloneMosquitto:
    """Mosquitto without the hook, with the settings that it has with the hook."""

    def __init__(self, broker: Mosquitto) -> None:
        self._broker = broker

    @classmethod
    async def start(cls, bench: Bench) -> Self:
        """Start it and wait until it listens."""
        directory = bench.directory / f"mosquitto-{uuid.uuid4().hex[:8]}"
        broker = PlainMosquitto(directory)
        broker.log_types = _LOG_TYPES
        await asyncio.to_thread(broker.start)
        return cls(broker)

    @property
    def port(self) -> int:
        """Its MQTT port."""
        return self._broker.port

    @property
    def processes(self) -> dict[str, int]:
        """The broker's process id."""
        assert self._broker.process is not None
        return {"broker": self._broker.process.pid}

    def close(self) -> None:
        """Kill it."""
        self._broker.kill()


class MosquittoServer(BridgeServer):
    """Mosquitto with the hook, and `mq2mqtt sidecar`. What is said of one process is said of the sidecar."""

    bridge: MosquittoBridge

    def _make_bridge(self, directory: Path, *, namesrv: str, rules: list[dict[str, Any]]) -> MosquittoBridge:
        bridge = MosquittoBridge(directory, namesrv=namesrv, rules=rules)
        bridge.broker.log_types = _LOG_TYPES
        return bridge

    @property
    def processes(self) -> dict[str, int]:
        assert self.bridge.broker.process is not None
        return {"broker": self.bridge.broker.process.pid, "sidecar": self.pid}
