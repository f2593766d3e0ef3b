"""TLS between the bridge and a RocketMQ that takes nothing else and asks for a certificate, all of one authority."""

import asyncio
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mq2mqtt.quickstart.cluster import Access
from mq2mqtt.quickstart.rocketmq import RocketMQ
from mq2mqtt.settings import TlsSettings, tls_context
from tests.bridge_process import BridgeProcess, wait_for
from tests.certificates import Authority, Certificate
from tests.conftest import run_on_jvm
from tests.device import Device
from tests.rocket_peer import RocketPeer, wait_for_messages
from tests.waiting import PATIENCE

pytestmark = pytest.mark.e2e


class Secured(NamedTuple):
    """A RocketMQ, whom to trust about it, and what to show it."""

    server: RocketMQ
    authority: Authority
    own: Certificate
    tls: ssl.SSLContext

    def settings(self, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - as YAML has them
        """What `rocketmq.tls` needs, with `changes`."""
        files = {"ca_file": self.authority.ca, "cert_file": self.own.certificate, "key_file": self.own.key}
        return {name: str(file) for name, file in files.items()} | changes


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, say: Callable[[str], None]) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("secured")
    authority = Authority(directory / "authority")
    theirs, own = authority.issue("rocketmq"), authority.issue("bridge")
    tls = tls_context(TlsSettings(ca_file=authority.ca, cert_file=own.certificate, key_file=own.key))
    assert isinstance(tls, ssl.SSLContext)
    properties = {
        "tls.server.mode": "enforcing",
        "tls.test.mode.enable": "false",
        "tls.server.certPath": theirs.certificate,
        "tls.server.keyPath": theirs.key,
        "tls.server.need.client.auth": "require",
        "tls.server.authClient": "true",
        "tls.server.trustCertPath": authority.ca,
        # The broker is the name server's client.
        "tls.enable": "true",
        "tls.client.authServer": "true",
        "tls.client.trustCertPath": authority.ca,
        "tls.client.certPath": theirs.certificate,
        "tls.client.keyPath": theirs.key,
    }
    start = run_on_jvm(
        directory / "rocketmq",
        say=say,
        version="5.3.3",
        java_properties={name: str(value) for name, value in properties.items()},
        access=Access(tls=tls),
    )
    server = asyncio.run(start)
    for topic in ("mq_out", "mq_in"):
        asyncio.run(server.create_topic(topic))
    yield Secured(server, authority, own, tls)
    server.kill()


@pytest.fixture
def bridge(secured: Secured, tmp_path: Path) -> Iterator[BridgeProcess]:
    rules = [
        {"id": "tls-out", "type": "outbound", "source": "sensors", "target": "mq_out"},
        {"id": "tls-in", "type": "inbound", "source": "mq_in", "target": "devices"},
    ]
    # What RocketMQ asks for does not depend on the MQTT broker: one kind is enough.
    bridge = BridgeProcess(tmp_path / "bridge", namesrv=secured.server.namesrv, rules=rules)
    yield bridge
    bridge.kill()


def test_messages_go_both_ways_over_tls(secured: Secured, bridge: BridgeProcess) -> None:
    bridge.config["rocketmq"]["tls"] = secured.settings()
    bridge.start()
    checked = bridge.command("check")
    assert (checked.returncode, checked.stderr) == (0, "")
    with RocketPeer(secured.server.namesrv, tls=secured.tls) as peer, peer.collect("mq_out") as messages:
        with Device(bridge.mqtt_port, "dev") as device:
            device.publish("sensors/x", bytes(100_000), qos=1)
            device.subscribe("devices/#", qos=1)
            peer.send("mq_in", bytes(100_000))
            wait_for_messages(device.received, 1)
        wait_for_messages(messages, 1)
    assert {device.received[0].payload, messages[0].body} == {bytes(100_000)}
    assert bridge.stop() == 0


def test_a_name_that_is_not_in_the_certificate_can_be_let_pass(secured: Secured, bridge: BridgeProcess) -> None:
    port = secured.server.namesrv.rpartition(":")[2]
    bridge.config["rocketmq"] = {"namesrv": f"localhost:{port}", "tls": secured.settings()}
    _expect_problem(bridge, "its certificate is not accepted: Hostname mismatch")
    bridge.config["rocketmq"]["tls"]["check_hostname"] = False
    bridge.write_config()
    assert bridge.command("check").returncode == 0


def test_an_unknown_authority_is_one_clear_line_and_the_rules_are_down_for_that_reason(
    secured: Secured, bridge: BridgeProcess, tmp_path: Path
) -> None:
    another = Authority(tmp_path / "another")
    bridge.config["rocketmq"]["tls"] = secured.settings(ca_file=str(another.ca))
    _expect_problem(bridge, "its certificate is not accepted: ")
    bridge.start(ready=False)
    words = "its certificate is not accepted: "
    for rule in ("tls-out", "tls-in"):
        wait_for(
            lambda: words in str(bridge.readiness()[rule]["reason"]),  # noqa: B023 - evaluated in this turn
            seconds=5 * PATIENCE,
            what=lambda: f"{bridge.readiness()}",
        )
    assert bridge.stop() == 0


def test_what_the_server_or_the_bridge_does_not_take_is_one_clear_line(secured: Secured, bridge: BridgeProcess) -> None:
    for tls, words in (
        (False, "closed by the peer without an answer; does it want TLS?"),
        (True, "its certificate is not accepted: "),
        ({"ca_file": str(secured.authority.ca)}, "certificate required"),
    ):
        bridge.config["rocketmq"]["tls"] = tls
        _expect_problem(bridge, words)


def test_a_file_that_is_not_there_is_one_clear_line_before_anything_starts(bridge: BridgeProcess) -> None:
    bridge.config["rocketmq"]["tls"] = {"ca_file": "nowhere.pem"}
    bridge.write_config()
    for command in ("check", "run"):
        done = bridge.command(command)
        file = bridge.directory / "nowhere.pem"
        assert done.returncode == 2
        assert done.stderr == f"mq2mqtt: rocketmq.tls.ca_file: {file} cannot be read: No such file or directory\n"


def _expect_problem(bridge: BridgeProcess, words: str) -> None:
    bridge.write_config()
    checked = bridge.command("check")
    assert (checked.returncode, checked.stderr) == (1, "")
    (problem,) = [line for line in checked.stdout.splitlines() if line.startswith("PROBLEM")]
    assert words in problem
