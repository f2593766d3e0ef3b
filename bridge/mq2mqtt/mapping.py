"""The property contract between MQTT and RocketMQ, both directions. Pure; `docs/mapping.md` is its table."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from mq2mqtt import expiry, topics
from mq2mqtt.errors import UnmappableMessageError
from mq2mqtt.message import MqttMessage, MqttProperties, ReceivedMessage, RocketMessage
from mq2mqtt.spool.frame import LEGAL_FLAGS, Frame, FrameKind
from mq2mqtt.status import tag_of

__all__ = [
    "INBOUND_TAG",
    "MAX_BODY_BYTES",
    "MAX_PROPERTIES_BYTES",
    "NODE_PROPERTY",
    "OUTBOUND_TAG",
    "Inbound",
    "Limits",
    "OutboundMapper",
    "Published",
    "is_own",
    "to_mqtt",
    "to_rocketmq",
]

OUTBOUND_TAG: Final = "MQTT_COMMON"
INBOUND_TAG: Final = "MQ2MQTT"

MAX_BODY_BYTES: Final = 4 * 1024 * 1024
"""RocketMQ's default `maxMessageSize`."""

MAX_PROPERTIES_BYTES: Final = 31_900
"""Of the properties that are made here. RocketMQ's wire ends at 32 767, but the broker adds its own to them, unchecked
in a batch, and what goes beyond damages its store (see `rocketmq/properties.py`). The native driver therefore takes
32 000, of which its `UNIQ_KEY` uses 42."""

# RocketMQ's own names.
_TAGS = "TAGS"
_KEYS = "KEYS"

# The contract (spec 3.3). Case matters.
_QOS = "qoslevel"
_CLEAN_SESSION = "cleansessionflag"
_SECOND_TOPIC = "mqttSecondTopic"
_REAL_TOPIC = "mqttRealTopic"
_CLIENT_ID = "clientId"
_FULL_TOPIC = "topic"
_USER = "mqtt5UserProperty"
_EXPIRY = "mqtt5MsgExpireInterval"
_CONTENT_TYPE = "mqtt5ContentType"

# The bridge's additions (design section 9).
NODE_PROPERTY: Final = "mq2mqttNode"
_EMPTY_PAYLOAD = "mqttEmptyPayload"
_TTL = "ttlSeconds"
_RECEIPT = "receipt"

_QOS_TEXTS: Final = ("0", "1", "2")
_QOS_VALUES: Final = {text: qos for qos, text in enumerate(_QOS_TEXTS)}
_BOOLEANS: Final = {"true": True, "false": False}
_DEFAULT_QOS: Final = 1
_DEFAULT_CLEAN_SESSION: Final = True

_EMPTY_BODY: Final = b" "  # RocketMQ answers an empty body with an error


# Topic and client id below this many ASCII characters each cannot reach `MAX_PROPERTIES_BYTES`, nor be illegal UTF-8:
# the exact count, which costs more than the mapping itself, is skipped.
_SURELY_FITTING_CHARS: Final = 15_000

# What a lane's mapper remembers of topics, and of client ids: some 5 MB each, 12 MB at most.
_REMEMBERED_NAMES: Final = 20_000
_REMEMBERED_CHARS: Final = 250


class Published(Protocol):
    """What is read of a publish on its way to RocketMQ; a lane's frame is one."""

    @property
    def topic(self) -> str:
        """MQTT topic."""

    @property
    def payload(self) -> bytes:
        """Payload."""

    @property
    def qos(self) -> int:
        """QoS the publisher chose."""

    @property
    def clean_session(self) -> bool:
        """The publisher's clean session flag."""

    @property
    def client_id(self) -> str:
        """The publisher's client id, empty when unknown."""

    @property
    def mqtt_properties(self) -> MqttProperties | None:
        """MQTT 5 properties, `None` without."""


class Limits(Protocol):
    """The operator's limits; `None` is no limit."""

    @property
    def topic_chars(self) -> int | None:
        """Longest topic, in characters."""

    @property
    def payload_bytes(self) -> int | None:
        """Longest payload."""


@dataclass(frozen=True, slots=True)
class Inbound:
    """What a RocketMQ message is in MQTT.

    With a `p2p_target` it is for that client alone and `message.topic` is the topic the client sees. Otherwise
    it is for the subscribers of `message.topic`, and `shown_topic` is what `mqttRealTopic` wants them to see.
    `lifetime`: seconds after its birth, the smaller of `ttlSeconds` and MQTT 5's own. `invalid` names properties whose
    values were ignored.
    """

    message: MqttMessage
    p2p_target: str | None = None
    shown_topic: str | None = None
    lifetime: int | None = None
    wants_receipt: bool = False
    invalid: tuple[str, ...] = ()


def is_own(properties: Mapping[str, str]) -> bool:
    """Whether a bridge sent this message; no inbound rule takes it, or it would go round for ever (spec 2.2)."""
    return NODE_PROPERTY in properties


def to_rocketmq(published: Published, *, node: str, rule_id: str, offset: int, topic: str) -> RocketMessage:
    """Return the message for RocketMQ topic `topic`.

    Args:
        published: the publish.
        node: the bridge's name, `Settings.node`.
        rule_id: the outbound rule.
        offset: the publish's offset in the rule's lane.
        topic: RocketMQ topic, the rule's target.

    Raises:
        UnmappableMessageError: RocketMQ cannot carry it.
    """
    body, properties = _body_and_properties(published, f"{node}:{rule_id}:{offset}", node)
    return RocketMessage(topic, body, properties)


def _body_and_properties(published: Published, key: str, node: str) -> tuple[bytes, dict[str, str]]:
    payload = published.payload
    if len(payload) > MAX_BODY_BYTES:
        raise UnmappableMessageError(f"payload of {len(payload)} bytes, RocketMQ takes {MAX_BODY_BYTES}")
    mqtt_topic = published.topic
    client_id = published.client_id
    properties = {
        _TAGS: OUTBOUND_TAG,
        _KEYS: key,
        _QOS: _QOS_TEXTS[published.qos],
        _CLEAN_SESSION: "true" if published.clean_session else "false",
        NODE_PROPERTY: node,
    }
    slash = mqtt_topic.find("/")
    if slash >= 0:
        properties[_SECOND_TOPIC] = mqtt_topic[slash:]
    if client_id:
        properties[_CLIENT_ID] = client_id
    if not payload:
        payload = _EMPTY_BODY
        properties[_EMPTY_PAYLOAD] = "true"
    mqtt_properties = published.mqtt_properties
    if mqtt_properties is not None:
        _add_mqtt5(properties, mqtt_topic, mqtt_properties)
        _check(properties)
    elif not (_surely_carried(mqtt_topic) and _surely_carried(client_id)):
        _check(properties)
    return payload, properties


def _surely_carried(name: str) -> bool:
    """Whether `_check` would find nothing wrong with this topic or client id; it costs more than the mapping itself."""
    return len(name) <= _SURELY_FITTING_CHARS and name.isascii() and "\x01" not in name and "\x02" not in name


class OutboundMapper:
    """`to_rocketmq` for the many messages of one lane: the same properties, in wire form, in a fifth of the time."""

    __slots__ = ("_clients", "_key", "_middles", "_node", "_start", "_topics")

    def __init__(self, *, node: str, rule_id: str) -> None:
        self._node = node
        self._key = f"{node}:{rule_id}:"
        self._start = f"{_TAGS}\x01{OUTBOUND_TAG}\x02{_KEYS}\x01{self._key}"
        self._middles = {flags: self._middle(Frame(1, flags, 0, "", "", b"", b"")) for flags in LEGAL_FLAGS}
        # What the topics and client ids seen last are as properties.
        self._topics: dict[str, str] = {}
        self._clients: dict[str, str] = {}

    def map(self, frame: Frame, offset: int) -> tuple[bytes, str]:
        """Return the body, and the properties as RocketMQ has them on the wire: `name 0x01 value 0x02` in turn.

        Raises:
            UnmappableMessageError: RocketMQ cannot carry it.
        """
        payload = frame.payload
        if 0 < len(payload) <= MAX_BODY_BYTES and not frame.properties:
            topic = self._topics.get(frame.topic) or self._learn_topic(frame.topic)
            client = self._clients.get(frame.client_id) or self._learn_client(frame.client_id)
            if topic and (client or not frame.client_id):
                return payload, f"{self._start}{offset}{self._middles[frame.flags]}{topic}{client}"
        key = f"{self._key}{offset}"
        if frame.kind == FrameKind.EVENT:
            return payload, f"{_TAGS}\x01{tag_of(payload)}\x02{_KEYS}\x01{key}\x02{NODE_PROPERTY}\x01{self._node}\x02"
        if frame.kind == FrameKind.ROCKETMQ:
            # A receipt: it was made as it goes. The link refuses what is too long.
            return payload, frame.properties.decode("utf-8", "surrogateescape")
        body, properties = _body_and_properties(frame, key, self._node)
        return body, "".join([f"{name}\x01{value}\x02" for name, value in properties.items()])

    def _middle(self, frame: Frame) -> str:
        clean_session = "true" if frame.clean_session else "false"
        return (
            f"\x02{_QOS}\x01{frame.qos}\x02{_CLEAN_SESSION}\x01{clean_session}\x02{NODE_PROPERTY}\x01{self._node}\x02"
        )

    def _learn_topic(self, topic: str) -> str:
        slash = topic.find("/")
        return "" if slash < 0 else _remember(self._topics, topic, f"{_SECOND_TOPIC}\x01{topic[slash:]}\x02")

    def _learn_client(self, client_id: str) -> str:
        return _remember(self._clients, client_id, f"{_CLIENT_ID}\x01{client_id}\x02") if client_id else ""


def _remember(texts: dict[str, str], name: str, text: str) -> str:
    """Keep `text` for the next message and return it; empty when `name` has to be checked each time."""
    if not _surely_carried(name):
        return ""
    if len(texts) >= _REMEMBERED_NAMES:
        texts.clear()
    if len(name) <= _REMEMBERED_CHARS:
        texts[name] = text
    return text


def _add_mqtt5(properties: dict[str, str], mqtt_topic: str, mqtt: MqttProperties) -> None:
    # RocketMQ takes an empty value for a missing one, so an empty content type is lost.
    if mqtt.content_type:
        properties[_CONTENT_TYPE] = mqtt.content_type
    if mqtt.expiry_seconds is not None:
        properties[_EXPIRY] = str(mqtt.expiry_seconds)
    if mqtt.user:
        pairs = [{"key": name, "value": value} for name, value in mqtt.user]
        properties[_USER] = json.dumps(pairs, ensure_ascii=False, separators=(",", ":"))
    # ApsaraMQ writes the full topic on its MQTT 5 instances only (spec 3.3).
    properties[_FULL_TOPIC] = mqtt_topic


def _check(properties: Mapping[str, str]) -> None:
    """Raise unless RocketMQ can carry `properties`: `key 0x01 value 0x02` in turn, in UTF-8."""
    size = 0
    for name, value in properties.items():
        if "\x01" in value or "\x02" in value:
            raise UnmappableMessageError(f"{name} contains the byte 0x01 or 0x02, RocketMQ's separators")
        try:
            size += len(name) + len(value.encode()) + 2
        except UnicodeEncodeError:
            raise UnmappableMessageError(f"{name} is not valid UTF-8") from None
    if size > MAX_PROPERTIES_BYTES:
        raise UnmappableMessageError(f"properties of {size} bytes, RocketMQ takes {MAX_PROPERTIES_BYTES}")


def to_mqtt(received: ReceivedMessage, *, parent: str, limits: Limits) -> Inbound:
    """Return what `received` is under the MQTT topic `parent`.

    A property with a value that is not in the contract counts as missing and is named in the result.

    Raises:
        UnmappableMessageError: MQTT cannot carry it, or `limits` forbid it.
    """
    properties = received.properties
    invalid: list[str] = []

    topic = topics.join(parent, properties.get(_SECOND_TOPIC, ""))
    problem = _topic_problem(topic, limits)
    if problem is not None:
        raise UnmappableMessageError(f"topic {problem}")
    p2p = topics.p2p_address(topic)
    if p2p is None and topic == topics.p2p_topic(parent, ""):
        # Nobody's address; as an ordinary topic it would reach the subscribers of `parent/#`.
        raise UnmappableMessageError("P2P topic without a client id")

    qos = _QOS_VALUES.get(properties.get(_QOS) or "1")
    if qos is None:
        qos = _DEFAULT_QOS
        invalid.append(_QOS)
    clean_session = _boolean(properties, _CLEAN_SESSION, default=_DEFAULT_CLEAN_SESSION, invalid=invalid)
    payload = b"" if _boolean(properties, _EMPTY_PAYLOAD, default=False, invalid=invalid) else received.body
    if limits.payload_bytes is not None and len(payload) > limits.payload_bytes:
        raise UnmappableMessageError(f"payload of {len(payload)} bytes, limits.payload_bytes is {limits.payload_bytes}")

    shown = None
    real_topic = properties.get(_REAL_TOPIC)
    if real_topic:
        shown = topics.shown_topic(parent, real_topic)
        if _topic_problem(shown, limits) is not None:
            shown = None
            invalid.append(_REAL_TOPIC)

    mqtt5 = None
    if _USER in properties or _EXPIRY in properties or _CONTENT_TYPE in properties:
        mqtt5 = _mqtt5(properties, invalid)
    lifetime = None if mqtt5 is None else mqtt5.expiry_seconds
    if _TTL in properties and (ttl := _seconds(properties, _TTL, invalid)) is not None:
        lifetime = ttl if lifetime is None else min(ttl, lifetime)

    if p2p is not None and shown is not None:
        topic, shown = shown, None
    return Inbound(
        MqttMessage(topic, payload, qos, clean_session=clean_session, properties=mqtt5),
        None if p2p is None else p2p.client_id,
        shown,
        lifetime,
        _RECEIPT in properties and _boolean(properties, _RECEIPT, default=False, invalid=invalid),
        tuple(invalid),
    )


def _topic_problem(topic: str, limits: Limits) -> str | None:
    problem = topics.topic_problem(topic)
    if problem is None and limits.topic_chars is not None and len(topic) > limits.topic_chars:
        return f"is {len(topic)} characters long, limits.topic_chars is {limits.topic_chars}"
    return problem


def _boolean(properties: Mapping[str, str], name: str, *, default: bool, invalid: list[str]) -> bool:
    # Exactly as ApsaraMQ writes them: a wrong value should be seen in the metrics, not guessed at.
    text = properties.get(name)
    if not text:
        return default
    value = _BOOLEANS.get(text)
    if value is None:
        invalid.append(name)
        return default
    return value


def _mqtt5(properties: Mapping[str, str], invalid: list[str]) -> MqttProperties | None:
    user: tuple[tuple[str, str], ...] = ()
    if text := properties.get(_USER):
        pairs = _user_properties(text)
        if pairs is None:
            invalid.append(_USER)
        else:
            user = pairs
    seconds = _seconds(properties, _EXPIRY, invalid)
    content_type = properties.get(_CONTENT_TYPE) or None
    if content_type is not None and not topics.is_text(content_type):
        content_type = None
        invalid.append(_CONTENT_TYPE)
    if content_type is None and seconds is None and not user:
        return None
    return MqttProperties(content_type, seconds, user)


def _seconds(properties: Mapping[str, str], name: str, invalid: list[str]) -> int | None:
    text = properties.get(name)
    if not text:
        return None
    seconds = expiry.parse_seconds(text)
    if seconds is None:
        invalid.append(name)
    return seconds


def _user_properties(text: str) -> tuple[tuple[str, str], ...] | None:
    """Read `[{"key":"a","value":"b"}]`; `None` when it is anything else."""
    try:
        items: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(items, list):
        return None
    pairs: list[tuple[str, str]] = []
    for item in items:
        if not isinstance(item, dict) or item.keys() != {"key", "value"}:
            return None
        name, value = item["key"], item["value"]
        if not (isinstance(name, str) and isinstance(value, str) and topics.is_text(name) and topics.is_text(value)):
            return None
        pairs.append((name, value))
    return tuple(pairs)
