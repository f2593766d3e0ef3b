"""Frames of RocketMQ's remoting protocol, without I/O.

`u32 total | u8 serialization (0 JSON, 1 binary) | u24 header length | header | body`, big-endian; `total` counts
everything after itself. Requests are always written with a JSON header, which is what every version reads; the
peer answers in kind, but both kinds are read.
"""

import json
import struct
from typing import Any, Final, NamedTuple

from mq2mqtt.rocketmq.errors import FrameError

__all__ = [
    "LANGUAGE",
    "MAX_FRAME",
    "VERSION",
    "Command",
    "FrameDecoder",
    "Response",
    "encode_request",
    "encode_response",
    "frame",
]

LANGUAGE: Final = "PYTHON"
# The ordinal of V4_9_7 in MQVersion: brokers of 5.x then use nothing that 4.x lacks.
VERSION: Final = 407
MAX_FRAME: Final = 16 * 1024 * 1024  # Java's default, com.rocketmq.remoting.frameMaxLength
_MAX_HEADER: Final = 1024 * 1024
_LENGTHS: Final = struct.Struct(">II")
_BINARY_HEADER: Final = struct.Struct(">hBhiii")
_RESPONSE_FLAG: Final = 1
_ONE_WAY_FLAG: Final = 2


class Command(NamedTuple):
    """One frame that was read: an answer, or a request of the peer."""

    code: int
    opaque: int
    flag: int
    remark: str
    fields: dict[str, str]
    body: bytes

    @property
    def is_response(self) -> bool:
        """Whether this answers a request of ours."""
        return bool(self.flag & _RESPONSE_FLAG)

    @property
    def is_one_way(self) -> bool:
        """Whether the peer wants no answer."""
        return bool(self.flag & _ONE_WAY_FLAG)

    def integer(self, name: str) -> int:
        """Return the integer in field `name`.

        Raises:
            FrameError: there is none.
        """
        try:
            return int(self.fields[name])
        except (KeyError, ValueError, TypeError) as error:
            raise FrameError(f"field {name} of an answer is no integer: {self.fields.get(name)!r}") from error


Response = Command


def frame(header: bytes, body: bytes) -> bytes:
    """Put a JSON header and a body into a frame."""
    return b"".join((_LENGTHS.pack(4 + len(header) + len(body), len(header)), header, body))


def encode_request(code: int, opaque: int, fields: dict[str, str], body: bytes = b"") -> bytes:
    """Return the frame of a request that wants an answer."""
    header = {
        "code": int(code),
        "language": LANGUAGE,
        "version": VERSION,
        "opaque": opaque,
        "flag": 0,
        "extFields": fields,
    }
    return frame(json.dumps(header, separators=(",", ":")).encode(), body)


def encode_response(request: Command, code: int, remark: str = "") -> bytes:
    """Return the frame that answers `request`."""
    header = {
        "code": int(code),
        "language": LANGUAGE,
        "version": VERSION,
        "opaque": request.opaque,
        "flag": _RESPONSE_FLAG,
        "remark": remark,
    }
    return frame(json.dumps(header, separators=(",", ":")).encode(), b"")


class FrameDecoder:
    """Turns the bytes of a connection into commands, however they are cut.

    It keeps at most one incomplete frame, so its memory is bounded by `max_frame` plus one read.
    """

    __slots__ = ("_buffer", "_max_frame")

    def __init__(self, *, max_frame: int = MAX_FRAME) -> None:
        self._buffer = bytearray()
        self._max_frame = max_frame

    def feed(self, data: bytes) -> list[Command]:
        """Return the commands that `data` completes.

        Raises:
            FrameError: these are no frames; the decoder must not be used again.
        """
        source: bytes | bytearray = data
        if self._buffer:
            self._buffer += data
            source = self._buffer
        commands: list[Command] = []
        position = 0
        end = len(source)
        with memoryview(source) as view:
            while end - position >= _LENGTHS.size:
                total, mark = _LENGTHS.unpack_from(source, position)
                header_end = position + _LENGTHS.size + (mark & 0xFFFFFF)
                frame_end = position + 4 + total
                self._check_lengths(total, header_length=mark & 0xFFFFFF)
                if frame_end > end:
                    break
                header = bytes(view[position + _LENGTHS.size : header_end])
                commands.append(_decode(mark >> 24, header, bytes(view[header_end:frame_end])))
                position = frame_end
        if source is self._buffer:
            del self._buffer[:position]
        elif position < end:
            self._buffer += data[position:]
        return commands

    def _check_lengths(self, total: int, *, header_length: int) -> None:
        if total > self._max_frame:
            raise FrameError(f"a frame of {total} bytes is announced; at most {self._max_frame} are read")
        if header_length > total - 4 or header_length > _MAX_HEADER:
            raise FrameError(f"a header of {header_length} bytes is announced in a frame of {total}")


def _decode(serialization: int, header: bytes, body: bytes) -> Command:
    if serialization == 0:
        return _decode_json(header, body)
    if serialization == 1:
        return _decode_binary(header, body)
    raise FrameError(f"header serialization {serialization} is unknown")


def _decode_json(header: bytes, body: bytes) -> Command:
    try:
        values: Any = json.loads(header)
        code, opaque, flag = values["code"], values["opaque"], values["flag"]
        fields = values.get("extFields") or {}
        remark = values.get("remark") or ""
        if type(fields) is dict and not all(type(value) is str for value in fields.values()):
            fields = {name: str(value) for name, value in fields.items() if value is not None}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FrameError(f"the header of a frame is no JSON header: {type(error).__name__}") from error
    well_typed = type(code) is type(opaque) is type(flag) is int and type(fields) is dict and type(remark) is str
    if not well_typed:
        raise FrameError("a field of a frame's header has the wrong type")
    return Command(code, opaque, flag, remark, fields, body)


def _decode_binary(header: bytes, body: bytes) -> Command:
    try:
        code, _language, _version, opaque, flag, remark_length = _BINARY_HEADER.unpack_from(header)
        position = _BINARY_HEADER.size
        remark, position = _text(header, position, remark_length)
        (fields_length,) = struct.unpack_from(">i", header, position)
        position += 4
        end = position + fields_length
        if fields_length < 0 or end > len(header):
            raise FrameError(f"{fields_length} bytes of fields are announced in a header of {len(header)}")
        fields: dict[str, str] = {}
        while position < end:
            (length,) = struct.unpack_from(">h", header, position)
            key, position = _text(header, position + 2, length)
            (length,) = struct.unpack_from(">i", header, position)
            fields[key], position = _text(header, position + 4, length)
    except (struct.error, UnicodeDecodeError) as error:
        raise FrameError(f"the binary header of a frame cannot be read: {error}") from error
    return Command(code, opaque, flag, remark, fields, body)


def _text(header: bytes, position: int, length: int) -> tuple[str, int]:
    end = position + length
    if length < 0 or end > len(header):
        raise FrameError(f"a string of {length} bytes is announced in a header of {len(header)}")
    return header[position:end].decode(), end
