"""Bodies: batches of messages to send, and stored messages as a pull answers them. No I/O."""

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Final

import lz4.frame
import zstandard

from mq2mqtt.rocketmq.codes import ResponseCode
from mq2mqtt.rocketmq.errors import DecodeError, MessageIllegal
from mq2mqtt.rocketmq.message import UNIQ_KEY, EncodedMessages, ReceivedMessage, Sendable
from mq2mqtt.rocketmq.properties import MAX_PROPERTIES, decode_properties, encode_properties

__all__ = ["MAX_BODY", "MAX_INFLATED", "BodyEncoder", "decode_messages", "encoded_size"]

MAX_BODY: Final = 4 * 1024 * 1024  # the broker's default for a message and for a whole batch (`maxMessageSize`)
# Bounds what a compressed body may swell to: a few kilobytes can announce gigabytes.
MAX_INFLATED: Final = 64 * 1024 * 1024
_ZSTD_WINDOW: Final = 128 * 1024 * 1024  # what zstd's own decoders accept
_ZSTD_STEP: Final = 1024

_BATCH_ENTRY: Final = struct.Struct(">i12xi")  # in between magic, CRC and flag: brokers make their own
_BATCH_OVERHEAD: Final = _BATCH_ENTRY.size + 2
_UNIQ_PREFIX: Final = f"{UNIQ_KEY}\x01"
_UNIQ_LENGTH: Final = len(_UNIQ_PREFIX) + 32 + 1
_LENGTH_16: Final = struct.Struct(">H")

_MAGIC_V1: Final = -626843481
_MAGIC_V2: Final = -626843477
_SIZE: Final = struct.Struct(">i")
_HEAD: Final = struct.Struct(">iiiiiqqiq")  # up to and with the born time
_TAIL_V4: Final = struct.Struct(">q8siqi")  # from the stored time up to the body, store host IPv4
_TAIL_V6: Final = struct.Struct(">q20siqi")
_PLAIN: Final = struct.Struct(">iiiiiqqiq8xq8siqi")  # the whole, both hosts IPv4
_OFFSET: Final = struct.Struct(">q")
_OFFSET_POSITION: Final = 20
_COMPRESSED: Final = 0x1
_BORN_HOST_V6: Final = 0x10
_STORE_HOST_V6: Final = 0x20
_INNER_BATCH: Final = 0x80
_SPECIAL: Final = _COMPRESSED | _BORN_HOST_V6 | _STORE_HOST_V6 | _INNER_BATCH


def encoded_size(message: Sendable) -> int:
    """Return the number of bytes that `message` takes in a batch, its `UNIQ_KEY` included.

    Raises:
        MessageIllegal: it can never be sent as it is.
    """
    _check_body(message.body)
    length = len(_utf8(encode_properties(message.properties)))
    if not message.properties.get(UNIQ_KEY):
        length += _UNIQ_LENGTH
    _check_properties(length)
    return _BATCH_OVERHEAD + len(message.body) + length


class BodyEncoder:
    """Encodes messages for sending; gives each a `UNIQ_KEY` from `take_ids` unless it has one.

    `WAIT=true`, which the Java client adds, is left out: a missing one means the same to every broker.
    """

    __slots__ = ("_take_ids",)

    def __init__(self, take_ids: Callable[[int], list[str]]) -> None:
        self._take_ids = take_ids

    def single(self, message: Sendable) -> tuple[str, str]:
        """Return the properties as text, and the message's id.

        Raises:
            MessageIllegal: the body is empty or too large, or the properties cannot be encoded.
        """
        _check_body(message.body)
        unique = message.properties.get(UNIQ_KEY) or ""
        text = encode_properties(message.properties)
        if not unique:
            unique = self._take_ids(1)[0]
            text = f"{text}{_UNIQ_PREFIX}{unique}\x02"
        # Only non-ASCII text can be longer in UTF-8; it never shrinks.
        length = len(text) if text.isascii() else len(_utf8(text))
        _check_properties(length)
        return text, unique

    def batch(self, messages: Sequence[Sendable] | EncodedMessages) -> tuple[bytes, tuple[str, ...]]:
        """Return the body of a batch, and the messages' ids.

        Raises:
            MessageIllegal: a message cannot be encoded, or the whole is over `MAX_BODY`.
        """
        ids = self._take_ids(len(messages))
        if isinstance(messages, EncodedMessages):
            pairs = zip(messages.property_texts, ids, strict=True)
            texts = [f"{text}{_UNIQ_PREFIX}{unique}\x02" for text, unique in pairs]
            return _batch_body(messages.bodies, texts), tuple(ids)
        texts = []
        for number, message in enumerate(messages):
            text = encode_properties(message.properties)
            unique = message.properties.get(UNIQ_KEY)
            if unique:
                ids[number] = unique
            else:
                text = f"{text}{_UNIQ_PREFIX}{ids[number]}\x02"
            texts.append(text)
        return _batch_body([message.body for message in messages], texts), tuple(ids)


def _batch_body(bodies: Sequence[bytes], texts: Sequence[str]) -> bytes:
    parts: list[bytes] = []
    add_part = parts.append
    pack_entry = _BATCH_ENTRY.pack
    pack_length = _LENGTH_16.pack
    for body, text in zip(bodies, texts, strict=True):
        size = len(body)
        encoded = text.encode() if text.isascii() else _utf8(text)
        length = len(encoded)
        if not 0 < size <= MAX_BODY or length > MAX_PROPERTIES:
            _check_body(body)
            _check_properties(length)
        add_part(b"%b%b%b%b" % (pack_entry(_BATCH_OVERHEAD + size + length, size), body, pack_length(length), encoded))
    whole = b"".join(parts)
    if len(whole) > MAX_BODY:
        raise _illegal(f"a batch of {len(whole)} bytes; at most {MAX_BODY} can be sent")
    return whole


def _check_body(body: bytes) -> None:
    if not body:
        raise _illegal("an empty body cannot be sent")
    if len(body) > MAX_BODY:
        raise _illegal(f"a body of {len(body)} bytes; at most {MAX_BODY} can be sent")


def _check_properties(length: int) -> None:
    if length > MAX_PROPERTIES:
        raise _illegal(f"the properties take {length} bytes; at most {MAX_PROPERTIES} can be sent")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _illegal("a property holds a lone surrogate, which UTF-8 cannot carry") from error


def _illegal(reason: str) -> MessageIllegal:
    return MessageIllegal(ResponseCode.MESSAGE_ILLEGAL, reason, address="this client")


class _TooLargeError(ValueError):
    """A body inflates to more than `MAX_INFLATED`."""


def decode_messages(
    data: bytes,
    *,
    broker: str = "",
    on_error: Callable[[DecodeError], None] | None = None,
    on_rest: Callable[[int], None] | None = None,
) -> list[ReceivedMessage]:
    """Read the messages of a pull's answer.

    A message that cannot be read is given to `on_error`, and the next one is read. When the bodies have inflated to
    `MAX_INFLATED` together, `on_rest` is given the offset of the next one, and no more are read; without it all are.

    Raises:
        DecodeError: a message cannot be read and there is no `on_error`, or its size is wrong, so that the next
            one cannot be found either.
    """
    messages: list[ReceivedMessage] = []
    topics: dict[bytes, str] = {}
    inflated = position = 0
    end = len(data)
    while position < end:
        size = _SIZE.unpack_from(data, position)[0] if end - position >= _SIZE.size else 0
        if not _PLAIN.size < size <= end - position:
            raise DecodeError(
                f"its size is given as {size}, {end - position} bytes remain",
                offset=None,
                position=position,
                raw=data[position:],
            )
        if inflated >= MAX_INFLATED and on_rest is not None:
            on_rest(_offset_of(data, position))
            break
        try:
            message = _decode_one(data, position, broker, topics)
            messages.append(message)
            # Only an inflated body is longer than the message that it came in.
            if len(message.body) > size:
                inflated += len(message.body)
        except (struct.error, ValueError, RuntimeError, EOFError, zlib.error, zstandard.ZstdError) as error:
            # Which of the decompressors' and decoders' errors it is says nothing more than the text does.
            problem = DecodeError(
                str(error) or type(error).__name__,
                offset=_offset_of(data, position),
                position=position,
                raw=data[position : position + size],
            )
            if isinstance(error, _TooLargeError):
                inflated += MAX_INFLATED
            if on_error is None:
                raise problem from error
            on_error(problem)
        position += size
    return messages


def _offset_of(data: bytes, position: int) -> int:
    return int(_OFFSET.unpack_from(data, position + _OFFSET_POSITION)[0])


def _decode_one(data: bytes, position: int, broker: str, topics: dict[bytes, str]) -> ReceivedMessage:
    (
        size, magic, _crc, queue_id, flag, offset, commit_log_offset, sys_flag,
        born_ms, stored_ms, store_host, reconsume_times, _prepared, body_length,
    ) = _PLAIN.unpack_from(data, position)  # fmt: skip
    start = position + _PLAIN.size
    if sys_flag & (_BORN_HOST_V6 | _STORE_HOST_V6):
        start = position + _HEAD.size + (20 if sys_flag & _BORN_HOST_V6 else 8)
        tail = _TAIL_V6 if sys_flag & _STORE_HOST_V6 else _TAIL_V4
        stored_ms, store_host, reconsume_times, _prepared, body_length = tail.unpack_from(data, start)
        start += tail.size
    limit = position + size
    topic_start = start + body_length
    if body_length < 0 or topic_start >= limit:
        raise ValueError(f"a body of {body_length} bytes is announced in a message of {size}")
    body = data[start:topic_start]
    if magic == _MAGIC_V1:
        topic_end = topic_start + 1 + data[topic_start]
        raw_topic = data[topic_start + 1 : topic_end]
    elif magic == _MAGIC_V2:
        topic_end = topic_start + 2 + _LENGTH_16.unpack_from(data, topic_start)[0]
        raw_topic = data[topic_start + 2 : topic_end]
    else:
        raise ValueError(f"magic number {magic} is unknown")
    topic = topics.get(raw_topic)
    if topic is None:
        topic = topics[raw_topic] = raw_topic.decode()
    properties_start = topic_end + 2
    properties_end = properties_start + _LENGTH_16.unpack_from(data, topic_end)[0]
    if properties_end > limit:
        raise ValueError("the topic or the properties are longer than the message")
    if sys_flag & _SPECIAL:
        if sys_flag & _INNER_BATCH:
            raise ValueError("batches stored as one message (BatchCQ topics) are not supported")
        if sys_flag & _COMPRESSED:
            body = _decompress(body, sys_flag >> 8 & 7)
            sys_flag &= ~_COMPRESSED
    return ReceivedMessage(
        topic, body, decode_properties(data[properties_start:properties_end].decode()), broker, queue_id, offset,
        commit_log_offset, born_ms, stored_ms, sys_flag, flag, reconsume_times, store_host,
    )  # fmt: skip


def _decompress(body: bytes, kind: int) -> bytes:
    # MessageSysFlag.getCompressionType: 0 is what clients before 4.9.3 wrote for zlib.
    if kind in (0, 3):
        inflater = zlib.decompressobj()
        inflated = inflater.decompress(body, MAX_INFLATED + 1)
        complete = inflater.eof
    elif kind == 1:
        frames = lz4.frame.LZ4FrameDecompressor()  # type: ignore[no-untyped-call]
        inflated = frames.decompress(body, MAX_INFLATED + 1)  # type: ignore[no-untyped-call]
        complete = frames.eof
    elif kind == 2:  # noqa: PLR2004 - CompressionType.ZSTD
        inflated, complete = _inflate_zstd(body)
    else:
        raise ValueError(f"compression type {kind} is unknown")
    if len(inflated) > MAX_INFLATED:
        raise _TooLargeError(f"the body inflates to more than {MAX_INFLATED} bytes")
    if not complete:
        raise ValueError("the compressed body is cut short")
    return inflated


def _inflate_zstd(body: bytes) -> tuple[bytes, bool]:
    """Return at least what is within the bound, and whether the frame ended."""
    # `stream_reader` bounds its output but does not tell a frame that is cut short; this object does the reverse, so
    # it is fed little by little: 4 bytes can stand for 128 KiB.
    inflater = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
    parts: list[bytes] = []
    total = position = 0
    while position < len(body) and total <= MAX_INFLATED and not inflater.eof:
        parts.append(inflater.decompress(body[position : position + _ZSTD_STEP]))
        total += len(parts[-1])
        position += _ZSTD_STEP
    return b"".join(parts), inflater.eof
