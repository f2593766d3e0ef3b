"""MQTT 5 packets, as far as a program that publishes, subscribes and acknowledges needs them. Sans-I/O.

A library of its own would be `paho-mqtt`: it blocks while it connects, and takes 80 to 120 us for each message that it
receives, where the bridge as a whole has 25.
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = [
    "PINGREQ",
    "Connack",
    "Decoder",
    "Disconnect",
    "MqttError",
    "Packet",
    "Publish",
    "Suback",
    "connect_packet",
    "disconnect_packet",
    "publish_packet",
    "reason_text",
    "subscribe_packet",
]

_CONNECT, _CONNACK, _PUBLISH, _SUBSCRIBE, _SUBACK = 1, 2, 3, 8, 9
_UNSUBACK, _PINGRESP, _DISCONNECT = 11, 13, 14
_VERSION = 5
_FOREVER = 0xFFFFFFFF
_MAX_LENGTH_BYTES = 4
_U16 = struct.Struct(">H")

PINGREQ: Final = b"\xc0\x00"

# MQTT 5, table 2-6: those that an operator can do something about.
_REASONS: Final = {
    0x82: "protocol error",
    0x84: "the broker does not speak MQTT 5",
    0x85: "the broker does not allow this client id",
    0x86: "wrong user name or password",
    0x87: "not authorized",
    0x88: "the broker is not available",
    0x89: "the broker is busy",
    0x8A: "banned",
    0x8B: "the broker is shutting down",
    0x8D: "keep alive timeout",
    0x8E: "another client took over the client id",
    0x95: "packet too large",
    0x97: "quota exceeded",
    0x98: "closed by an administrator",
}


class MqttError(Exception):
    """The broker refused something, or what it sends is no MQTT 5."""


class Connack(NamedTuple):
    """Answer to a CONNECT."""

    session_present: bool
    reason: int


class Publish(NamedTuple):
    """A message."""

    topic: str
    payload: bytes


class Suback(NamedTuple):
    """Answer to a SUBSCRIBE or UNSUBSCRIBE."""

    packet_id: int
    reasons: bytes


class Disconnect(NamedTuple):
    """The broker closes the connection."""

    reason: int


Packet = Connack | Publish | Suback | Disconnect | None
"""`None` is the answer to a PINGREQ."""


def reason_text(reason: int) -> str:
    """Return the words for a reason code that is a failure."""
    return _REASONS.get(reason, f"reason code {reason:#04x}")


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogateescape")
    return _U16.pack(len(data)) + data


def _packet(first: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    length = bytearray()
    rest = len(body)
    while True:
        rest, digit = rest >> 7, rest & 0x7F
        length.append(digit | (0x80 if rest else 0))
        if not rest:
            return bytes((first,)) + length + body


def connect_packet(*, client_id: str, username: str | None, password: str | None, keepalive: int) -> bytes:
    """Return a CONNECT for a session that the broker keeps for ever."""
    flags = (0x80 if username is not None else 0) | (0x40 if password is not None else 0)
    session_expiry = b"\x05\x11" + _FOREVER.to_bytes(4, "big")
    parts = [_text("MQTT"), bytes((_VERSION, flags)), _U16.pack(keepalive), session_expiry, _text(client_id)]
    parts += [_text(value) for value in (username, password) if value is not None]
    return _packet(_CONNECT << 4, *parts)


def publish_packet(topic: str, payload: bytes) -> bytes:
    """Return a PUBLISH with QoS 0, without properties."""
    return _packet(_PUBLISH << 4, _text(topic), b"\0", payload)


def subscribe_packet(packet_id: int, filters: Sequence[tuple[str, int]]) -> bytes:
    """Return a SUBSCRIBE: topic filters with their QoS, without retained messages."""
    # Bits 4 and 5: never send retained messages.
    topics = b"".join(_text(name) + bytes((qos | 0x20,)) for name, qos in filters)
    return _packet(_SUBSCRIBE << 4 | 2, _U16.pack(packet_id), b"\0", topics)


def disconnect_packet() -> bytes:
    """Return a DISCONNECT that is no failure."""
    return bytes((_DISCONNECT << 4, 0))


class Decoder:
    """Takes bytes as they come, gives whole packets."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Packet]:
        """Return the packets that `data` completes.

        Raises:
            MqttError: this is no MQTT 5; nothing more can be decoded.
        """
        self._buffer += data
        packets: list[Packet] = []
        position = 0
        while (bounds := self._bounds(position)) is not None:
            start, end = bounds
            body = bytes(memoryview(self._buffer)[start:end])
            try:
                packets.append(_decode(self._buffer[position], body))
            except (struct.error, IndexError):
                raise MqttError("the broker sent a packet that is cut off") from None
            position = end
        del self._buffer[:position]
        return packets

    def _bounds(self, position: int) -> tuple[int, int] | None:
        """Return where the body of the packet at `position` begins and ends, if it is whole."""
        length, shift = 0, 0
        for at in range(position + 1, min(position + 1 + _MAX_LENGTH_BYTES, len(self._buffer))):
            digit = self._buffer[at]
            length |= (digit & 0x7F) << shift
            shift += 7
            if not digit & 0x80:
                end = at + 1 + length
                return (at + 1, end) if end <= len(self._buffer) else None
        if shift == 7 * _MAX_LENGTH_BYTES:
            raise MqttError("the broker sent a packet of impossible length")
        return None


def _decode(first: int, body: bytes) -> Packet:
    kind = first >> 4
    if kind == _PUBLISH:
        return _decode_publish(first, body)
    if kind == _CONNACK:
        return Connack(body[0] & 1 != 0, body[1])
    if kind in {_SUBACK, _UNSUBACK}:
        (packet_id,) = _U16.unpack_from(body)
        return Suback(packet_id, body[_properties_end(body, 2) :])
    if kind == _DISCONNECT:
        return Disconnect(body[0] if body else 0)
    if kind == _PINGRESP:
        return None
    raise MqttError(f"the broker sent a packet of kind {kind}")


def _decode_publish(first: int, body: bytes) -> Publish:
    (size,) = _U16.unpack_from(body)
    end = 2 + size
    if end > len(body):
        raise MqttError("the broker sent a packet that is cut off")
    topic = body[2:end].decode("utf-8", "surrogateescape")
    if first & 0x06:
        # Nothing that comes with a higher QoS is wanted: the hook denies it.
        raise MqttError(f"the broker sent a message of {topic} that was not asked for")
    return Publish(topic, body[_properties_end(body, end) :])


def _properties_end(body: bytes, position: int) -> int:
    """Return the position after the properties that begin with their length at `position`."""
    length, shift = 0, 0
    while True:
        digit = body[position]
        position += 1
        length |= (digit & 0x7F) << shift
        shift += 7
        if not digit & 0x80:
            break
    if position + length > len(body):
        raise MqttError("the broker sent a packet that is cut off")
    return position + length
