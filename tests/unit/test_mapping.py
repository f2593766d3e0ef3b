"""The property contract: every row of the documented tables, and exact round trips."""

import json
import re
from dataclasses import dataclass

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mq2mqtt.errors import UnmappableMessageError
from mq2mqtt.link.librocketmq.clients import READ_PROPERTIES
from mq2mqtt.mapping import (
    MAX_BODY_BYTES,
    MAX_PROPERTIES_BYTES,
    Inbound,
    OutboundMapper,
    is_own,
    to_mqtt,
    to_rocketmq,
)
from mq2mqtt.message import MqttMessage, MqttProperties, RocketBatch, RocketMessage
from mq2mqtt.rocketmq.properties import encode_properties
from mq2mqtt.settings import Limits
from mq2mqtt.spool.frame import decode_frames, encode_publish

CLIENT = "GID_test@@@0001"
PUBLISH = MqttMessage("sensors/room/temp", b"21.5", qos=1, client_id=CLIENT, clean_session=False)
NO_LIMITS = Limits()


@dataclass(frozen=True)
class Received:
    """A message as a link driver hands it over."""

    properties: dict[str, str]
    body: bytes = b"on"
    topic: str = "mq_commands"
    born_ms: int = 0
    queue_id: int = 0
    offset: int = 0
    broker: str = "broker-a"


def publish(message: MqttMessage, *, offset: int = 7) -> RocketMessage:
    """Go the way of an uplink message: through a lane's frame, and the mapper of many says the same as that of one."""
    [frame], _ = decode_frames(encode_publish(message, accepted_us=1), 0, max_frames=1)
    mapper = OutboundMapper(node="n1", rule_id="telemetry-out")
    try:
        mapped = to_rocketmq(frame, node="n1", rule_id="telemetry-out", offset=offset, topic="mq_sensors")
    except UnmappableMessageError as error:
        with pytest.raises(UnmappableMessageError, match=re.escape(error.reason)):
            mapper.map(frame, offset)
        raise
    body, property_text = mapper.map(frame, offset)
    assert mapper.map(frame, offset) == (body, property_text)
    assert property_text == encode_properties(mapped.properties)
    assert list(RocketBatch("mq_sensors", [body], [property_text])) == [mapped]
    return mapped


def receive(body: bytes = b"on", /, *, limits: Limits = NO_LIMITS, **properties: str) -> Inbound:
    return to_mqtt(Received(properties, body), parent="devices", limits=limits)


# MQTT -> RocketMQ


def test_outbound_message_whole() -> None:
    assert publish(PUBLISH) == RocketMessage(
        "mq_sensors",
        b"21.5",
        {
            "TAGS": "MQTT_COMMON",
            "KEYS": "n1:telemetry-out:7",
            "qoslevel": "1",
            "cleansessionflag": "false",
            "mqttSecondTopic": "/room/temp",
            "clientId": CLIENT,
            "mq2mqttNode": "n1",
        },
    )


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_outbound_qoslevel(qos: int) -> None:
    assert publish(MqttMessage("sensors/a", b"x", qos=qos)).properties["qoslevel"] == str(qos)


@pytest.mark.parametrize(("flag", "text"), [(True, "true"), (False, "false")])
def test_outbound_cleansessionflag(flag: bool, text: str) -> None:  # noqa: FBT001 - a table's column
    assert publish(MqttMessage("sensors/a", b"x", clean_session=flag)).properties["cleansessionflag"] == text


@pytest.mark.parametrize(
    ("topic", "second"),
    [
        ("sensors/t2/t3", "/t2/t3"),
        ("sensors/t2/", "/t2/"),
        ("sensors/", "/"),
        ("sensors//t3", "//t3"),
        ("sensors/p2p/GID_x@@@dev", "/p2p/GID_x@@@dev"),
        ("sensors", None),
    ],
)
def test_outbound_mqtt_second_topic(topic: str, second: str | None) -> None:
    assert publish(MqttMessage(topic, b"x")).properties.get("mqttSecondTopic") == second


@pytest.mark.parametrize("client_id", [CLIENT, "ü", "a/b"])
def test_outbound_client_id(client_id: str) -> None:
    assert publish(MqttMessage("sensors/a", b"x", client_id=client_id)).properties["clientId"] == client_id


def test_outbound_leaves_an_empty_client_id_out() -> None:
    assert "clientId" not in publish(MqttMessage("sensors/a", b"x")).properties


def test_outbound_never_has_mqtt_real_topic() -> None:
    assert "mqttRealTopic" not in publish(PUBLISH).properties


def test_outbound_empty_payload() -> None:
    message = publish(MqttMessage("sensors/a", b""))

    assert message.body == b" "
    assert message.properties["mqttEmptyPayload"] == "true"
    assert "mqttEmptyPayload" not in publish(MqttMessage("sensors/a", b" ")).properties


def test_outbound_body_is_not_touched() -> None:
    body = bytes(range(256))
    assert publish(MqttMessage("sensors/a", body)).body == body


def test_outbound_mqtt5_properties() -> None:
    properties = MqttProperties("text/plain", 60, (("mQ", "test001"), ("mQ", 'é"\x01')))
    message = publish(MqttMessage("sensors/a", b"x", properties=properties))

    assert message.properties["mqtt5ContentType"] == "text/plain"
    assert message.properties["mqtt5MsgExpireInterval"] == "60"
    assert message.properties["mqtt5UserProperty"] == (
        '[{"key":"mQ","value":"test001"},{"key":"mQ","value":"é\\"\\u0001"}]'
    )
    assert message.properties["topic"] == "sensors/a"


def test_outbound_without_mqtt5_properties_has_none_of_their_names() -> None:
    assert (
        not {"mqtt5ContentType", "mqtt5MsgExpireInterval", "mqtt5UserProperty", "topic"}
        & publish(PUBLISH).properties.keys()
    )


def test_outbound_only_the_mqtt5_properties_that_are_there() -> None:
    properties = publish(MqttMessage("sensors/a", b"x", properties=MqttProperties(expiry_seconds=0))).properties

    assert properties["mqtt5MsgExpireInterval"] == "0"
    assert not {"mqtt5ContentType", "mqtt5UserProperty"} & properties.keys()


SEPARATOR = "contains the byte 0x01 or 0x02, RocketMQ's separators"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (MqttMessage("sensors/a\x01b", b"x"), f"mqttSecondTopic {SEPARATOR}"),
        (MqttMessage("sensors/a\x02b", b"x"), f"mqttSecondTopic {SEPARATOR}"),
        (MqttMessage("sensors/a", b"x", client_id="a\x01"), f"clientId {SEPARATOR}"),
        (MqttMessage("sensors/a", b"x", client_id="a\x02"), f"clientId {SEPARATOR}"),
        (
            MqttMessage("sensors/a", b"x", properties=MqttProperties(content_type="a\x02")),
            f"mqtt5ContentType {SEPARATOR}",
        ),
        (MqttMessage("sensors/\udcff", b"x"), "mqttSecondTopic is not valid UTF-8"),
        (MqttMessage("sensors/a", b"x", client_id="\udcff"), "clientId is not valid UTF-8"),
        (
            MqttMessage("sensors/a", b"x" * (MAX_BODY_BYTES + 1)),
            f"payload of {MAX_BODY_BYTES + 1} bytes, RocketMQ takes {MAX_BODY_BYTES}",
        ),
    ],
)
def test_outbound_unmappable(message: MqttMessage, reason: str) -> None:
    with pytest.raises(UnmappableMessageError) as caught:
        publish(message)
    assert caught.value.reason == reason


def encoded_size(message: RocketMessage) -> int:
    return len("\x02".join(map("\x01".join, message.properties.items())).encode()) + 1


@pytest.mark.parametrize("char", ["a", "é", "😀"])
def test_outbound_properties_that_just_fit(char: str) -> None:
    """The longest topic that passes stays below the limit, one character more raises; ASCII takes the short way."""
    overhead = encoded_size(publish(MqttMessage("s/", b"x"))) - 1
    chars = (MAX_PROPERTIES_BYTES - overhead) // len(char.encode())

    assert encoded_size(publish(MqttMessage("s/" + char * (chars - 1), b"x"))) <= MAX_PROPERTIES_BYTES
    with pytest.raises(UnmappableMessageError, match="RocketMQ takes 31900"):
        publish(MqttMessage("s/" + char * (chars + 1), b"x"))


def test_outbound_body_that_just_fits() -> None:
    assert len(publish(MqttMessage("sensors/a", b"x" * MAX_BODY_BYTES)).body) == MAX_BODY_BYTES


# RocketMQ -> MQTT


def test_inbound_defaults() -> None:
    assert receive() == Inbound(MqttMessage("devices", b"on", qos=1, clean_session=True))


def test_inbound_carries_nothing_of_rocketmq_itself() -> None:
    inbound = receive(TAGS="MQ2MQTT", KEYS="k", UNIQ_KEY="u", clientId="me", topic="x/y", mqttSecondTopic="/a")

    assert inbound == Inbound(MqttMessage("devices/a", b"on"))


@pytest.mark.parametrize(
    ("text", "qos", "invalid"),
    [
        ("0", 0, ()),
        ("1", 1, ()),
        ("2", 2, ()),
        ("", 1, ()),
        ("3", 1, ("qoslevel",)),
        ("-1", 1, ("qoslevel",)),
        (" 2", 1, ("qoslevel",)),
        ("two", 1, ("qoslevel",)),
    ],
)
def test_inbound_qoslevel(text: str, qos: int, invalid: tuple[str, ...]) -> None:
    inbound = receive(qoslevel=text)

    assert (inbound.message.qos, inbound.invalid) == (qos, invalid)


@pytest.mark.parametrize(
    ("text", "flag", "invalid"),
    [
        ("true", True, ()),
        ("false", False, ()),
        ("", True, ()),
        ("False", True, ("cleansessionflag",)),
        ("false ", True, ("cleansessionflag",)),
        ("0", True, ("cleansessionflag",)),
    ],
)
def test_inbound_cleansessionflag(text: str, flag: bool, invalid: tuple[str, ...]) -> None:  # noqa: FBT001
    inbound = receive(cleansessionflag=text, mqttSecondTopic=f"/p2p/{CLIENT}")

    assert (inbound.message.clean_session, inbound.invalid) == (flag, invalid)


@pytest.mark.parametrize(
    ("second", "topic"),
    [
        ("/t2/t3", "devices/t2/t3"),
        ("t2/t3", "devices/t2/t3"),
        ("/t2/", "devices/t2/"),
        ("//t2", "devices//t2"),
        ("/", "devices/"),
        ("", "devices"),
        ("/p2p", "devices/p2p"),
        ("/p2p/c/x", "devices/p2p/c/x"),
    ],
)
def test_inbound_mqtt_second_topic(second: str, topic: str) -> None:
    assert receive(mqttSecondTopic=second) == Inbound(MqttMessage(topic, b"on"))


@pytest.mark.parametrize("second", [f"/p2p/{CLIENT}", f"p2p/{CLIENT}"])
def test_inbound_p2p(second: str) -> None:
    assert receive(mqttSecondTopic=second, qoslevel="2") == Inbound(
        MqttMessage(f"devices/p2p/{CLIENT}", b"on", qos=2), p2p_target=CLIENT
    )


@pytest.mark.parametrize(
    ("real_topic", "shown"),
    [
        ("devices/pretty", "devices/pretty"),
        ("pretty", "devices/pretty"),
        ("/pretty", "devices/pretty"),
        ("devices2/x", "devices/devices2/x"),
    ],
)
def test_inbound_mqtt_real_topic(real_topic: str, shown: str) -> None:
    """Changes what receivers see, never who they are."""
    topic = receive(mqttSecondTopic="/a", mqttRealTopic=real_topic)
    assert (topic.message.topic, topic.shown_topic, topic.p2p_target) == ("devices/a", shown, None)

    p2p = receive(mqttSecondTopic="/p2p/c", mqttRealTopic=real_topic)
    assert (p2p.message.topic, p2p.shown_topic, p2p.p2p_target) == (shown, None, "c")


@pytest.mark.parametrize("real_topic", ["a/+", "#", "a\0", "x" * 65_536])
def test_inbound_illegal_mqtt_real_topic_is_ignored(real_topic: str) -> None:
    topic = receive(mqttSecondTopic="/a", mqttRealTopic=real_topic)
    assert topic == Inbound(MqttMessage("devices/a", b"on"), invalid=("mqttRealTopic",))

    p2p = receive(mqttSecondTopic="/p2p/c", mqttRealTopic=real_topic)
    assert p2p == Inbound(MqttMessage("devices/p2p/c", b"on"), p2p_target="c", invalid=("mqttRealTopic",))


def test_inbound_empty_mqtt_real_topic_is_none() -> None:
    assert receive(mqttRealTopic="") == Inbound(MqttMessage("devices", b"on"))


@pytest.mark.parametrize(
    ("text", "payload", "invalid"),
    [("true", b"", ()), ("false", b" ", ()), ("", b" ", ()), ("yes", b" ", ("mqttEmptyPayload",))],
)
def test_inbound_empty_payload(text: str, payload: bytes, invalid: tuple[str, ...]) -> None:
    inbound = receive(b" ", mqttEmptyPayload=text)

    assert (inbound.message.payload, inbound.invalid) == (payload, invalid)


def test_inbound_mqtt5_properties() -> None:
    inbound = receive(
        mqtt5UserProperty='[{"key":"mQ","value":"test001"}, {"value": "", "key": "mQ"}]',
        mqtt5MsgExpireInterval="65535",
        mqtt5ContentType="UTF-8",
    )

    assert inbound == Inbound(
        MqttMessage("devices", b"on", properties=MqttProperties("UTF-8", 65_535, (("mQ", "test001"), ("mQ", "")))),
        lifetime=65_535,
    )


@pytest.mark.parametrize(
    ("properties", "lifetime", "invalid"),
    [
        ({}, None, ()),
        ({"ttlSeconds": "60"}, 60, ()),
        ({"ttlSeconds": "60", "mqtt5MsgExpireInterval": "30"}, 30, ()),
        ({"ttlSeconds": "0", "mqtt5MsgExpireInterval": "30"}, 0, ()),
        ({"ttlSeconds": "", "mqtt5MsgExpireInterval": "30"}, 30, ()),
        ({"ttlSeconds": "1.5"}, None, ("ttlSeconds",)),
        ({"ttlSeconds": "-1", "mqtt5MsgExpireInterval": "x"}, None, ("mqtt5MsgExpireInterval", "ttlSeconds")),
    ],
)
def test_the_smaller_of_both_lifetimes_counts(
    properties: dict[str, str], lifetime: int | None, invalid: tuple[str, ...]
) -> None:
    inbound = receive(limits=NO_LIMITS, **properties)
    assert (inbound.lifetime, inbound.invalid) == (lifetime, invalid)


@pytest.mark.parametrize(
    ("text", "wanted", "invalid"),
    [("true", True, ()), ("false", False, ()), ("", False, ()), ("yes", False, ("receipt",))],
)
def test_a_receipt_is_asked_for_with_true(text: str, *, wanted: bool, invalid: tuple[str, ...]) -> None:
    inbound = receive(receipt=text)
    assert (inbound.wants_receipt, inbound.invalid) == (wanted, invalid)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{}",
        '"a"',
        "[1]",
        '[{"key":"a"}]',
        '[{"key":"a","value":1}]',
        '[{"key":1,"value":"a"}]',
        '[{"key":"a","value":"b","c":"d"}]',
        '[{"key":"a\\u0000","value":"b"}]',
        '[{"key":"a","value":"\\ud800"}]',
        json.dumps([{"key": "a", "value": "b" * 65_536}]),
        "[" * 100_000,
    ],
)
def test_inbound_bad_mqtt5_user_property(text: str) -> None:
    inbound = receive(mqtt5UserProperty=text)

    assert inbound == Inbound(MqttMessage("devices", b"on"), invalid=("mqtt5UserProperty",) if text else ())


@pytest.mark.parametrize("text", ["-1", "1.5", " 1", "x", "4294967296", "٣", "1_0", "9" * 5000, ""])
def test_inbound_bad_mqtt5_msg_expire_interval(text: str) -> None:
    inbound = receive(mqtt5MsgExpireInterval=text)

    assert inbound == Inbound(MqttMessage("devices", b"on"), invalid=("mqtt5MsgExpireInterval",) if text else ())


@pytest.mark.parametrize("text", ["a\0", "\udcff", "x" * 65_536, ""])
def test_inbound_bad_mqtt5_content_type(text: str) -> None:
    inbound = receive(mqtt5ContentType=text, mqtt5MsgExpireInterval="5")

    assert inbound.message.properties == MqttProperties(expiry_seconds=5)
    assert inbound.invalid == (("mqtt5ContentType",) if text else ())


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ("/a/+", "topic contains the wildcard +"),
        ("/#", "topic contains the wildcard #"),
        ("/p2p/a+b", "topic contains the wildcard +"),
        ("/a\0", "topic contains the character NUL"),
        ("/" + "x" * 65_535, "topic is 65543 bytes long, MQTT allows 65535"),
        ("/\udcff", "topic is not valid UTF-8"),
        ("/p2p/", "P2P topic without a client id"),
    ],
)
def test_inbound_unmappable(second: str, reason: str) -> None:
    with pytest.raises(UnmappableMessageError) as caught:
        receive(mqttSecondTopic=second)
    assert caught.value.reason == reason


def test_inbound_limits() -> None:
    limits = Limits(topic_chars=12, payload_bytes=4)

    assert receive(b"1234", mqttSecondTopic="/1234", limits=limits) == Inbound(MqttMessage("devices/1234", b"1234"))
    assert receive(mqttRealTopic="12345", limits=limits).invalid == ("mqttRealTopic",)
    with pytest.raises(UnmappableMessageError, match=r"topic is 13 characters long, limits\.topic_chars is 12"):
        receive(mqttSecondTopic="/12345", limits=limits)
    with pytest.raises(UnmappableMessageError, match=r"payload of 5 bytes, limits\.payload_bytes is 4"):
        receive(b"12345", limits=limits)


def test_inbound_names_each_invalid_property_once() -> None:
    inbound = receive(
        qoslevel="9", cleansessionflag="x", mqttRealTopic="+", mqtt5UserProperty="x", mqtt5MsgExpireInterval="x"
    )

    assert sorted(inbound.invalid) == [
        "cleansessionflag",
        "mqtt5MsgExpireInterval",
        "mqtt5UserProperty",
        "mqttRealTopic",
        "qoslevel",
    ]


# Both ways


class Asked(dict[str, str]):
    """Properties that know by which names they were asked for."""

    def __init__(self, **properties: str) -> None:
        super().__init__(properties)
        self.names: set[str] = set()

    def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]
        self.names.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)


def test_the_driver_that_lists_no_properties_asks_for_all_that_are_read() -> None:
    properties = Asked(mqtt5ContentType="text/plain", ttlSeconds="1", receipt="true")
    to_mqtt(Received(properties), parent="devices", limits=NO_LIMITS)
    is_own(properties)

    assert len(properties.names) >= 10
    assert properties.names <= set(READ_PROPERTIES)


def test_loop_guard() -> None:
    assert is_own(publish(PUBLISH).properties)
    assert not is_own({"TAGS": "MQ2MQTT", "clientId": CLIENT})


LEVEL = st.text(st.characters(exclude_characters="+#/\0\x01\x02", exclude_categories=["Cs"]), max_size=12)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
MESSAGES = st.builds(
    MqttMessage,
    topic=st.lists(st.one_of(LEVEL, st.just("p2p")), max_size=4).map(lambda levels: "/".join(["devices", *levels])),
    payload=st.binary(max_size=64),
    qos=st.integers(0, 2),
    client_id=st.text(st.characters(exclude_characters="\0\x01\x02", exclude_categories=["Cs"]), max_size=20),
    clean_session=st.booleans(),
    properties=st.none()
    | st.builds(
        MqttProperties,
        content_type=st.none() | st.text(st.characters(min_codepoint=3, exclude_categories=["Cs"]), min_size=1),
        expiry_seconds=st.none() | st.integers(0, 2**32 - 1),
        user=st.lists(st.tuples(TEXT, TEXT), max_size=4).map(tuple),
    ),
)


@given(MESSAGES)
def test_round_trip_is_exact(message: MqttMessage) -> None:
    assume(message.topic != "devices/p2p/")  # names no client: see test_inbound_unmappable
    sent = publish(message)
    inbound = to_mqtt(Received(sent.properties, sent.body), parent="devices", limits=NO_LIMITS)

    properties = None if message.properties == MqttProperties() else message.properties
    assert inbound.message == MqttMessage(
        message.topic, message.payload, message.qos, clean_session=message.clean_session, properties=properties
    )
    levels = message.topic.split("/")
    assert inbound.p2p_target == (levels[2] if levels[1:2] == ["p2p"] and len(levels) == 3 else None)
    assert inbound.shown_topic is None
    assert inbound.invalid == ()
