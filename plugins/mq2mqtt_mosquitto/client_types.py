"""What `client` is given and gives, and how paho-mqtt has it."""

import ssl
from dataclasses import dataclass
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import paho.mqtt.client as paho
import paho.mqtt.properties as paho_properties
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.exception import MalformedPacket
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from mq2mqtt.message import MqttProperties

__all__ = [
    "SESSION_FOREVER",
    "BrokerLimits",
    "Incoming",
    "Login",
    "MqttError",
    "Subscription",
    "limits_of",
    "new_paho",
    "options",
    "pack",
    "unpack",
]

SESSION_FOREVER: Final = 0xFFFFFFFF
"""Session expiry: the broker keeps the session until it is taken up again."""

_KEEPALIVE_SECONDS = 10
_PORT, _TLS_PORT = 1883, 8883


class MqttError(Exception):
    """The broker refused something, or ended the connection."""


@dataclass(frozen=True, slots=True)
class Login:
    """Who connects, and where to: `mqtt://`, `mqtts://` or `unix://`."""

    url: str
    client_id: str
    username: str | None = None
    password: str | None = None
    tls: ssl.SSLContext | None = None
    """For `mqtts://`; `None`: the system's certificate authorities."""
    clean_start: bool = False
    session_expiry: int = SESSION_FOREVER
    """Seconds for which the broker keeps the session when the connection has ended."""
    receive_maximum: int = 0xFFFF
    """Messages with QoS 1 and 2 that may come before one is acknowledged, at most."""


class Subscription(NamedTuple):
    """A topic filter and how its messages are to come."""

    topic_filter: str
    qos: int = 0
    no_local: bool = False
    """Without what this client publishes itself."""
    retained: bool = False
    """Whether retained messages come when it is made."""
    as_published: bool = False
    """Whether messages come with the retain flag that they were published with."""


class BrokerLimits(NamedTuple):
    """What the broker takes and does, as its answer to CONNECT says."""

    qos: int = 2
    """Of a publish, at most."""
    receive_maximum: int = 0xFFFF
    """Publishes with QoS 1 and 2 that it has not acknowledged, at most."""
    packet_bytes: int | None = None
    """Length of a packet, at most."""
    wildcards: bool = True
    """Whether a subscription may have them."""
    session_expiry: int | None = None
    """Seconds for which it keeps the session, if it is not as long as asked for."""


class Incoming(NamedTuple):
    """A message that the broker sent."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    properties: MqttProperties | None
    packet_id: int


def new_paho(login: Login) -> paho.Client:
    """Return a client that is ready to connect."""
    url = urlsplit(login.url)
    is_unix = url.scheme == "unix"
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=login.client_id,
        protocol=paho.MQTTv5,
        transport="unix" if is_unix else "tcp",
        reconnect_on_failure=False,
        manual_ack=True,
    )
    # It would go by a limit of its own, not by the broker's, and let QoS 0 pass by what waits for it.
    client.max_inflight_messages_set(0xFFFF)
    client.username_pw_set(login.username, login.password)
    if url.scheme == "mqtts":
        client.tls_set_context(login.tls)
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = login.session_expiry
    properties.ReceiveMaximum = login.receive_maximum
    client.connect_async(
        url.path if is_unix else url.hostname or "",
        url.port or (_TLS_PORT if url.scheme == "mqtts" else _PORT),
        keepalive=_KEEPALIVE_SECONDS,
        clean_start=login.clean_start,
        properties=properties,
    )
    return client


def options(subscription: Subscription) -> SubscribeOptions:
    """Return what MQTT 5 calls the subscription's options."""
    return SubscribeOptions(
        qos=subscription.qos,
        noLocal=subscription.no_local,
        retainAsPublished=subscription.as_published,
        retainHandling=SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE
        if subscription.retained
        else SubscribeOptions.RETAIN_DO_NOT_SEND,
    )


def limits_of(told: Properties) -> BrokerLimits:
    """Return what the properties of an answer to CONNECT say."""
    return BrokerLimits(
        qos=getattr(told, "MaximumQoS", 2),
        receive_maximum=getattr(told, "ReceiveMaximum", 0xFFFF),
        packet_bytes=getattr(told, "MaximumPacketSize", None),
        wildcards=getattr(told, "WildcardSubscriptionAvailable", 1) != 0,
        session_expiry=getattr(told, "SessionExpiryInterval", None),
    )


def _read_text(buffer: bytes, size: int) -> tuple[str, int]:
    """Read a text of a packet's properties, of which `size` bytes are left; return it and how many bytes it took.

    paho's own refuses U+FEFF and NUL, and so the packet, and so the connection, in which the broker would send it
    again for ever: one device could keep everybody's messages away.
    """
    end = 2 + int.from_bytes(buffer[:2], "big")
    if end > size:
        raise MalformedPacket("a text is cut off")
    return bytes(buffer[2:end]).decode("utf-8", "surrogateescape"), end


paho_properties.readUTF = _read_text


def pack(properties: MqttProperties) -> Properties:
    """Return the properties of a publish; raises paho's errors for what does not fit."""
    packed = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if properties.content_type is not None:
        packed.ContentType = properties.content_type
    if properties.expiry_seconds is not None:
        packed.MessageExpiryInterval = properties.expiry_seconds
    if properties.user:
        packed.UserProperty = list(properties.user)
    # paho finds out what does not fit when it has taken note of the message already.
    packed.pack()  # type: ignore[no-untyped-call]
    return packed


def unpack(packed: Properties) -> MqttProperties | None:
    """Return what the bridge carries of a publish's properties."""
    if packed.isEmpty():  # type: ignore[no-untyped-call]
        return None
    return MqttProperties(
        content_type=getattr(packed, "ContentType", None),
        expiry_seconds=getattr(packed, "MessageExpiryInterval", None),
        user=tuple(getattr(packed, "UserProperty", ())),
    )
