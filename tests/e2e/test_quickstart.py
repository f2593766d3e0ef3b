"""`mq2mqtt quickstart` as a user runs it: its own RocketMQ, and the messages it shows."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mq2mqtt.quickstart.ports import is_free
from mq2mqtt.quickstart.rocketmq import DEFAULT_VERSION
from tests.bridge_process import wait_for
from tests.conftest import SharedRocketMQ
from tests.device import Device
from tests.mosquitto import hook_library

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

DEADLINE = 120.0


class Quickstart:
    def __init__(self, directory: Path, *options: str, docker: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._output = directory / "output.txt"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mq2mqtt", "quickstart", *options],
                cwd=directory,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # Nothing listens there: the JVM is what most tests look at, whatever the machine has.
                env=os.environ | ({} if docker else {"DOCKER_HOST": "tcp://127.0.0.1:1"}),
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_for_line(self, text: str) -> None:
        def shown() -> bool:
            assert self.process.poll() is None, self.output
            return text in self.output

        wait_for(shown, seconds=DEADLINE, what=lambda: f"no line with {text!r} in:\n{self.output}")


StartQuickstart = Callable[..., Quickstart]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartQuickstart]:
    started: list[Quickstart] = []

    def run(*options: str, docker: bool = False) -> Quickstart:
        started.append(Quickstart(tmp_path, *options, docker=docker))
        return started[-1]

    # Ports are fixed: the tests of another run on this machine take their turn.
    with Path(tempfile.gettempdir(), "mq2mqtt-test-quickstart").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield run
        for quickstart in started:
            quickstart.process.kill()
            quickstart.process.wait()


@pytest.mark.parametrize("options", [(), ("--mosquitto",)], ids=["amqtt", "mosquitto"])
def test_it_ends_after_the_round_trip_with_once(
    start: StartQuickstart, rocketmq: SharedRocketMQ, options: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    driver = request.config.getoption("--driver")
    if options:
        # Skips where Mosquitto, or what the hook is built with, is missing.
        hook_library()
    quickstart = start("--once", "--rocketmq", rocketmq.namesrv, "--driver", driver, *options)
    assert quickstart.process.wait(DEADLINE) == 0, quickstart.output
    output = quickstart.output
    assert f"\ndriver {driver}: " in output
    assert re.search(r"RocketMQ topic mq_sensors received .*celsius", output)
    assert re.search(r"mqttSecondTopic +/room1/temp", output)
    assert re.search(r"clientId +GID_dev@@@sensor-1", output)
    assert "received: devices/room1/set  qos 1" in output
    assert "received: devices/p2p/GID_dev@@@sensor-1  qos 1" in output
    assert "the round trip works, both ways" in output
    assert "Traceback" not in output


def test_its_own_rocketmq_stays_up_until_interrupted_and_keeps_its_messages(
    start: StartQuickstart, rocketmq: SharedRocketMQ
) -> None:
    # `rocketmq` sees to it that Java and the jars are there.
    assert rocketmq
    first = start()
    first.wait_for_line("stop         Ctrl-C")
    found = re.search(r"MQTT on 127\.0\.0\.1:(\d+)", first.output)
    assert found is not None
    with Device(int(found[1]), "GID_dev@@@me") as device:
        device.publish("sensors/hello", b"typed by the user", qos=1)
        first.wait_for_line("typed by the user")
    second = start("--once")
    assert second.process.wait(DEADLINE) == 2
    assert "another quickstart runs in" in second.output
    first.process.send_signal(signal.SIGINT)
    assert first.process.wait(DEADLINE) == 0, first.output
    assert "Traceback" not in first.output
    assert is_free(int(found[1]))
    third = start("--once")
    assert third.process.wait(DEADLINE) == 0, third.output
    # Offsets go on where the first run ended: its store was kept.
    assert re.search(r"received \(queue \d, offset [1-9]\d*\)", third.output)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("localhost", "write the name server as HOST:PORT"),
        ("127.0.0.1:{free_port}", "no name server of RocketMQ answers there"),
    ],
)
def test_a_wrong_address_is_one_line_and_exit_code_2(
    start: StartQuickstart, free_port: int, address: str, reason: str
) -> None:
    quickstart = start("--once", "--rocketmq", address.format(free_port=free_port))
    assert quickstart.process.wait(DEADLINE) == 2
    error = quickstart.output.strip().splitlines()[-1]
    assert error.startswith("mq2mqtt: --rocketmq ")
    assert reason in error
    assert "Traceback" not in quickstart.output


def test_with_a_docker_engine_rocketmq_runs_in_a_container_that_leaves_with_it(start: StartQuickstart) -> None:
    image = f"apache/rocketmq:{DEFAULT_VERSION}"
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "image", "inspect", image], check=False, capture_output=True).returncode != 0
    ):
        reason = f"no Docker engine here that has {image}"
        if os.environ.get("MQ2MQTT_REQUIRE_DOCKER") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    quickstart = start("--once", docker=True)
    # Two JVMs beside whatever else a CI machine does.
    assert quickstart.process.wait(2 * DEADLINE) == 0, quickstart.output
    found = re.search(r"container (mq2mqtt-quickstart-\w+)", quickstart.output)
    assert found is not None, quickstart.output
    assert "the round trip works, both ways" in quickstart.output
    left = subprocess.run(["docker", "ps", "--all", "--format={{.Names}}"], check=True, capture_output=True, text=True)
    assert found[1] not in left.stdout
