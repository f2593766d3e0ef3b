"""Frame v1: the bytes of one message on disk. Sans-I/O; `docs/spool.md` is its specification for other writers.

All integers are little-endian. `size` counts what follows the `crc` field, and `crc` is the zlib CRC-32 of it.
"""

import re
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple
from zlib import crc32

from mq2mqtt.message import MqttMessage, MqttProperties
from mq2mqtt.spool.properties import decode_properties, encode_properties

__all__ = [
    "HEADER_BYTES",
    "LEGAL_FLAGS",
    "MAX_FRAME_BYTES",
    "MAX_SEARCH_BYTES",
    "PREFIX_BYTES",
    "VERSION",
    "Frame",
    "FrameKind",
    "accepted_us_of",
    "count_frames",
    "crc_of",
    "decode_frames",
    "encode",
    "encode_publish",
    "find_frame",
    "frame_end",
    "possible_frames",
    "problem_at",
    "size_of",
]

VERSION: Final = 1

HEADER_BYTES: Final = 28
"""Bytes before the client id: the shortest possible frame."""

MAX_FRAME_BYTES: Final = 1 << 29
"""No frame is longer: an MQTT packet holds at most 256 MiB. A larger size is damage."""

MAX_SEARCH_BYTES: Final = 1 << 30
"""What `find_frame` reads at most, a second's work: 16 of the longest segments."""

# version, kind, flags and reserved are read as one u32, the `mark`: one dictionary look-up judges all four.
_HEADER = struct.Struct("<IIIHHIQ")
_SIZE_AND_CRC = struct.Struct("<II")
_FIELDS = struct.Struct("<BBBBHHIQ")
_U32 = struct.Struct("<I")
_ACCEPTED_AT = struct.Struct("<Q")
PREFIX_BYTES: Final = _SIZE_AND_CRC.size
"""Bytes before what the CRC covers."""
_FIELDS_BYTES = _FIELDS.size
_ACCEPTED_POSITION = HEADER_BYTES - _ACCEPTED_AT.size

_RETAIN, _CLEAN_SESSION, _WILL = 0x04, 0x08, 0x10
_QOS_MASK = 0x03
_KNOWN_FLAGS = 0x1F


LEGAL_FLAGS: Final = tuple(flags for flags in range(_KNOWN_FLAGS + 1) if flags & _QOS_MASK != _QOS_MASK)
"""Every value that the flags of a frame can have."""


def _legal_marks() -> dict[int, tuple[int, int]]:
    return {VERSION | kind << 8 | flags << 16: (kind, flags) for kind in range(1, 5) for flags in LEGAL_FLAGS}


_MARKS: Final = _legal_marks()
"""Every legal `mark`, with its kind and flags."""

# Bytes of a header that are the same in every frame: version, a known kind, flags, reserved. A cheap filter
# for `find_frame`, which has to look at every byte of a damaged file.
_MARK = re.compile(rb"(?s)(?=\x01[\x01-\x04][\x00-\x1f]\x00)")

Buffer = bytes | bytearray | memoryview


class FrameKind(IntEnum):
    """What a frame holds."""

    PUBLISH = 1
    """An MQTT publish; properties are MQTT 5's own encoding."""
    EVENT = 2
    """A client event; the payload is JSON, the topic empty."""
    ROCKETMQ = 3
    """A RocketMQ message (a parked inbound one); properties are RocketMQ's `key 0x01 value 0x02`, payload its body."""
    PARKED = 4
    """A parked record: client id is its key, topic the reason, payload the whole frame it is about."""


_KINDS: Final = frozenset(FrameKind)


class Frame(NamedTuple):
    """A decoded frame. Texts that are not UTF-8 keep their bytes as lone surrogates (`surrogateescape`)."""

    kind: int
    """A `FrameKind`."""
    flags: int
    accepted_us: int
    """When it was accepted (parked, for a parked record): microseconds since 1970."""
    client_id: str
    topic: str
    properties: bytes
    """As encoded; `mqtt_properties` decodes a publish's."""
    payload: bytes

    @property
    def qos(self) -> int:
        """QoS the publisher chose."""
        return self.flags & _QOS_MASK

    @property
    def retain(self) -> bool:
        """The publisher's retain flag."""
        return self.flags & _RETAIN != 0

    @property
    def clean_session(self) -> bool:
        """Clean session (MQTT 5: clean start without expiry) of the publisher's connection."""
        return self.flags & _CLEAN_SESSION != 0

    @property
    def will(self) -> bool:
        """Whether this is a dead client's will."""
        return self.flags & _WILL != 0

    @property
    def mqtt_properties(self) -> MqttProperties | None:
        """The MQTT 5 properties of a publish; `None` without any that the bridge knows.

        Raises:
            UnmappableMessageError: the section is malformed (a faulty writer: the frame's CRC is right).
        """
        return decode_properties(self.properties) if self.properties else None


def encode_publish(message: MqttMessage, *, accepted_us: int, will: bool = False) -> bytes:
    """Return the frame of a publish.

    Raises:
        ValueError: client id or topic are longer than 65535 bytes, which MQTT cannot carry either.
    """
    flags = message.qos
    if message.retain:
        flags |= _RETAIN
    if message.clean_session:
        flags |= _CLEAN_SESSION
    if will:
        flags |= _WILL
    properties = message.properties
    return encode(
        Frame(
            1,
            flags,
            accepted_us,
            message.client_id,
            message.topic,
            encode_properties(properties) if properties is not None else b"",
            message.payload,
        )
    )


def encode(frame: Frame) -> bytes:
    """Return the bytes of `frame`; the exact inverse of decoding it.

    Raises:
        ValueError: a field does not fit its place.
    """
    kind, flags, accepted_us, client_text, topic_text, properties, payload = frame
    client_id = client_text.encode("utf-8", "surrogateescape")
    topic = topic_text.encode("utf-8", "surrogateescape")
    if flags & ~_KNOWN_FLAGS or flags & _QOS_MASK == _QOS_MASK:
        raise ValueError(f"frame flags {flags:#x} are not legal")
    try:
        fields = _FIELDS.pack(VERSION, kind, flags, 0, len(client_id), len(topic), len(properties), accepted_us)
        head = b"".join((fields, client_id, topic, properties))
        size = len(head) + len(payload)
        if size > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {size} bytes is longer than {MAX_FRAME_BYTES}")
        return b"".join((_SIZE_AND_CRC.pack(size, crc32(payload, crc32(head))), head, payload))
    except struct.error as error:
        raise ValueError(f"a field does not fit into a frame: {error}") from error


def decode_frames(
    buffer: bytes, start: int, *, max_frames: int, max_bytes: int = MAX_FRAME_BYTES
) -> tuple[list[Frame], list[int]]:
    """Decode the whole, sound frames from `start` on.

    Stops before the first one that is cut off by the buffer's end or damaged (`problem_at` tells which), after
    `max_frames`, or before `max_bytes` of frames would be exceeded; the first frame always counts as within them.

    Returns:
        The frames, and for each the position in `buffer` where it ends.
    """
    frames: list[Frame] = []
    ends: list[int] = []
    add_frame, add_end, unpack, make = frames.append, ends.append, _HEADER.unpack_from, tuple.__new__
    marks = _MARKS
    view = memoryview(buffer)
    position, limit = start, len(buffer)
    stop_at = start + max_bytes
    while position + HEADER_BYTES <= limit and len(frames) < max_frames:
        size, crc, mark, client_bytes, topic_bytes, property_bytes, accepted_us = unpack(buffer, position)
        body = position + PREFIX_BYTES
        end = body + size
        if end > limit or (end > stop_at and frames):
            break
        client_at = position + HEADER_BYTES
        topic_at = client_at + client_bytes
        properties_at = topic_at + topic_bytes
        payload_at = properties_at + property_bytes
        # What is wrong is worked out by `problem_at`, off the hot path.
        if payload_at > end or mark not in marks or crc32(view[body:end]) != crc:
            break
        kind, flags = marks[mark]
        add_frame(
            make(
                Frame,
                (
                    kind,
                    flags,
                    accepted_us,
                    str(buffer[client_at:topic_at], "utf-8", "surrogateescape"),
                    str(buffer[topic_at:properties_at], "utf-8", "surrogateescape"),
                    buffer[properties_at:payload_at],
                    buffer[payload_at:end],
                ),
            )
        )
        add_end(end)
        position = end
    return frames, ends


def size_of(buffer: Buffer, position: int) -> int | None:
    """Return the length of the whole frame at `position` as its header claims it, `None` without 4 bytes of it."""
    if position + _U32.size > len(buffer):
        return None
    return int(_U32.unpack_from(buffer, position)[0]) + PREFIX_BYTES


def accepted_us_of(header: Buffer) -> int:
    """Return the accepted time in the first `HEADER_BYTES` of a frame."""
    return int(_ACCEPTED_AT.unpack_from(header, _ACCEPTED_POSITION)[0])


def _header_problem(buffer: Buffer, position: int) -> str | None:
    """Say what cannot be right in the header at `position`."""
    size, _, mark, client_bytes, topic_bytes, property_bytes, _ = _HEADER.unpack_from(buffer, position)
    version, kind, flags, reserved = mark.to_bytes(4, "little")
    if not _FIELDS_BYTES <= size <= MAX_FRAME_BYTES:
        return f"impossible frame size {size}"
    if version != VERSION:
        return f"frame version {version}, this program knows {VERSION}"
    if kind not in _KINDS:
        return f"unknown frame kind {kind}"
    if mark not in _MARKS:
        return f"illegal frame flags {flags:#04x}, reserved byte {reserved:#04x}"
    if _FIELDS_BYTES + client_bytes + topic_bytes + property_bytes > size:
        return f"fields longer than the frame size {size}"
    return None


def problem_at(buffer: Buffer, position: int) -> str | None:
    """Say what is wrong with the frame at `position`; `None` when it is sound or its header sound but the rest cut."""
    if position + HEADER_BYTES > len(buffer):
        return None
    problem = _header_problem(buffer, position)
    if problem is None and frame_end(buffer, position) is None:
        body = position + PREFIX_BYTES
        size, _ = _SIZE_AND_CRC.unpack_from(buffer, position)
        if body + size <= len(buffer):
            return "CRC mismatch"
    return problem


def frame_end(buffer: Buffer, position: int) -> int | None:
    """Return where the frame at `position` ends if it is whole and sound, else `None`."""
    if position + HEADER_BYTES > len(buffer) or _header_problem(buffer, position) is not None:
        return None
    size, crc = _SIZE_AND_CRC.unpack_from(buffer, position)
    body = position + PREFIX_BYTES
    end = int(body + size)
    if end > len(buffer) or crc32(memoryview(buffer)[body:end]) != crc:
        return None
    return end


def count_frames(buffer: Buffer, start: int) -> tuple[int, int]:
    """Walk over the whole, sound frames from `start` on; return their number and where the last one ends."""
    count, position, limit = 0, start, len(buffer)
    view = memoryview(buffer)
    unpack, marks = _HEADER.unpack_from, _MARKS
    while position + HEADER_BYTES <= limit:
        size, crc, mark, client_bytes, topic_bytes, property_bytes, _ = unpack(buffer, position)
        body = position + PREFIX_BYTES
        end = body + size
        if (
            end > limit
            or position + HEADER_BYTES + client_bytes + topic_bytes + property_bytes > end
            or mark not in marks
            or crc32(view[body:end]) != crc
        ):
            break
        count += 1
        position = end
    return count, position


def crc_of(buffer: Buffer, position: int) -> int:
    """Return the CRC that the frame at `position` states."""
    return int(_SIZE_AND_CRC.unpack_from(buffer, position)[1])


def possible_frames(buffer: bytes, start: int) -> Iterator[int]:
    """Yield every position from `start` on, at whatever byte, where a frame's header could begin."""
    for match in _MARK.finditer(buffer, start + PREFIX_BYTES):
        yield match.start() - PREFIX_BYTES


def find_frame(buffer: bytes, start: int) -> int | None:
    """Return the position of the first sound frame at or after `start`, at whatever byte, or `None`.

    A payload may be made of headers that announce long frames, and reading each of them would take hours: the search
    ends when it has read `MAX_SEARCH_BYTES`.
    """
    left = MAX_SEARCH_BYTES
    for position in possible_frames(buffer, start):
        if frame_end(buffer, position) is not None:
            return position
        size = size_of(buffer, position) or 0
        if size <= len(buffer) - position:
            left -= size
        if left < 0:
            break
    return None
