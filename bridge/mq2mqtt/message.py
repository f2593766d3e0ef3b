"""What travels: MQTT messages, RocketMQ messages, and a client's comings and goings."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

__all__ = [
    "ClientEvent",
    "ClientEventType",
    "MqttMessage",
    "MqttProperties",
    "ReceivedMessage",
    "RocketMessage",
]


@dataclass(frozen=True, slots=True)
class MqttProperties:
    """The MQTT 5 properties that the property contract carries (spec 3.3); empty with MQTT 3.1.1."""

    content_type: str | None = None
    expiry_seconds: int | None = None
    user: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class MqttMessage:
    """An application message as MQTT knows it.

    `client_id` is the publisher's; empty for a message that RocketMQ sent. `clean_session` is the sender's
    flag: it decides whether a P2P message is kept for a client that is away (spec 6).
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    client_id: str = ""
    clean_session: bool = True
    properties: MqttProperties | None = None


@dataclass(frozen=True, slots=True)
class RocketMessage:
    """A message to send to RocketMQ; `properties` includes `TAGS` and `KEYS`."""

    topic: str
    body: bytes
    properties: dict[str, str] = field(default_factory=dict)


class ReceivedMessage(Protocol):
    """What the bridge reads of a message that a link driver received."""

    @property
    def topic(self) -> str:
        """RocketMQ topic."""

    @property
    def body(self) -> bytes:
        """Body, decompressed."""

    @property
    def properties(self) -> dict[str, str]:
        """User properties and RocketMQ's own (`TAGS`, `KEYS`, `UNIQ_KEY`)."""

    @property
    def born_ms(self) -> int:
        """When the producer made it, by its clock: milliseconds since 1970."""

    @property
    def broker(self) -> str:
        """Name of the broker it came from."""

    @property
    def queue_id(self) -> int:
        """Queue of the topic on that broker."""

    @property
    def offset(self) -> int:
        """Offset in the queue."""


class ClientEventType(StrEnum):
    """The event types of a status rule (spec 5.2); also the RocketMQ tag."""

    CONNECT = "connect"
    DISCONNECT = "disconnect"
    TCPCLEAN = "tcpclean"


@dataclass(frozen=True, slots=True)
class ClientEvent:
    """A client came or went. `channel_id` is one per TCP connection; `time_ms` is milliseconds since 1970."""

    type: ClientEventType
    client_id: str
    channel_id: str
    client_ip: str
    time_ms: int
