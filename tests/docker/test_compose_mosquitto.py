"""`deploy/compose.mosquitto.yaml` on a real engine: both ways from outside, through crashes, and away again."""

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest

from tests.bridge_process import wait_for
from tests.device import Device
from tests.docker.stack import Stack
from tests.docker.watched import Watched
from tests.rocket_peer import RocketPeer, wait_for_messages

# Bringing it up may build two images, and counts as the first test's time.
pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

DEPLOYMENT = {"file": "compose.mosquitto.yaml", "config": "config-mosquitto"}

CRASH = ["sh", "-c", "kill -9 $(cat /proc/1/task/1/children)"]
"""Run in a container: the program below `init` dies."""

RELOAD = ["sh", "-c", "kill -HUP 1"]
"""As `docs/operations.md` has it: `init` passes it on."""


@pytest.fixture
def peer(stack: Stack) -> Iterator[RocketPeer]:
    with RocketPeer(stack.namesrv) as peer:
        yield peer


def test_messages_go_both_ways_from_outside(stack: Stack, peer: RocketPeer) -> None:
    with Device(stack.mqtt_port, "GID_dev@@@1") as device, peer.collect("mq_sensors") as messages:
        device.subscribe("devices/#", qos=1)
        device.publish("sensors/room1/temp", b"21", qos=1)
        wait_for_messages(messages, 1)
        assert messages[0].body == b"21"
        assert messages[0].properties["clientId"] == "GID_dev@@@1"
        peer.send("mq_commands", b"on", mqttSecondTopic="/room1/set")
        wait_for_messages(device.received, 1)
        assert (device.received[0].topic, device.received[0].payload) == ("devices/room1/set", b"on")


def test_both_run_without_privileges_and_are_healthy(stack: Stack) -> None:
    for service in ("mosquitto", "bridge"):
        wait_for(
            lambda name=service: stack.container(name).health == "healthy", seconds=60, what=f"{service} is not well"
        )
        container = stack.container(service)
        assert container.exec_run(["id", "-u"]).output.strip() == b"10001"
        assert container.exec_run(["touch", "/usr/x"]).exit_code != 0
        published = [binding["HostIp"] for bindings in container.ports.values() for binding in bindings or ()]
        assert set(published) == {"127.0.0.1"}
    # What devices publish is for nobody else.
    listed = stack.container("mosquitto").exec_run(["stat", "-c", "%a %u", "/var/spool/mq2mqtt", "/run/mq2mqtt"])
    assert listed.output.split(b"\n")[:2] == [b"700 10001", b"700 10001"]


@pytest.mark.parametrize(
    ("variables", "allowed"),
    [
        ({}, "true"),
        ({"MQTT_ADDRESS": "192.0.2.7"}, "false"),
        ({"MQTT_ADDRESS": "192.0.2.7", "ALLOW_ANONYMOUS": "true"}, "true"),
    ],
)
def test_who_publishes_mqtt_to_other_machines_lets_nobody_in_without_saying_so(
    stack: Stack, variables: dict[str, str], allowed: str
) -> None:
    content = json.loads(stack.compose("config", "--format", "json", **variables))["configs"]["anonymous"]["content"]
    assert content.split()[-2:] == ["allow_anonymous", allowed]


def connack(port: int) -> int:
    """The broker's answer to a client without a name and a password, as soon as there is one."""
    answer = b""

    def answered() -> bool:
        nonlocal answer
        # The engine takes connections for a broker that does not listen yet, and closes them.
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01x")
            answer = connection.recv(4)
        return len(answer) == 4

    wait_for(answered, what="no CONNACK")
    return answer[3]


def test_where_devices_need_a_login_the_sidecar_needs_none(stack: Stack) -> None:
    stack.compose("up", "--detach", "mosquitto", ALLOW_ANONYMOUS="false")
    stack.wait_ready()
    assert connack(stack.mqtt_port) == 5
    stack.compose("up", "--detach", "mosquitto")
    stack.wait_ready()
    assert connack(stack.mqtt_port) == 0


def test_prometheus_watches_the_sidecar(stack: Stack) -> None:
    def rules_up() -> dict[str, float]:
        return {labels["rule"]: value for labels, value in stack.asked_of_prometheus("mq2mqtt_rule_up")}

    wait_for(lambda: rules_up() == {"telemetry-out": 1, "commands-in": 1}, seconds=60, what=lambda: str(rules_up()))


@pytest.mark.parametrize("services", [("bridge",), ("mosquitto",), ("mosquitto", "bridge")], ids="-and-".join)
def test_nothing_is_missing_after_a_crash_and_the_engine_restarted_it(
    stack: Stack, peer: RocketPeer, services: tuple[str, ...]
) -> None:
    with peer.collect("mq_sensors") as messages:
        watched = Watched(stack, f"crash-of-{'-'.join(services)}", messages)
        # Operators reload; the engine must not take it for a stop.
        stack.compose("exec", "bridge", *RELOAD)
        containers = [stack.container(service) for service in services]
        for container in containers:
            container.exec_run(CRASH)
        for service, container in zip(services, containers, strict=True):
            before = container.attrs["State"]["StartedAt"]
            wait_for(
                lambda name=service, was=before: stack.container(name).attrs["State"]["StartedAt"] != was,
                what=f"{service} is not restarted",
            )
        stack.wait_ready()
        watched.assert_nothing_is_missing()


def test_it_goes_away_with_all_it_had(stack: Stack) -> None:
    stack.down()
    assert stack.leftovers() == []
