"""Everything the RocketMQ client raises on purpose.

`retriable` is true when the same call may succeed later without a change of the message.
"""

# ruff: noqa: N818 - the names are the answers' own, and differ from `mq2mqtt.errors`, into which a driver maps them

from typing import ClassVar

from mq2mqtt.rocketmq.codes import ResponseCode

__all__ = [
    "AnswerError",
    "DecodeError",
    "FrameError",
    "GroupNotFound",
    "MessageIllegal",
    "NoBroker",
    "NoPermission",
    "NotConnected",
    "RequestTimeout",
    "RocketMQError",
    "ServiceNotAvailable",
    "SystemBusy",
    "TopicNotFound",
    "for_code",
]


class RocketMQError(Exception):
    """Base of all errors of the client; any other exception is a bug or a wrong argument."""

    retriable: ClassVar[bool] = False


class NotConnected(RocketMQError):
    """No connection to `address`, or it was lost before the answer.

    `retry_after` is the number of seconds in which calls will fail at once with this error, because the last
    attempt to connect failed just now.
    """

    retriable = True

    def __init__(self, address: str, reason: str, *, retry_after: float = 0.0) -> None:
        super().__init__(f"not connected to {address}: {reason}")
        self.address = address
        self.reason = reason
        self.retry_after = retry_after


class NoBroker(RocketMQError):
    """The name server answers, but no master broker is registered there: RocketMQ is starting, or has lost them all."""

    retriable = True

    def __init__(self, names: str) -> None:
        super().__init__(f"no broker is registered at {names}")


class RequestTimeout(RocketMQError):
    """No answer from `address` within `seconds`; whether the request was carried out is not known."""

    retriable = True

    def __init__(self, address: str, seconds: float) -> None:
        super().__init__(f"no answer from {address} within {seconds:g} s")
        self.address = address
        self.seconds = seconds


class FrameError(RocketMQError):
    """The peer sent bytes that are no remoting frame; the connection is of no further use."""

    retriable = True


class DecodeError(RocketMQError):
    """A stored message that cannot be read.

    Attributes:
        offset: its offset in the queue, where that much could be read.
        position: where its bytes start in the body of the answer.
        raw: its bytes.
        reason: what is wrong with it.
    """

    def __init__(self, reason: str, *, offset: int | None, position: int, raw: bytes) -> None:
        where = "an unknown offset" if offset is None else f"offset {offset}"
        super().__init__(f"message at {where} ({len(raw)} bytes at position {position}) cannot be decoded: {reason}")
        self.reason = reason
        self.offset = offset
        self.position = position
        self.raw = raw


class AnswerError(RocketMQError):
    """RocketMQ answered with an error code; subclasses name the codes that callers tell apart."""

    retriable = True

    def __init__(self, code: int, remark: str, *, address: str = "") -> None:
        # The remark's second line is a link to an FAQ and, after a NullPointerException, a stack trace.
        summary = remark.split("\n", 1)[0]
        super().__init__(f"{address or 'RocketMQ'} answered code {code}: {summary}")
        self.code = code
        self.remark = remark
        self.address = address


class SystemBusy(AnswerError):
    """2: the broker sheds load."""


class ServiceNotAvailable(AnswerError):
    """14: the broker starts, stops, is a replica, or has a full disk."""


class NoPermission(AnswerError):
    """16, or 1 from ACL 1.0: wrong key, no right to the resource, or the topic is not writable or readable."""


class TopicNotFound(AnswerError):
    """17: no name server, or not this broker, knows the topic."""


class GroupNotFound(AnswerError):
    """26: the broker does not know the consumer group and does not create it."""


class MessageIllegal(AnswerError):
    """13, or 1 for a large batch: it cannot be stored as it is (too large, empty, properties too long)."""

    retriable = False


_BY_CODE: dict[int, type[AnswerError]] = {
    ResponseCode.SYSTEM_BUSY: SystemBusy,
    ResponseCode.SERVICE_NOT_AVAILABLE: ServiceNotAvailable,
    ResponseCode.NO_PERMISSION: NoPermission,
    ResponseCode.TOPIC_NOT_EXIST: TopicNotFound,
    ResponseCode.SUBSCRIPTION_GROUP_NOT_EXIST: GroupNotFound,
    ResponseCode.MESSAGE_ILLEGAL: MessageIllegal,
}


# Java exceptions that a broker lets through as code 1 although a code of their own exists (tried on 4.9.7 and 5.3.3).
_BY_EXCEPTION: tuple[tuple[str, type[AnswerError]], ...] = (
    ("org.apache.rocketmq.acl.common.AclException", NoPermission),
    # A single message over the broker's `maxMessageSize` is answered with 13, a batch with one of these.
    ("java.lang.RuntimeException: message size exceeded", MessageIllegal),
    ("java.lang.RuntimeException: message body size exceeded", MessageIllegal),
)


def for_code(code: int, remark: str, *, address: str = "") -> AnswerError:
    """Return the error that stands for an answer code other than 0."""
    if code == ResponseCode.SYSTEM_ERROR:
        for exception, kind in _BY_EXCEPTION:
            if remark.startswith(exception):
                return kind(code, remark, address=address)
    return _BY_CODE.get(code, AnswerError)(code, remark, address=address)
