"""`deploy/compose.yaml` on a real engine: both ways from outside, through deaths of its containers, and away again."""

import json
from collections.abc import Iterator

import pytest
import yaml

from tests.bridge_process import wait_for
from tests.device import Device
from tests.docker.stack import Stack
from tests.docker.watched import Watched
from tests.rocket_peer import RocketPeer, wait_for_messages

# Bringing it up may build an image, and counts as the first test's time.
pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

DEPLOYMENT = {"file": "compose.yaml", "config": "config"}

KILL_THE_BRIDGE = "import os, signal; os.kill(int(open('/proc/1/task/1/children').read().split()[0]), signal.SIGKILL)"
"""Run in its container: the program below `init` dies, as of a crash."""

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


@pytest.mark.parametrize(
    ("variables", "allowed"),
    [
        ({}, ""),
        ({"MQTT_ADDRESS": "192.0.2.7"}, "false"),
        ({"MQTT_ADDRESS": "192.0.2.7", "ALLOW_ANONYMOUS": "true"}, "true"),
    ],
)
def test_who_publishes_mqtt_to_other_machines_lets_nobody_in_without_saying_so(
    stack: Stack, variables: dict[str, str], allowed: str
) -> None:
    bridge = json.loads(stack.compose("config", "--format", "json", **variables))["services"]["bridge"]
    assert bridge["environment"]["MQ2MQTT_MQTT__ALLOW_ANONYMOUS"] == allowed
    (port,) = (port["host_ip"] for port in bridge["ports"] if port["target"] == 1883)
    assert port == variables.get("MQTT_ADDRESS", "127.0.0.1")


def test_the_bridge_runs_without_privileges_and_is_healthy(stack: Stack) -> None:
    container = stack.container("bridge")
    wait_for(lambda: stack.container("bridge").health == "healthy", seconds=60, what="the health check fails")
    assert container.exec_run(["id", "-u"]).output.strip() == b"10001"
    assert container.exec_run(["touch", "/opt/mq2mqtt/x"]).exit_code != 0
    published = [binding["HostIp"] for bindings in container.ports.values() for binding in bindings]
    assert set(published) == {"127.0.0.1"}


def test_prometheus_has_the_rules_of_the_bridge_and_the_alerts(stack: Stack) -> None:
    def rules_up() -> dict[str, float]:
        return {labels["rule"]: value for labels, value in stack.asked_of_prometheus("mq2mqtt_rule_up")}

    wait_for(lambda: rules_up() == {"telemetry-out": 1, "commands-in": 1}, seconds=60, what=lambda: str(rules_up()))
    limits = stack.asked_of_prometheus("mq2mqtt_lane_limit_bytes")
    assert {labels["rule"]: value for labels, value in limits} == {".p2p": 2**30, "telemetry-out": 2**30}
    wait_for(
        lambda: {alert["health"] for alert in stack.alerts_of_prometheus().values()} == {"ok"},
        seconds=60,
        what=lambda: str(stack.alerts_of_prometheus()),
    )
    assert "Mq2mqttRuleDown" in stack.alerts_of_prometheus()


def test_nothing_is_missing_after_the_broker_was_killed_and_the_bridge_stopped_meanwhile(
    stack: Stack, peer: RocketPeer
) -> None:
    with peer.collect("mq_sensors") as messages:
        watched = Watched(stack, "broker-killed", messages)
        broker, bridge = stack.container("broker"), stack.container("bridge")
        broker.kill()
        before = len(watched.stream.acknowledged)
        wait_for(
            lambda: stack.asked_of_prometheus('mq2mqtt_rule_up{rule="telemetry-out"} == 0'),
            seconds=60,
            what="Prometheus does not see the rule down",
        )
        wait_for(lambda: len(watched.stream.acknowledged) > before + 200, what="devices are held up")
        # It goes with what waits for RocketMQ in its lane, and comes back with it.
        bridge.stop(timeout=15)
        # 137 if it had to be killed.
        assert stack.container("bridge").attrs["State"]["ExitCode"] == 0
        broker.start()
        bridge.start()
        stack.wait_ready()
        watched.assert_nothing_is_missing()


def test_nothing_is_missing_after_the_bridge_crashed_and_the_engine_restarted_it(
    stack: Stack, peer: RocketPeer
) -> None:
    # Operators reload; the engine must not take it for a stop.
    stack.compose("exec", "bridge", *RELOAD)
    with peer.collect("mq_sensors") as messages:
        watched = Watched(stack, "bridge-crashed", messages)
        container = stack.container("bridge")
        started = container.attrs["State"]["StartedAt"]
        container.exec_run(["python", "-c", KILL_THE_BRIDGE])
        wait_for(lambda: stack.container("bridge").attrs["State"]["StartedAt"] != started, what="it is not restarted")
        stack.wait_ready()
        watched.assert_nothing_is_missing()


def test_a_rule_is_added_while_it_runs(stack: Stack, peer: RocketPeer) -> None:
    started = stack.container("bridge").attrs["State"]["StartedAt"]
    config = yaml.safe_load(stack.config_file.read_text())
    config["rules"].append({"id": "alarms-out", "type": "outbound", "source": "alarms", "target": "mq_alarms"})
    # As editors do.
    changed = stack.config_file.with_suffix(".new")
    changed.write_text(yaml.safe_dump(config))
    changed.replace(stack.config_file)
    stack.compose("run", "--rm", "topics")
    stack.compose("exec", "bridge", *RELOAD)
    wait_for(lambda: "alarms-out" in stack.rules_up(), seconds=60, what="the rule is not there")
    with Device(stack.mqtt_port, "GID_dev@@@3") as device, peer.collect("mq_alarms") as messages:
        device.publish("alarms/fire", b"!", qos=1)
        wait_for_messages(messages, 1)
    assert stack.container("bridge").attrs["State"]["StartedAt"] == started


def test_it_goes_away_with_all_it_had(stack: Stack) -> None:
    stack.down()
    assert stack.leftovers() == []
