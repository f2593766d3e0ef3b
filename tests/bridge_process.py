"""`mq2mqtt run` as a process of its own, for tests that look at it as a user does."""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from mq2mqtt.quickstart.ports import free_ports

_START_SECONDS = 90.0
_LISTEN = "0A"  # a socket's state in /proc/net/tcp


class BridgeProcess:
    """A broker with the bridge in it. `config` is changed by the test before `start`."""

    def __init__(self, directory: Path, *, namesrv: str, rules: list[dict[str, Any]]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.mqtt_port, admin_port = free_ports(2)
        self.admin_url = f"http://127.0.0.1:{admin_port}"
        self.config: dict[str, Any] = {
            "node": "test",
            "rocketmq": {"namesrv": namesrv},
            "spool": {"path": "spool"},
            "admin": {"listen": f"127.0.0.1:{admin_port}"},
            "mqtt": {"listen": f"127.0.0.1:{self.mqtt_port}"},
            "rules": rules,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self._program = ["-m", "mq2mqtt"]

    @property
    def config_file(self) -> Path:
        return self.directory / "mq2mqtt.yaml"

    @property
    def log_file(self) -> Path:
        return self.directory / "bridge.log"

    def write_config(self) -> None:
        self.config_file.write_text(yaml.safe_dump(self.config, sort_keys=False))

    def start(self, *, ready: bool = True) -> None:
        """Start it and wait until devices can connect; with `ready` also until `/readyz` says so."""
        try:
            self.launch()
            self.wait_started(ready=ready)
        except BaseException:
            self.kill()
            raise

    def wait_started(self, *, ready: bool = True) -> None:
        """Wait until devices can connect to what `launch` started; with `ready` also until `/readyz` says so."""
        wait_for(lambda: self._answers(ready=ready), seconds=_START_SECONDS, what=self.describe)

    def launch(self) -> None:
        """Start it and wait for nothing."""
        self.write_config()
        with self.log_file.open("ab") as log:
            self.process = start_process(self.command_line(), log)

    def command_line(self) -> list[str]:
        return self._command_line("run")

    def _command_line(self, command: str) -> list[str]:
        return [sys.executable, *self._program, command, "-c", str(self.config_file)]

    def watch_loop(self) -> Path:
        """Note from the next start on when the event loop stands still; return where (`tests.watched_loop.pauses`)."""
        notes = self.directory / "pauses"
        self._program = ["-P", str(Path(__file__).with_name("watched_loop.py")), str(notes)]
        return notes

    def reload(self, *, text: str | None = None, outcome: str = "applied") -> None:
        """Write the configuration as it is now, or `text`, and return when reading it has had this outcome."""
        before = self.metric("mq2mqtt_reload_total", outcome=outcome)
        if text is None:
            self.write_config()
        else:
            self.config_file.write_text(text)
        self.ask_for_reload()
        wait_for(lambda: self.metric("mq2mqtt_reload_total", outcome=outcome) > before, what=self.describe_reload)

    def ask_for_reload(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def describe_reload(self) -> str:
        return f"the bridge has not reloaded as it should\n{self.log()}"

    def _answers(self, *, ready: bool) -> bool:
        assert self.process is not None
        code = self.process.poll()
        assert code is None, f"the bridge ended with {code}:\n{self.log()}"
        try:
            status, _ = self.get("/readyz" if ready else "/healthz")
        except OSError:
            return False
        return status == 200 and self._listens()

    def _listens(self) -> bool:
        return listens(self.mqtt_port)  # the admin port answers first

    def describe(self) -> str:
        return f"the bridge is not ready\n{self.log()}"

    def log(self) -> str:
        return self.log_file.read_text()[-8000:]

    def get(self, path: str, *, seconds: float = 20.0) -> tuple[int, str]:
        try:
            url = self.admin_url + path
            with urllib.request.urlopen(url, timeout=seconds) as response:  # noqa: S310 - our own http URL
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def readiness(self) -> dict[str, dict[str, Any]]:
        """The rules of `/readyz` by id."""
        return {rule["id"]: rule for rule in json.loads(self.get("/readyz")[1])["rules"]}

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of `name` that have `labels`."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    @property
    def resident_bytes(self) -> int:
        """Memory that the process occupies now."""
        assert self.process is not None
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another `mq2mqtt` command on the same configuration."""
        command = [sys.executable, "-m", "mq2mqtt", *arguments, "-c", str(self.config_file)]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)

    def kill(self) -> None:
        """`kill -9`."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def start_process(command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a program that writes to `log` and ends with the tests, whatever becomes of the one that started it."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    atexit.register(process.kill)
    return process


def listens(port: int) -> bool:
    """Whether a program listens; a connection just to try would look like a device that gives up."""
    sockets = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines())
    return any(fields[1].endswith(f":{port:04X}") and fields[3] == _LISTEN for fields in sockets)


def wait_for(condition: Any, *, seconds: float = 60.0, what: Any = "the condition") -> None:  # noqa: ANN401
    """Wait until `condition()` is true; fail with `what` (a text, or a function that makes one)."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.05)
