"""A real Mosquitto with the hook, for tests."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from mq2mqtt.quickstart.ports import free_port
from tests.bridge_process import wait_for

_ROOT = Path(__file__).parents[1]
_HOOK = _ROOT / "plugins" / "mosquitto_hook"
_START_SECONDS = 30.0

TOKEN = "a token of the tests"  # noqa: S105 - of brokers on 127.0.0.1 that live for a test


def hook_library() -> Path:
    """Build the hook; return its file. Skips the test (in CI: fails it) where that is not possible.

    `MQ2MQTT_HOOK` names one that is built already.
    """
    if given := os.environ.get("MQ2MQTT_HOOK"):
        return Path(given)
    problem = None
    if shutil.which("mosquitto") is None:
        problem = "there is no mosquitto"
    elif not _HOOK.is_dir():
        problem = f"there is no {_HOOK}"
    else:
        made = subprocess.run(["make", "-s", "-C", str(_HOOK)], check=False, capture_output=True, text=True)
        if made.returncode == 0:
            return _HOOK / "build" / "mq2mqtt_hook.so"
        problem = f"the hook cannot be built: {made.stderr}"
    if os.environ.get("CI") == "true":
        pytest.fail(problem, pytrace=False)
    pytest.skip(problem)


class Mosquitto:
    """A broker with the hook. `options` are more lines of its configuration."""

    def __init__(self, directory: Path, *, spool: Path, port: int | None = None, options: tuple[str, ...] = ()) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.spool = spool
        self.port = port or free_port()
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    @property
    def log_file(self) -> Path:
        return self.directory / "mosquitto.log"

    def launch(self) -> None:
        """Start it and wait for nothing."""
        token, config = self.directory / "token", self.directory / "mosquitto.conf"
        token.write_text(TOKEN + "\n")
        self.spool.mkdir(parents=True, exist_ok=True)
        lines = [
            "per_listener_settings false",
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous true",
            "set_tcp_nodelay true",
            # By default Mosquitto drops what is QoS 1 or 2 and beyond 1000 messages for one client.
            "max_queued_messages 0",
            "max_queued_bytes 67108864",
            "user root",
            "log_type all",
            "log_dest stderr",
            f"plugin {hook_library()}",
            f"plugin_opt_spool {self.spool}",
            f"plugin_opt_token_file {token}",
            "plugin_opt_auth allow",
            "plugin_opt_acl allow",
            *self.options,
        ]
        config.write_text("\n".join(lines) + "\n")
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                ["mosquitto", "-c", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def start(self) -> None:
        """Start it and wait until clients can connect."""
        self.launch()
        wait_for(self.listens, seconds=_START_SECONDS, what=lambda: f"mosquitto does not listen\n{self.log()}")

    def listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"mosquitto ended:\n{self.log()}"
        sockets = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines())
        return any(fields[1].endswith(f":{self.port:04X}") and fields[3] == "0A" for fields in sockets)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")[-8000:]

    def kill(self) -> None:
        """`kill -9`."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)
