"""A real Mosquitto with the hook, for tests."""

import atexit
import fcntl
import functools
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from mq2mqtt.quickstart.ports import free_port
from tests.bridge_process import listens, start_process, wait_for

_ROOT = Path(__file__).parents[1]
_HOOK = _ROOT / "plugins" / "mosquitto_hook"
_START_SECONDS = 90.0
_STOP_SECONDS = 60.0

TOKEN = "a token of the tests"  # noqa: S105 - of brokers on 127.0.0.1 that live for a test


@functools.cache
def mosquitto_program() -> str:
    """Find the broker: `MOSQUITTO` in the environment names another one. Skips the test (in CI: fails it) without."""
    # Debian has it where only root looks.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
    return os.environ.get("MOSQUITTO") or shutil.which("mosquitto", path=path) or _not_here("there is no mosquitto")


@functools.cache
def hook_library() -> Path:
    """Build the hook, once for all tests of this run. Skips the test (in CI: fails it) where that is not possible."""
    build = _HOOK / "build"
    build.mkdir(exist_ok=True)
    # Two runs at once would write over each other; and what brokers have loaded must stay as it is.
    with (build / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = subprocess.run(["make", "-s", "-C", str(_HOOK)], check=False, capture_output=True, text=True)
        if made.returncode != 0:
            _not_here(f"the hook cannot be built: {made.stderr}")
        own = tempfile.mkdtemp(prefix="mq2mqtt-hook-")
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        return Path(shutil.copy(build / "mq2mqtt_hook.so", own))


def _not_here(problem: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(problem, pytrace=False)
    pytest.skip(problem)


class Mosquitto:
    """A broker with the hook. `options` are more lines of its configuration."""

    log_types: tuple[str, ...] = ("all",)
    """What it logs. `all` is a line for each packet."""
    policy = "allow"
    """`defer` where files of Mosquitto's decide who may connect, publish and subscribe."""

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
        config = self.directory / "mosquitto.conf"
        lines = [
            "per_listener_settings false",
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous true",
            "set_tcp_nodelay true",
            # By default Mosquitto drops what is QoS 1 or 2 and beyond 1000 messages for one client.
            "max_queued_messages 1000000",
            "max_queued_bytes 67108864",
            # As 2.0 has them by default; 2.1 has others.
            "max_packet_size 16777216",
            "allow_duplicate_messages false",
            "user root",
            *(f"log_type {name}" for name in self.log_types),
            "log_dest stderr",
            *self.hook_lines(),
            *self.options,
        ]
        config.write_text("\n".join(lines) + "\n")
        with self.log_file.open("ab") as log:
            self.process = start_process([mosquitto_program(), "-c", str(config)], log)

    def hook_lines(self) -> list[str]:
        """Return the lines of the configuration that load the hook."""
        token = self.directory / "token"
        token.write_text(TOKEN + "\n")
        self.spool.mkdir(parents=True, exist_ok=True)
        return [
            f"plugin {hook_library()}",
            f"plugin_opt_spool {self.spool}",
            f"plugin_opt_token_file {token}",
            f"plugin_opt_auth {self.policy}",
            f"plugin_opt_acl {self.policy}",
        ]

    def start(self) -> None:
        """Start it and wait until clients can connect."""
        try:
            self.launch()
            wait_for(self.listens, seconds=_START_SECONDS, what=lambda: f"mosquitto does not listen\n{self.log()}")
        except BaseException:
            self.kill()
            raise

    def listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"mosquitto ended:\n{self.log()}"
        return listens(self.port)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")[-8000:]

    def kill(self) -> None:
        """`kill -9`."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        process = self.process
        assert process is not None

        def ended() -> bool:
            # Again and again: Mosquitto forgets one that comes before its loop.
            process.send_signal(signal.SIGTERM)
            return process.poll() is not None

        wait_for(ended, seconds=_STOP_SECONDS, what=self.log)
        return process.wait()
