"""An asyncio client of Apache RocketMQ's remoting protocol (4.9 and 5.x). It stands alone within this package."""

from mq2mqtt.rocketmq.client import Client
from mq2mqtt.rocketmq.codec import MAX_BODY, decode_messages, encoded_size
from mq2mqtt.rocketmq.codes import RequestCode, ResponseCode
from mq2mqtt.rocketmq.errors import (
    AnswerError,
    DecodeError,
    FrameError,
    GroupNotFound,
    MessageIllegal,
    NoPermission,
    NotConnected,
    RequestTimeout,
    RocketMQError,
    ServiceNotAvailable,
    SystemBusy,
    TopicNotFound,
)
from mq2mqtt.rocketmq.message import EncodedMessages, ReceivedMessage, Sendable
from mq2mqtt.rocketmq.producer import Producer
from mq2mqtt.rocketmq.remoting import Response
from mq2mqtt.rocketmq.route import ReadQueue, TopicRoute, WriteQueue
from mq2mqtt.rocketmq.sending import SendResult, SendStatus

__all__ = [
    "MAX_BODY",
    "AnswerError",
    "Client",
    "DecodeError",
    "EncodedMessages",
    "FrameError",
    "GroupNotFound",
    "MessageIllegal",
    "NoPermission",
    "NotConnected",
    "Producer",
    "ReadQueue",
    "ReceivedMessage",
    "RequestCode",
    "RequestTimeout",
    "Response",
    "ResponseCode",
    "RocketMQError",
    "SendResult",
    "SendStatus",
    "Sendable",
    "ServiceNotAvailable",
    "SystemBusy",
    "TopicNotFound",
    "TopicRoute",
    "WriteQueue",
    "decode_messages",
    "encoded_size",
]
