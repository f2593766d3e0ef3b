"""`mq2mqtt run` or `sidecar` as a child process, with a configuration that the quickstart writes."""

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from mq2mqtt.errors import BridgeError
from mq2mqtt.quickstart.mosquitto import RunningMosquitto, find_hook
from mq2mqtt.quickstart.ports import free_port
from mq2mqtt.quickstart.prerequisites import Say
from mq2mqtt.quickstart.process import Child

__all__ = ["INBOUND_GROUP", "INBOUND_TOPIC", "OUTBOUND_TOPIC", "BridgeFailedError", "RunningBridge"]

OUTBOUND_TOPIC = "mq_sensors"
INBOUND_TOPIC = "mq_commands"

_NODE = "quickstart"
_INBOUND_RULE = "commands-in"
INBOUND_GROUP = f"GID_mq2mqtt_{_INBOUND_RULE}_{_NODE}"

_MQTT_PORT = 1883
_ADMIN_PORT = 9883
_START_DEADLINE = 60.0
_STOP_DEADLINE = 15.0
_POLL_INTERVAL = 0.1


class BridgeFailedError(BridgeError):
    """The bridge ended, or was not ready in time; the text holds its last words."""


class RunningBridge:
    """An MQTT broker with the bridge, as anybody runs it: in amqtt, or beside Mosquitto. Files are in `directory`.

    `rocketmq` is that section of its configuration.
    """

    def __init__(self, directory: Path, *, rocketmq: dict[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.config_file = directory / "mq2mqtt.yaml"
        self.log_file = directory / "bridge.log"
        self.mqtt_port = free_port(_MQTT_PORT)
        self.admin_url = f"http://127.0.0.1:{(admin_port := free_port(_ADMIN_PORT))}"
        self._config: dict[str, Any] = {
            "node": _NODE,
            "rocketmq": rocketmq,
            "spool": {"path": "spool"},
            "admin": {"listen": f"127.0.0.1:{admin_port}"},
            "mqtt": {"listen": f"127.0.0.1:{self.mqtt_port}"},
            "rules": [
                {"id": "telemetry-out", "type": "outbound", "source": "sensors", "target": OUTBOUND_TOPIC},
                {"id": _INBOUND_RULE, "type": "inbound", "source": INBOUND_TOPIC, "target": "devices"},
            ],
        }
        self.mosquitto: RunningMosquitto | None = None
        self._child: Child | None = None

    async def use_mosquitto(self, say: Say) -> None:
        """Run beside a Mosquitto with the hook, not in amqtt.

        Raises:
            PrerequisiteError: this machine has no Mosquitto, or no hook and nothing to build it with.
        """
        directory = self.config_file.parent / "mosquitto"
        program, hook = await find_hook(directory / "hook", say)
        self.mosquitto = RunningMosquitto(directory, program=program, hook=hook, port=self.mqtt_port)
        del self._config["mqtt"]
        self._config["spool"] = {"path": str(self.mosquitto.spool)}
        self._config["host"] = {
            "url": f"mqtt://127.0.0.1:{self.mqtt_port}",
            "token": f"file://{self.mosquitto.token_file}",
        }

    async def start(self, say: Say) -> None:
        """Start it and wait until every rule is up.

        Raises:
            BridgeFailedError: it ended, or is not ready after a minute.
        """
        self.config_file.write_text(yaml.safe_dump(self._config, sort_keys=False))
        if self.mosquitto is not None:
            self.mosquitto.start(say)
        command = "run" if self.mosquitto is None else "sidecar"
        say(f"starting the bridge: mq2mqtt {command} -c {self.config_file}")
        self.log_file.write_bytes(b"")
        self._child = Child(
            [sys.executable, "-m", "mq2mqtt", command, "-c", str(self.config_file)],
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
        """Raise `BridgeFailedError` if it, or Mosquitto, has ended."""
        if self.mosquitto is not None and (words := self.mosquitto.last_words) is not None:
            raise BridgeFailedError(f"Mosquitto ended with {words}")
        if self._child is not None and (words := self._child.last_words) is not None:
            raise BridgeFailedError(f"the bridge ended with {words}")

    async def stop(self) -> None:
        """Stop it, then Mosquitto, as a service manager does (SIGTERM) and wait. Idempotent."""
        if self._child is not None:
            await asyncio.to_thread(self._child.terminate, _STOP_DEADLINE)
        if self.mosquitto is not None:
            await asyncio.to_thread(self.mosquitto.stop)

    async def _readiness(self, http: aiohttp.ClientSession) -> str | None:
        """Return `None` when ready, else why not."""
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with http.get(f"{self.admin_url}/readyz") as answer:
                if answer.status == 200:  # noqa: PLR2004 - HTTP
                    return None
                rules = (await answer.json())["rules"]
                return "; ".join(f"rule {rule['id']}: {rule['reason']}" for rule in rules if rule["reason"])
        return "it does not answer"
