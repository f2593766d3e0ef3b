import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt import settings
from mq2mqtt.explain import StoredMessage, explain_client, explain_publish, explain_stored
from mq2mqtt.host import TopicRoute
from mq2mqtt.host.memory import MemoryHost
from mq2mqtt.intake import BridgeIntake
from mq2mqtt.mapping import to_rocketmq
from mq2mqtt.message import MqttMessage
from mq2mqtt.presence import Presence
from mq2mqtt.settings import HostSettings, Settings
from mq2mqtt.spool.frame import decode_frames, encode_publish
from mq2mqtt.telemetry import Telemetry
from mq2mqtt_mosquitto.client import Incoming, MqttClient
from mq2mqtt_mqtt.feed import Feed

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


def beside(loaded: Settings, host: str) -> Settings:
    """Return `loaded` for another broker."""
    return loaded.model_copy(update={name: HostSettings.model_validate(value) for name, value in HOSTS[host].items()})


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


HOSTS: dict[str, dict[str, object]] = {
    "amqtt": {},
    "mosquitto": {"host": {"type": "mosquitto"}},
    "mqtt": {"host": {"type": "mqtt"}},
}
some_topics = st.lists(
    st.sampled_from(["sensors", "lights", "devices", "p2p", "$SYS", "enableOrderMsg", "x", "", "+"]), max_size=4
).map("/".join)


class Noting(BridgeIntake):
    """Notes what reaches a lane."""

    def __init__(self, loaded: Settings) -> None:
        super().__init__(
            rules=loaded.rule_set,
            lanes={},
            limits=loaded.limits,
            host=MemoryHost(),
            presence=Presence(),
            telemetry=Telemetry(),
        )
        self.accepted: list[tuple[str, MqttMessage]] = []

    def accept(self, route: TopicRoute, message: MqttMessage, *, will: bool = False) -> None:  # noqa: ARG002 - see `Intake`
        if route.outbound is not None:
            self.accepted.append((route.outbound, message))


def explained(loaded: Settings, message: MqttMessage) -> tuple[int, list[str]]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = explain_publish(loaded, message)
    return code, [line.strip() for line in text.getvalue().splitlines()]


def sent(loaded: Settings, intake: Noting) -> list[str]:
    """Return the properties of what reached the lane, as they are printed."""
    lines: list[str] = []
    for rule_id, message in intake.accepted:
        (frame,), _ = decode_frames(encode_publish(message, accepted_us=0), 0, max_frames=1)
        properties = to_rocketmq(frame, node=loaded.node, rule_id=rule_id, offset=0, topic="mq_sensors").properties
        lines += [f"{name} = {value}" for name, value in properties.items() if name != "KEYS"]
    return lines


@pytest.mark.parametrize("host", ["amqtt", "mosquitto"])
@given(topic=some_topics, qos=st.integers(0, 2), clean_session=st.booleans())
def test_it_agrees_with_what_the_bridge_does(
    loaded: Settings, host: str, topic: str, *, qos: int, clean_session: bool
) -> None:
    intake = Noting(beside(loaded, host))
    message = MqttMessage(topic, b"x", qos, client_id="c1", clean_session=clean_session)
    route = intake.route(topic)
    if route is not None:
        intake.accept(route, message)
    code, lines = explained(beside(loaded, host), message)
    assert (code == 0) == (route is not None)
    assert [line for line in lines if " = " in line and "KEYS" not in line] == sent(loaded, intake)


@given(topic=some_topics, qos=st.integers(0, 2), clean_session=st.booleans())
def test_it_agrees_with_what_a_plain_mqtt_client_does(
    loaded: Settings, topic: str, *, qos: int, clean_session: bool
) -> None:
    here = beside(loaded, "mqtt")
    intake = Noting(here)
    feed = Feed("any", intake=intake, dropped=lambda *_: None)
    client = cast("MqttClient", SimpleNamespace(acknowledge=lambda _: None))
    # The broker hands on what it was published with, up to the QoS of the subscription.
    feed.take(client, Incoming(topic, b"x", min(qos, 1), retain=False, properties=None, packet_id=1))
    code, lines = explained(here, MqttMessage(topic, b"x", qos, client_id="c1", clean_session=clean_session))
    assert (code == 0) == bool(intake.accepted)
    assert [line for line in lines if " = " in line and "KEYS" not in line] == sent(loaded, intake)


@pytest.mark.parametrize(
    ("host", "topic", "line"),
    [
        ("mqtt", "$SYS/enableOrderMsg", "not taken: the topic begins with $: it is the broker's own"),
        ("mosquitto", "$own/x", "not taken: the topic begins with $: it is the broker's own"),
        ("mosquitto", "sensors/p2p/dev", "P2P: goes to client 'dev' alone, no subscription sees it"),
        (
            "mqtt",
            "sensors/p2p/dev",
            "P2P: reaches whoever subscribes to 'sensors/p2p/dev', or to 'sensors/#': an ordinary topic to the broker",
        ),
        (
            "mqtt",
            "sensors/long/topic",
            "not taken: the topic has 18 characters, limits.topic_chars is 16; its subscribers get it all the same",
        ),
    ],
)
def test_a_publish_beside_other_brokers(host: str, topic: str, line: str, tmp_path: Path) -> None:
    here = load(tmp_path, limits={"topic_chars": 16}, **HOSTS[host])
    assert line in explained(here, MqttMessage(topic, b"x"))[1]


REAL_TOPIC_IGNORED = "rule inb ignores mqttRealTopic: this broker shows everybody the real topic"


@pytest.mark.parametrize("host", HOSTS)
def test_a_real_topic_is_shown_where_the_broker_can(
    host: str, loaded: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    properties = {"TAGS": "MQ2MQTT", "mqttSecondTopic": "x", "mqttRealTopic": "lamp"}
    code, lines = stored(beside(loaded, host), capsys, "mq_commands", **properties)
    assert code == 0
    seen = "devices/lamp" if host == "amqtt" else "devices/x"
    assert f"topic {seen!r}, QoS 1, clean session, payload b'on'" in lines
    assert (REAL_TOPIC_IGNORED in lines) == (host != "amqtt")


def test_a_p2p_message_beside_a_plain_mqtt_client_is_no_secret(
    loaded: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    properties = {"TAGS": "MQ2MQTT", "mqttSecondTopic": "/p2p/dev", "mqttRealTopic": "lamp"}
    code, lines = stored(beside(loaded, "mqtt"), capsys, "mq_commands", **properties)
    assert code == 0
    assert any(
        line.startswith("rule inb publishes to whoever subscribes to 'devices/p2p/dev', or to 'devices/#'")
        for line in lines
    )
    assert "topic 'devices/p2p/dev', QoS 1, clean session, payload b'on'" in lines
    assert REAL_TOPIC_IGNORED in lines


@pytest.mark.parametrize(
    ("ttl", "lifetime"),
    [
        ("9", "lifetime 9 s from when it was sent to RocketMQ, then it is dropped"),
        ("700", "lifetime 60 s from when it was sent to RocketMQ, then it is dropped"),
        ("0", "lifetime 0 s: it is delivered at once or never"),
    ],
)
def test_a_stored_message_shows_its_mqtt_5_properties_and_its_time(
    ttl: str, lifetime: str, loaded: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines = stored(
        loaded,
        capsys,
        "mq_commands",
        TAGS="MQ2MQTT",
        mqtt5UserProperty='[{"key":"unit","value":"C"}]',
        mqtt5ContentType="text/plain",
        mqtt5MsgExpireInterval="60",
        ttlSeconds=ttl,
    )
    for line in ("user property unit = C", "content type text/plain", lifetime):
        assert line in lines


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


def test_a_stored_message_that_is_no_utf_8_is_shown(loaded: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    not_utf8 = b"\xc4".decode("utf-8", "surrogateescape")
    code, lines = stored(loaded, capsys, f"t{not_utf8}", **{f"n{not_utf8}": not_utf8})
    assert code == 1
    assert lines[:2] == [r"RocketMQ topic 't\udcc4', 2 bytes", r"'n\udcc4' = '\udcc4'"]
