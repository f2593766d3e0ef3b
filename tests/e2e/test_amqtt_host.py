"""The plugin as its users load it: the stock `amqtt` command as a process, paho-mqtt devices, TCP, WebSocket and TLS.

RocketMQ is not needed: what is acknowledged is in the lane, and the lane is what these tests look into.
"""

import asyncio
import contextlib
import queue
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
import yaml
from paho.mqtt.enums import CallbackAPIVersion

from mq2mqtt import settings
from mq2mqtt.errors import ConfigError
from mq2mqtt.quickstart.ports import free_ports
from mq2mqtt_amqtt.run import RunningBroker, run_broker
from tests.bridge_process import listens
from tests.mqtt_client import Client

pytestmark = pytest.mark.e2e

_SECONDS = 60.0
_ANONYMOUS = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
_COMMAND = Path(sys.executable).parent / "amqtt"


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def write_bridge_config(directory: Path, **changes: Any) -> Path:  # noqa: ANN401 - any section
    config = {
        "node": "test",
        "rocketmq": {"namesrv": "127.0.0.1:1"},
        "spool": {"path": "spool"},
        "admin": {"listen": "127.0.0.1:0"},
        "rules": [{"id": "out", "type": "outbound", "source": "sensors", "target": "mq_sensors"}],
        **changes,
    }
    path = directory / "mq2mqtt.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class AmqttCommand:
    """`amqtt -c amqtt.yaml` with the bridge's plugin, and a TCP and a WebSocket listener."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port, self.ws_port = free_ports(2)
        self.process: subprocess.Popen[bytes] | None = None
        self.config: dict[str, Any] = {
            "listeners": {
                "default": {"type": "tcp", "bind": f"127.0.0.1:{self.port}"},
                "web": {"type": "ws", "bind": f"127.0.0.1:{self.ws_port}"},
            },
            "plugins": {**_ANONYMOUS, "mq2mqtt_amqtt.BridgePlugin": {"config_file": "mq2mqtt.yaml"}},
        }

    def start(self) -> subprocess.Popen[bytes]:
        (self.directory / "amqtt.yaml").write_text(yaml.safe_dump(self.config))
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(_COMMAND), "-c", "amqtt.yaml"], cwd=self.directory, stdout=log, stderr=log
            )
        return self.process

    def wait_listening(self) -> None:
        assert self.process is not None
        process = self.process

        def listening() -> bool:
            assert process.poll() is None, self.log()
            return all(listens(port) for port in (self.port, self.ws_port))

        wait_for(listening, f"amqtt does not listen: {self.log()}")

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def lane(self) -> str:
        """What `mq2mqtt spool show` says of the lane."""
        command = [sys.executable, "-m", "mq2mqtt", "spool", "show", "out", "-c", "mq2mqtt.yaml", "-n", "10000"]
        return subprocess.run(command, cwd=self.directory, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def amqtt_command(tmp_path: Path) -> Iterator[AmqttCommand]:
    write_bridge_config(tmp_path)
    command = AmqttCommand(tmp_path)
    yield command
    if command.process is not None and command.process.poll() is None:
        command.process.kill()
        command.process.wait()


@contextlib.contextmanager
def paho_client(port: int, client_id: str, *, websocket: bool = False, tls: str | None = None) -> Iterator[paho.Client]:
    transport: Any = "websockets" if websocket else "tcp"
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id, transport=transport)
    if tls is not None:
        client.tls_set(tls, tls_version=ssl.PROTOCOL_TLS_CLIENT)
    connected = threading.Event()
    client.on_connect = lambda *_: connected.set()
    client.connect("127.0.0.1", port)
    client.loop_start()
    assert connected.wait(_SECONDS)
    yield client
    client.disconnect()
    client.loop_stop()


@pytest.mark.parametrize("websocket", [False, True])
def test_two_lines_in_amqtts_yaml_bridge_an_existing_broker(amqtt_command: AmqttCommand, *, websocket: bool) -> None:
    amqtt_command.start()
    amqtt_command.wait_listening()
    port = amqtt_command.ws_port if websocket else amqtt_command.port
    received: list[bytes] = []
    with paho_client(port, "reader", websocket=websocket) as reader:
        subscribed = threading.Event()
        reader.on_subscribe = lambda *_: subscribed.set()
        reader.on_message = lambda _client, _data, message: received.append(bytes(message.payload))
        reader.subscribe("sensors/#", 2)
        assert subscribed.wait(_SECONDS)
        with paho_client(port, "dev", websocket=websocket) as device:
            for number in range(300):
                info = device.publish("sensors/a", b"message %d" % number, qos=number % 3)
            info.wait_for_publish(_SECONDS)
        wait_for(lambda: len(received) == 300, "300 messages in the broker")
    assert amqtt_command.process is not None
    amqtt_command.process.kill()
    amqtt_command.process.wait()
    lane = amqtt_command.lane()
    assert all(f"payload b'message {number}'" in lane for number in range(300))


def test_the_amqtt_command_stops_with_the_bridge(amqtt_command: AmqttCommand) -> None:
    process = amqtt_command.start()
    amqtt_command.wait_listening()
    with paho_client(amqtt_command.port, "dev") as device:
        device.publish("sensors/a", b"x", qos=1).wait_for_publish(_SECONDS)
        process.send_signal(signal.SIGINT)
        assert process.wait(_SECONDS) == 0
    assert "bridge test stopped" in amqtt_command.log()
    assert "Traceback" not in amqtt_command.log()


def test_a_wrong_configuration_ends_the_amqtt_command_with_one_clear_line(amqtt_command: AmqttCommand) -> None:
    write_bridge_config(amqtt_command.directory, nodes="typo")
    assert amqtt_command.start().wait(_SECONDS) == 1
    assert "mq2mqtt: the bridge cannot start" in amqtt_command.log()
    assert "nodes" in amqtt_command.log()


def test_a_bridge_that_cannot_start_ends_the_amqtt_command(amqtt_command: AmqttCommand) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        write_bridge_config(amqtt_command.directory, admin={"listen": f"127.0.0.1:{port}"})
        assert amqtt_command.start().wait(_SECONDS) == 2
    assert "mq2mqtt: the bridge cannot start" in amqtt_command.log()
    assert str(port) in amqtt_command.log()


def load(directory: Path, mqtt: dict[str, Any]) -> settings.Settings:
    return settings.load(write_bridge_config(directory, mqtt=mqtt))


async def start(directory: Path, mqtt: dict[str, Any], **options: Any) -> tuple[RunningBroker, int]:  # noqa: ANN401
    broker = await run_broker(load(directory, {"listen": "127.0.0.1:0", **mqtt}), **options)
    return broker, int(broker.addresses[0].rpartition(":")[2])


async def test_run_lets_anybody_in_on_loopback_and_keeps_sessions(tmp_path: Path) -> None:
    broker, port = await start(tmp_path, {})
    client = await Client.connect(port, "dev", clean=False)
    await client.publish("sensors/a", b"x", qos=1)
    assert broker.host.is_online("dev")
    assert not broker.host._broker.sessions["dev"][0].is_anonymous  # noqa: SLF001
    await broker.stop()
    await client.wait_closed()
    await client.drop()


@pytest.mark.parametrize(
    ("mqtt", "code"),
    [
        ({"allow_anonymous": False}, 5),
        ({"listen": "0.0.0.0:0"}, 5),
        ({"listen": "0.0.0.0:0", "allow_anonymous": True}, 0),
        ({"amqtt": {"listeners": {"web": {"type": "ws", "bind": "0.0.0.0:0"}}}}, 5),
        ({"amqtt": {"plugins": {"tests.unit.amqtt.plugins.Gate": {}}}}, 5),
    ],
)
async def test_who_run_lets_in(tmp_path: Path, mqtt: dict[str, Any], code: int) -> None:
    broker, port = await start(tmp_path, mqtt)
    client = await Client.connect(port, "dev", code=code)
    await client.drop()
    await broker.stop()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
async def test_tls(tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key]
    names = ["-out", certificate, "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *names], check=True, capture_output=True)  # noqa: ASYNC221 - before anything runs
    listener = {"ssl": True, "certfile": certificate, "keyfile": key}
    broker, port = await start(tmp_path, {"amqtt": {"listeners": {"default": listener}}})
    large = bytes(1_000_000)
    received = await asyncio.to_thread(_echo, port, certificate, large)
    assert received == large
    silent = await Client.open(port)
    await broker.stop()
    await silent.drop()


def _echo(port: int, certificate: str, payload: bytes) -> bytes:
    received: queue.Queue[bytes] = queue.Queue()
    subscribed = threading.Event()
    with paho_client(port, "dev", tls=certificate) as device:
        device.on_subscribe = lambda *_: subscribed.set()
        device.on_message = lambda _client, _data, message: received.put(bytes(message.payload))
        device.subscribe("sensors/large", 2)
        assert subscribed.wait(_SECONDS)
        device.publish("sensors/large", payload, qos=2).wait_for_publish(_SECONDS)
        return received.get(timeout=_SECONDS)


async def test_listen_wins_over_the_settings_and_ipv6_works(tmp_path: Path) -> None:
    broker, port = await start(tmp_path, {"listen": "127.0.0.1:1"}, listen="[::1]:0")
    assert broker.addresses == [f"[::1]:{port}"]
    client = await Client.open(port, host="::1")
    await client.drop()
    await broker.stop()


async def test_a_port_in_use_is_one_clear_error_and_leaves_no_lock(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot start.*{port}.*in use"):
            await start(tmp_path, {"listen": f"127.0.0.1:{port}"})
    broker, _ = await start(tmp_path, {})
    await broker.stop()


@pytest.mark.parametrize(
    ("amqtt", "text"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"listeners": {"default": {"certfile": "x"}}}, "certfile"),
        ({"plugins": {"no.such.Plugin": {}}}, "no.such.Plugin"),
        ({"plugins": ["a"]}, "mapping"),
    ],
)
async def test_wrong_settings_of_amqtt_are_one_clear_error(tmp_path: Path, amqtt: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"mqtt.amqtt.*{text}"):
        await start(tmp_path, {"amqtt": amqtt})
    broker, _ = await start(tmp_path, {})
    await broker.stop()


async def test_an_admin_port_in_use_is_one_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        path = write_bridge_config(tmp_path, admin={"listen": listen}, mqtt={"listen": "127.0.0.1:0"})
        with pytest.raises(ConfigError, match=listen):
            await run_broker(settings.load(path))
