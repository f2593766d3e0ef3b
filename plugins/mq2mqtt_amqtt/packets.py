"""The MQTT 3.1.1 packets that the bridge itself writes and reads on a device's connection. Pure."""

import struct
from dataclasses import dataclass
from typing import Final

__all__ = [
    "PINGRESP",
    "PUBACK",
    "PUBCOMP",
    "PUBREC",
    "PUBREL",
    "Frame",
    "MalformedPacketError",
    "Publish",
    "acknowledgement",
    "packet_id",
    "parse_publish",
]

PUBACK: Final = 0x40
PUBREC: Final = 0x50
PUBREL: Final = 0x62
PUBCOMP: Final = 0x70
PINGRESP: Final = b"\xd0\x00"

_PUBLISH = 0x30
_RETAIN, _DUP = 0x01, 0x08
_MAX_QOS = 2
_CONTINUE = 0x80
_ACKNOWLEDGEMENT = struct.Struct("!BBH")
_U16 = struct.Struct("!H")


class MalformedPacketError(Exception):
    """A device sent bytes that are no MQTT 3.1.1 packet; the text cites the clause. Its connection is closed."""


@dataclass(slots=True)
class Publish:
    """A PUBLISH as a device sent it. `packet_id` is 0 with QoS 0."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    packet_id: int


def parse_publish(flags: int, body: bytes) -> Publish:
    """Read the PUBLISH with these fixed-header flags and everything behind the fixed header.

    Raises:
        MalformedPacketError: it is not well-formed.
    """
    qos = (flags >> 1) & 3
    if qos > _MAX_QOS:
        raise MalformedPacketError("[MQTT-3.3.1-4] QoS 3")
    try:
        end = 2 + _U16.unpack_from(body)[0]
        if end > len(body):
            raise MalformedPacketError("the topic is longer than the packet")
        topic = body[2:end].decode()
        number = 0
        if qos:
            number = packet_id(body, end)
            end += 2
    except struct.error:
        raise MalformedPacketError("the packet ends too early") from None
    except UnicodeDecodeError:
        raise MalformedPacketError("[MQTT-1.5.3-1] the topic is not UTF-8") from None
    return Publish(topic, body[end:], qos, bool(flags & _RETAIN), bool(flags & _DUP), number)


def packet_id(body: bytes, offset: int = 0) -> int:
    """Read a packet identifier.

    Raises:
        MalformedPacketError: there is none, or it is zero.
    """
    try:
        number: int = _U16.unpack_from(body, offset)[0]
    except struct.error:
        raise MalformedPacketError("the packet ends too early") from None
    if number == 0:
        raise MalformedPacketError("[MQTT-2.3.1-1] packet identifier 0")
    return number


def acknowledgement(kind: int, number: int) -> bytes:
    """Return the packet `kind` (`PUBACK`, `PUBREC`, `PUBREL` or `PUBCOMP`) for a packet identifier."""
    return _ACKNOWLEDGEMENT.pack(kind, 2, number)


class Frame:
    """A PUBLISH to any number of receivers with one QoS, retain 0: encoded once, but for the packet identifier."""

    __slots__ = ("_head", "_tail", "qos")

    def __init__(self, topic: str, payload: bytes, qos: int) -> None:
        name = topic.encode()
        length = 2 + len(name) + (2 if qos else 0) + len(payload)
        head = bytearray((_PUBLISH | qos << 1,))
        while True:
            length, low = length >> 7, length & 0x7F
            head.append(low | _CONTINUE if length else low)
            if not length:
                break
        head += _U16.pack(len(name))
        head += name
        self.qos = qos
        self._head = bytes(head) if qos else bytes(head) + payload
        self._tail = payload

    def encode(self, number: int) -> bytes:
        """Return the packet; `number` is its packet identifier, ignored with QoS 0."""
        if not self.qos:
            return self._head
        return b"".join((self._head, _U16.pack(number), self._tail))
