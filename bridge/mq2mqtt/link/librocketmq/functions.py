"""librocketmq's functions as ctypes needs them declared.

The package rocketmq-client-python declares too few of them. The C interface lacks two things that the C++ interface of
the same library has, by names that are the same from 2.0.0 to 2.2.0:

- **Texts with their lengths.** C gives bodies and properties as strings that end at a NUL byte. `MQMessage::getBody`
  and `getProperty` return a `const std::string&`; the name of the first tells that it has the layout of C++11.
- **Offsets.** `DefaultMQPullConsumer` fetches and notes offsets, but its `persistConsumerOffset4PullConsumer` does
  nothing; that of its `impl`, its only member, does. Its answering with the same group shows that it was found.
"""

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_longlong, c_size_t, c_void_p
from typing import Any, Final

__all__ = ["CQueue", "Functions", "PullResult", "SendResult", "Text", "select_queue"]

_STRING: Final = "RKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"

_Prototypes = dict[str, tuple[Any, list[Any]]]


class Text(ctypes.Structure):
    """`std::string`."""

    _fields_ = (("data", c_void_p), ("length", c_size_t))


class SendResult(ctypes.Structure):
    """`CSendResult`."""

    _fields_ = (("status", c_int), ("message_id", ctypes.c_char * 256), ("offset", c_longlong))


class CQueue(ctypes.Structure):
    """`CMessageQueue`."""

    _fields_ = (("topic", ctypes.c_char * 512), ("broker", ctypes.c_char * 256), ("queue_id", c_int))


class PullResult(ctypes.Structure):
    """`CPullResult`."""

    _fields_ = (
        ("status", c_int),
        ("next_offset", c_longlong),
        ("min_offset", c_longlong),
        ("max_offset", c_longlong),
        ("messages", ctypes.POINTER(c_void_p)),
        ("size", c_int),
        ("data", c_void_p),
    )


_Selector: Final = ctypes.CFUNCTYPE(c_int, c_int, c_void_p, c_void_p)


def _select_queue(size: int, _message: int | None, argument: int) -> int:
    # The route may have changed since the caller saw it: what is beyond it is somebody else's memory.
    return (argument - 1) % size


select_queue: Final = _Selector(_select_queue)
"""Chooses the queue of index `argument` - 1: the library takes no argument of 0."""


# These wait for RocketMQ, and let other threads run meanwhile.
_BLOCKING: Final[_Prototypes] = {
    **{f"{step}Producer": (c_int, [c_void_p]) for step in ("Start", "Shutdown", "Destroy")},
    **{f"{step}PullConsumer": (c_int, [c_void_p]) for step in ("Start", "Shutdown", "Destroy")},
    "SendMessageOrderly": (c_int, [c_void_p, c_void_p, _Selector, c_void_p, c_int, ctypes.POINTER(SendResult)]),
    "FetchSubscriptionMessageQueues": (
        c_int,
        [c_void_p, c_char_p, ctypes.POINTER(ctypes.POINTER(CQueue)), ctypes.POINTER(c_int)],
    ),
    "Pull": (PullResult, [c_void_p, ctypes.POINTER(CQueue), c_char_p, c_longlong, c_int]),
}
_BLOCKING_CPP: Final[_Prototypes] = {
    "_ZN8rocketmq21DefaultMQPullConsumer18fetchConsumeOffsetERKNS_14MQMessageQueueEb": (
        c_longlong,
        [c_void_p, c_void_p, c_bool],
    ),
    "_ZN8rocketmq21DefaultMQPullConsumer19updateConsumeOffsetERKNS_14MQMessageQueueEx": (
        None,
        [c_void_p, c_void_p, c_longlong],
    ),
    "_ZN8rocketmq25DefaultMQPullConsumerImpl34persistConsumerOffset4PullConsumerERKNS_14MQMessageQueueE": (
        None,
        [c_void_p, c_void_p],
    ),
}
# These only touch memory; letting other threads run would cost more than they do.
_QUICK: Final[_Prototypes] = {
    **{f"Create{kind}": (c_void_p, [c_char_p]) for kind in ("Message", "Producer", "PullConsumer")},
    "DestroyMessage": (c_int, [c_void_p]),
    **{f"Set{kind}NameServerAddress": (c_int, [c_void_p, c_char_p]) for kind in ("Producer", "PullConsumer")},
    **{f"Set{kind}LogLevel": (c_int, [c_void_p, c_int]) for kind in ("Producer", "PullConsumer")},
    **{f"Set{kind}SessionCredentials": (c_int, [c_void_p, *[c_char_p] * 3]) for kind in ("Producer", "PullConsumer")},
    "SetProducerInstanceName": (c_int, [c_void_p, c_char_p]),
    "SetProducerSendMsgTimeout": (c_int, [c_void_p, c_int]),
    "SetProducerMaxMessageSize": (c_int, [c_void_p, c_int]),
    "ShowProducerVersion": (c_char_p, [c_void_p]),
    "GetLatestErrorMessage": (c_char_p, []),
    "SetByteMessageBody": (c_int, [c_void_p, c_char_p, c_int]),
    "SetMessageProperty": (c_int, [c_void_p, c_char_p, c_char_p]),
    "GetMessageQueueId": (c_int, [c_void_p]),
    "GetMessageQueueOffset": (c_longlong, [c_void_p]),
    "GetMessageCommitLogOffset": (c_longlong, [c_void_p]),
    "GetMessageBornTimestamp": (c_longlong, [c_void_p]),
    "GetMessageStoreTimestamp": (c_longlong, [c_void_p]),
    "GetMessageReconsumeTimes": (c_int, [c_void_p]),
    "ReleaseSubscriptionMessageQueue": (c_int, [ctypes.POINTER(CQueue)]),
    "ReleasePullResult": (c_int, [PullResult]),
}
_QUICK_CPP: Final[_Prototypes] = {
    "_ZNK8rocketmq9MQMessage8getTopicB5cxx11Ev": (c_void_p, [c_void_p]),
    "_ZNK8rocketmq9MQMessage7getBodyB5cxx11Ev": (c_void_p, [c_void_p]),
    f"_ZNK8rocketmq9MQMessage11getPropertyE{_STRING}": (c_void_p, [c_void_p, c_void_p]),
    "_ZNK8rocketmq9MQMessage10getSysFlagEv": (c_int, [c_void_p]),
    "_ZNK8rocketmq12MQMessageExt10getBodyCRCEv": (c_int, [c_void_p]),
    f"_ZN8rocketmq14MQMessageQueueC1E{_STRING}S8_i": (None, [c_void_p, c_void_p, c_void_p, c_int]),
    f"_ZN8rocketmq21DefaultMQPullConsumer15setInstanceNameE{_STRING}": (None, [c_void_p, c_void_p]),
    "_ZNK8rocketmq21DefaultMQPullConsumer12getGroupNameB5cxx11Ev": (c_void_p, [c_void_p]),
    "_ZNK8rocketmq15DefaultMQClient12getGroupNameB5cxx11Ev": (c_void_p, [c_void_p]),
}


class Functions:
    """The functions of the library at `path`, declared.

    C's have their own names, here and in `quick`; C++'s those of the attributes.

    Raises:
        OSError: the library cannot be loaded.
        AttributeError: it lacks a function; the text names it.
    """

    def __init__(self, path: str) -> None:
        self.blocking = ctypes.CDLL(path)
        self.quick = ctypes.PyDLL(path)
        self.fetch_offset, self.note_offset, self.persist_offset = _declare(self.blocking, _BLOCKING_CPP)
        _declare(self.blocking, _BLOCKING)
        _declare(self.quick, _QUICK)
        (
            self.get_topic,
            self.get_body,
            self.get_property,
            self.get_sys_flag,
            self.get_body_crc,
            self.make_queue,
            self.set_instance,
            self.get_group,
            self.get_client_group,
        ) = _declare(self.quick, _QUICK_CPP)


def _declare(library: ctypes.CDLL, prototypes: _Prototypes) -> list[Any]:
    found = []
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
        found.append(function)
    return found
