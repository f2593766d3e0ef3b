"""Frames of send requests, made by hand: the JSON of a queue's header is the same but for four values. No I/O."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from json.encoder import encode_basestring_ascii
from typing import Final, NamedTuple

from mq2mqtt.rocketmq.acl import Credentials
from mq2mqtt.rocketmq.codec import BodyEncoder
from mq2mqtt.rocketmq.codes import RequestCode
from mq2mqtt.rocketmq.message import EncodedMessages, Sendable
from mq2mqtt.rocketmq.remoting import LANGUAGE, VERSION, encode_request, frame
from mq2mqtt.rocketmq.unique import UniqueIds

__all__ = ["Encoded", "SendEncoder", "SendResult", "SendStatus"]

_MAX_TEMPLATES: Final = 4096


class SendStatus(IntEnum):
    """How a message was stored; every one of them means that it is stored."""

    OK = 0
    FLUSH_DISK_TIMEOUT = 10
    SLAVE_NOT_AVAILABLE = 11
    FLUSH_SLAVE_TIMEOUT = 12


@dataclass(frozen=True, slots=True)
class SendResult:
    """Where messages were stored.

    Attributes:
        status: other than `OK`: stored, but the disk or the replica is late.
        offset: the first message's offset in the queue; -1 when the broker does not say.
        message_ids: the messages' `UNIQ_KEY`s, in order.
    """

    status: SendStatus
    broker: str
    queue_id: int
    offset: int
    message_ids: tuple[str, ...]


class Encoded(NamedTuple):
    """A request ready to go: `encode` puts in the number that the connection gives it."""

    encode: Callable[[int], bytes]
    message_ids: tuple[str, ...]


class SendEncoder:
    """Makes the frames of SEND_MESSAGE_V2 and SEND_BATCH_MESSAGE; signs them when there are credentials."""

    def __init__(self, credentials: Credentials | None) -> None:
        self._credentials = credentials
        self._bodies = BodyEncoder(UniqueIds().take)
        self._templates: dict[tuple[str, str, int, str, bool], str] = {}

    def encode(
        self, topic: str, broker: str, queue_id: int, messages: Sequence[Sendable] | EncodedMessages, *, group: str
    ) -> Encoded:
        """Return the request that stores `messages` in one queue.

        Raises:
            MessageIllegal: one of them cannot be sent.
            ValueError: there are none.
        """
        if not len(messages):
            raise ValueError("there is no message to send")
        if batch := isinstance(messages, EncodedMessages) or len(messages) > 1:
            body, ids = self._bodies.batch(messages)
            properties = ""
        else:
            properties, unique = self._bodies.single(messages[0])
            body, ids = messages[0].body, (unique,)
        born_ms = str(time.time_ns() // 1_000_000)
        if self._credentials is not None:
            fields = _fields(topic, broker, queue_id, group=group, batch=batch)
            signed = self._credentials.sign({**fields, "g": born_ms, "i": properties}, body)
            code = RequestCode.SEND_BATCH_MESSAGE if batch else RequestCode.SEND_MESSAGE_V2
            return Encoded(lambda opaque: encode_request(code, opaque, signed, body), ids)
        head = self._template(topic, broker, queue_id, group, batch)
        tail = f'"g":"{born_ms}","i":{encode_basestring_ascii(properties)}}},"opaque":'
        return Encoded(lambda opaque: frame(f"{head}{tail}{opaque}}}".encode("ascii"), body), ids)

    def _template(self, topic: str, broker: str, queue_id: int, group: str, batch: bool) -> str:  # noqa: FBT001 - the parts of the key
        key = (topic, broker, queue_id, group, batch)
        template = self._templates.get(key)
        if template is None:
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            code = RequestCode.SEND_BATCH_MESSAGE if batch else RequestCode.SEND_MESSAGE_V2
            header = {"code": int(code), "language": LANGUAGE, "version": VERSION, "flag": 0}
            fields = _fields(topic, broker, queue_id, group=group, batch=batch)
            start = json.dumps(header, separators=(",", ":")).removesuffix("}")
            inner = json.dumps(fields, separators=(",", ":")).removesuffix("}")
            template = self._templates[key] = f'{start},"extFields":{inner},'
        return template


def _fields(topic: str, broker: str, queue_id: int, *, group: str, batch: bool) -> dict[str, str]:
    """Return the header fields that are the same for all messages to a queue."""
    return {
        "a": group,
        "b": topic,
        # The default topic, from which a broker with autoCreateTopicEnable makes an unknown topic. The topic's own
        # name is never known then (5.3.3 answers 17), so that a deleted topic does not come back by itself.
        "c": topic,
        "d": "4",
        "e": str(queue_id),
        "f": "0",
        "h": "0",
        "j": "0",
        "k": "false",
        "m": "true" if batch else "false",
        "n": broker,
    }
