"""`mq2mqtt run` as a child process, with a configuration that the quickstart writes."""

import asyncio
import contextlib
import sys
from pathlib import Path

import aiohttp
import yaml

from mq2mqtt.errors import BridgeError
from mq2mqtt.quickstart.ports import free_port
from mq2mqtt.quickstart.prerequisites import Say
from mq2mqtt.quickstart.process import Child

__all__ = ["INBOUND_TOPIC", "OUTBOUND_TOPIC", "BridgeFailedError", "RunningBridge"]

OUTBOUND_TOPIC = "mq_sensors"
INBOUND_TOPIC = "mq_commands"

_MQTT_PORT = 1883
_ADMIN_PORT = 9883
_START_DEADLINE = 60.0
_STOP_DEADLINE = 15.0
_POLL_INTERVAL = 0.1


class BridgeFailedError(BridgeError):
    """The bridge ended, or was not ready in time; the text holds its last words."""


class RunningBridge:
    """An amqtt broker with the bridge in it, as anybody runs it. Files are in `directory`."""

    def __init__(self, directory: Path, *, namesrv: str) -> None:
        self.config_file = directory / "mq2mqtt.yaml"
        self.log_file = directory / "bridge.log"
        self.mqtt_port = free_port(_MQTT_PORT)
        self.admin_url = f"http://127.0.0.1:{(admin_port := free_port(_ADMIN_PORT))}"
        config = {
            "node": "quickstart",
            "rocketmq": {"namesrv": namesrv},
            "spool": {"path": "spool"},
            "admin": {"listen": f"127.0.0.1:{admin_port}"},
            "mqtt": {"listen": f"127.0.0.1:{self.mqtt_port}"},
            "rules": [
                {"id": "telemetry-out", "type": "outbound", "source": "sensors", "target": OUTBOUND_TOPIC},
                {"id": "commands-in", "type": "inbound", "source": INBOUND_TOPIC, "target": "devices"},
            ],
        }
        directory.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(yaml.safe_dump(config, sort_keys=False))
        self._child: Child | None = None

    async def start(self, say: Say) -> None:
        """Start it and wait until every rule is up.

        Raises:
            BridgeFailedError: it ended, or is not ready after a minute.
        """
        say(f"starting the bridge: mq2mqtt run -c {self.config_file}")
        self.log_file.write_bytes(b"")
        self._child = Child(
            [sys.executable, "-m", "mq2mqtt", "run", "-c", str(self.config_file)],
            output=self.log_file,
            cwd=Path.cwd(),
        )
        problem: str | None = "it does not answer"
        try:
            async with asyncio.timeout(_START_DEADLINE), aiohttp.ClientSession() as http:
                while (problem := await self._readiness(http)) is not None:
                    self.check()
                    await asyncio.sleep(_POLL_INTERVAL)
        except TimeoutError as exc:
            raise BridgeFailedError(
                f"the bridge is not ready after {_START_DEADLINE:g} s: {problem} (log: {self.log_file})"
            ) from exc

    def check(self) -> None:
        """Raise `BridgeFailedError` if it has ended."""
        if self._child is not None and self._child.exit_code is not None:
            words = self._child.tail().splitlines() or ["no output"]
            raise BridgeFailedError(f"the bridge ended with exit code {self._child.exit_code}: {words[-1]}")

    async def stop(self) -> None:
        """Stop it as a service manager does (SIGTERM) and wait. Idempotent."""
        if self._child is not None:
            await asyncio.to_thread(self._child.terminate, _STOP_DEADLINE)

    async def _readiness(self, http: aiohttp.ClientSession) -> str | None:
        """Return `None` when ready, else why not."""
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with http.get(f"{self.admin_url}/readyz") as answer:
                if answer.status == 200:  # noqa: PLR2004 - HTTP
                    return None
                rules = (await answer.json())["rules"]
                return "; ".join(f"rule {rule['id']}: {rule['reason']}" for rule in rules if rule["reason"])
        return "it does not answer"
