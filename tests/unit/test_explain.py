from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt import settings
from mq2mqtt.explain import StoredMessage, explain_client, explain_publish, explain_stored
from mq2mqtt.host.memory import MemoryHost
from mq2mqtt.intake import BridgeIntake
from mq2mqtt.message import MqttMessage
from mq2mqtt.presence import Presence
from mq2mqtt.settings import Settings
from mq2mqtt.telemetry import Telemetry

RULES = [
    {"id": "out", "type": "outbound", "source": "sensors", "target": "mq_sensors"},
    {"id": "off", "type": "outbound", "source": "lights", "target": "mq_lights", "enabled": False},
    {"id": "inb", "type": "inbound", "source": "mq_commands", "target": "devices"},
    {"id": "inb-all", "type": "inbound", "source": "mq_commands", "target": "copies", "tags": "*"},
    {"id": "presence", "type": "status", "source": "GID_dev", "target": "mq_status"},
    {"id": "presence-off", "type": "status", "source": "GID_old", "target": "mq_status", "enabled": False},
    {"id": "inb-off", "type": "inbound", "source": "mq_old", "target": "old", "enabled": False},
]


def load(directory: Path, **more: object) -> Settings:
    path = directory / "mq2mqtt.yaml"
    path.write_text(yaml.safe_dump({"node": "n1", "rules": RULES, **more}))
    return settings.load(path)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return load(tmp_path_factory.mktemp("explain"))


def published(
    loaded: Settings, capsys: pytest.CaptureFixture[str], topic: str, payload: bytes = b"21.5"
) -> tuple[int, str]:
    message = MqttMessage(topic, payload, 2, client_id="GID_dev@@@1", clean_session=False)
    return explain_publish(loaded, message), capsys.readouterr().out


def stored(
    loaded: Settings, capsys: pytest.CaptureFixture[str], topic: str, **properties: str
) -> tuple[int, list[str]]:
    code = explain_stored(loaded, StoredMessage(topic, b"on", properties))
    return code, [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_a_publish_shows_the_message_that_would_be_sent(loaded: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = published(loaded, capsys, "sensors/kitchen/t")
    assert code == 0
    for line in (
        "rule out sends it to RocketMQ:",
        "topic mq_sensors",
        "TAGS = MQTT_COMMON",
        "KEYS = n1:out:0",
        "qoslevel = 2",
        "cleansessionflag = false",
        "mq2mqttNode = n1",
        "mqttSecondTopic = /kitchen/t",
        "clientId = GID_dev@@@1",
        "body b'21.5'",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("topic", "why"),
    [
        ("other/x", "no rule has the parent topic 'other' (copies, devices, lights, old, sensors)"),
        ("Sensors/x", "MQTT topics are case-sensitive: sensors"),
        ("$SYS/x", "the topic begins with $: it is the broker's own, the broker closes the connection"),
        ("$SYS/+", "the topic begins with $: it is the broker's own, the broker closes the connection"),
        ("$SYS/enableOrderMsg", "acknowledged and ignored"),
        ("$SYS/getOfflineMsg", "acknowledged and ignored"),
        ("sensors/+", "contains the wildcard +"),
        ("lights/x", "rule off is disabled"),
        ("devices/x", "'devices' is the target of inbound rules only"),
    ],
)
def test_a_publish_that_no_rule_takes_says_why(
    loaded: Settings, capsys: pytest.CaptureFixture[str], topic: str, why: str
) -> None:
    code, text = published(loaded, capsys, topic)
    assert code == 1
    assert why in text


def test_a_p2p_publish_names_its_one_receiver(loaded: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = published(loaded, capsys, "devices/p2p/GID_dev@@@2")
    assert code == 0
    assert "goes to client 'GID_dev@@@2' alone" in text
    assert "not sent to RocketMQ" in text


def test_a_publish_that_cannot_be_sent_says_that_it_is_parked(
    loaded: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = published(loaded, capsys, "sensors/x", b"x" * (4 * 1024 * 1024 + 1))
    assert code == 1
    assert "parked: payload of 4194305 bytes" in text


def test_limits_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limited = load(tmp_path, limits={"topic_chars": 10, "payload_bytes": 3})
    assert "limits.topic_chars is 10" in published(limited, capsys, "sensors/kitchen")[1]
    assert "limits.payload_bytes is 3" in published(limited, capsys, "sensors/x")[1]


@given(
    topic=st.lists(st.sampled_from(["sensors", "lights", "devices", "p2p", "$SYS", "x", "", "+"]), max_size=4).map(
        "/".join
    )
)
def test_it_agrees_with_what_the_bridge_does(loaded: Settings, topic: str) -> None:
    host, telemetry = MemoryHost(), Telemetry()
    intake = BridgeIntake(
        rules=loaded.rule_set, lanes={}, limits=loaded.limits, host=host, presence=Presence(), telemetry=telemetry
    )
    assert (explain_publish(loaded, MqttMessage(topic, b"x")) == 0) == (intake.route(topic) is not None)


def test_a_stored_message_shows_what_devices_get(loaded: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = stored(loaded, capsys, "mq_commands", TAGS="MQ2MQTT", mqttSecondTopic="lamp", qoslevel="9")
    assert code == 0
    assert "rule inb ignores qoslevel: 9 is not in the contract" in lines
    assert "rule inb publishes to the subscribers of 'devices/lamp':" in lines
    assert "topic 'devices/lamp', QoS 1, clean session, payload b'on'" in lines
    assert "rule inb-all publishes to the subscribers of 'copies/lamp':" in lines


def test_a_stored_p2p_message_names_the_client(loaded: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    properties = {"TAGS": "MQ2MQTT", "mqttSecondTopic": "/p2p/GID_dev@@@1", "mqttRealTopic": "lamp"}
    code, lines = stored(loaded, capsys, "mq_commands", **properties)
    assert code == 0
    assert "rule inb publishes to client 'GID_dev@@@1' alone (P2P):" in lines
    assert "topic 'devices/lamp', QoS 1, clean session, payload b'on'" in lines


def test_a_stored_message_that_is_skipped_or_parked_says_why(
    loaded: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines = stored(loaded, capsys, "mq_commands", mqttSecondTopic="a/+")
    assert "rule inb skips it: it has no tag (property TAGS), the rule takes MQ2MQTT" in lines
    assert "rule inb-all parks it: topic contains the wildcard +" in lines
    _, lines = stored(loaded, capsys, "mq_commands", TAGS="other", mq2mqttNode="n2")
    assert "rule inb skips it: its tag is 'other', the rule takes MQ2MQTT" in lines
    assert any(line.startswith("rule inb-all skips it: a bridge sent it") for line in lines)
    code, lines = stored(loaded, capsys, "mq_old", TAGS="MQ2MQTT")
    assert (code, lines[-1]) == (1, "rule inb-off skips it: it is disabled")
    code, lines = stored(loaded, capsys, "mq_none")
    assert (code, lines[-1]) == (1, "no inbound rule has this source (sources: mq_commands, mq_old)")


def test_a_client_that_connects_shows_what_rocketmq_is_told(
    loaded: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain_client(loaded, "GID_dev@@@1") == 0
    text = capsys.readouterr().out
    for line in (
        "rule presence tells RocketMQ",
        "topic mq_status",
        "TAGS = connect",
        "KEYS = n1:presence:0",
        "mq2mqttNode = n1",
        '"clientId":"GID_dev@@@1"',
        '"eventType":"connect"',
    ):
        assert line in text


@pytest.mark.parametrize(
    ("client_id", "reason"),
    [
        ("plain", "its id is not <GroupID>@@@<DeviceID>"),
        ("GID_old@@@1", "rule presence-off is disabled"),
        ("GID_new@@@1", "no status rule has the source 'GID_new' (GID_dev, GID_old)"),
    ],
)
def test_a_client_that_no_rule_tells_of(
    client_id: str, reason: str, loaded: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain_client(loaded, client_id) == 1
    assert f"not told: {reason}" in capsys.readouterr().out


def test_beside_a_plain_mqtt_client_nobody_is_told_of(loaded: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    host = loaded.host.model_copy(update={"type": "mqtt"})
    assert explain_client(loaded.model_copy(update={"host": host}), "GID_dev@@@1") == 1
    assert "not told: a plain MQTT client cannot see who is connected" in capsys.readouterr().out
