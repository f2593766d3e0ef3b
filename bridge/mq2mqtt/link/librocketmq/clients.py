"""librocketmq with Python's types: clients, messages, pulls and offsets. Much of it blocks; nothing needs a loop.

Its push consumer cannot be used. The orderly one commits beyond the message that its callback still holds as soon as a
pull brings nothing, because that message is off the list that is looked at (`PullRequest::takeMessages`, 2.0.0 to
2.2.0). The concurrent one gives its callback up to 32 messages one by one, each only after the one before is answered,
and sends all of them to the group's retry topic, out of order, when one is not settled.
"""

import atexit
import ctypes
import functools
import importlib
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from mq2mqtt.errors import ConfigError
from mq2mqtt.link import Queue
from mq2mqtt.link.librocketmq.functions import CQueue, Functions, PullResult, SendResult, Text, select_queue
from mq2mqtt.message import RocketMessage
from mq2mqtt.rocketmq.message import ReceivedMessage

__all__ = [
    "READ_PROPERTIES",
    "SEND_MILLISECONDS",
    "Client",
    "Consumer",
    "Credentials",
    "Library",
    "Producer",
    "PullStatus",
    "Pulled",
    "load",
]

_MAX_BODY: Final = 4 * 1024 * 1024

_LIFECYCLE: Final = threading.Lock()
"""Held while a client starts or ends: the library's table of clients has no lock of its own."""

_started: Final[set["Client"]] = set()
"""Those that are not closed. A process that ends before they are hangs in the library (seen on 2.1.0)."""

_GET_IT: Final = "install Apache's rocketmq-client-cpp, 2.0.0 to 2.2.0, so that the loader finds librocketmq.so"

_OK: Final = 0
_LOG_ERRORS: Final = 2
SEND_MILLISECONDS: Final = 3000
"""So long a send waits for its answer."""
_CHANNEL: Final = b"ALIYUN"  # what the library's own samples say; RocketMQ does not look
_QUEUE_WORDS: Final = 64  # `MQMessageQueue` has 9
_COMPRESSED: Final = 0x1
_HOSTS_V6: Final = 0x30
_CRC_BITS: Final = 0x7FFFFFFF

_RETRY_TOPIC_PROPERTY: Final = "RETRY_TOPIC"
READ_PROPERTIES: Final = [
    "TAGS",
    "KEYS",
    "UNIQ_KEY",
    "RETRY_TOPIC",
    "qoslevel",
    "cleansessionflag",
    "mqttSecondTopic",
    "mqttRealTopic",
    "clientId",
    "topic",
    "mqtt5UserProperty",
    "mqtt5MsgExpireInterval",
    "mqtt5ContentType",
    "mq2mqttNode",
    "mqttEmptyPayload",
    "ttlSeconds",
    "receipt",
]
"""What the bridge reads of a message's properties (docs/mapping.md): C and C++ list none, each has to be asked for."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of a cluster with access control."""

    access_key: str
    secret_key: str


class PullStatus(IntEnum):
    """How a pull ended (`CPullStatus`). `NO_ANSWER` is a refusal too."""

    FOUND = 0
    NO_NEW = 1
    NO_MATCH = 2
    OFFSET_ILLEGAL = 3
    NO_ANSWER = 4


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull brought; `next_offset` is where the next one begins.

    Of `found` messages the first are in `messages`, up to one that the library could not read.
    """

    status: PullStatus
    next_offset: int
    min_offset: int
    max_offset: int
    messages: list[ReceivedMessage]
    found: int


class Library:
    """A loaded librocketmq.

    Args:
        path: of the library.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: it lacks a function.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.functions = Functions(path)
        self._queue_objects: dict[Queue, Any] = {}
        # These texts live as long as the process.
        self._properties = [(name, self._text(name)) for name in READ_PROPERTIES]
        # What is not there is one and the same empty text.
        message = self.functions.quick.CreateMessage(b"empty")
        self._missing: int = self.functions.get_property(message, self._properties[0][1])
        self.functions.quick.DestroyMessage(message)

    @property
    def version(self) -> str:
        """As the library says it: `CPP CORE VERSION: 2.1.0, BUILD TIME: ...`."""
        producer = self.functions.quick.CreateProducer(b"GID_version")
        version: bytes = self.functions.quick.ShowProducerVersion(producer)
        self.functions.blocking.DestroyProducer(producer)
        return version.decode(errors="replace")

    def latest_error(self) -> str:
        """Return what this thread's last call says of its failure."""
        text: bytes = self.functions.quick.GetLatestErrorMessage() or b""
        # msg: the message body is empty,error:-1,in file <Validators.cpp> line:93
        return text.decode(errors="replace").removeprefix("msg: ").partition(",error:")[0].rstrip(", ")

    def _text(self, text: str) -> int:
        """Return the address of a `std::string`. Its message is never freed."""
        message = self.functions.quick.CreateMessage(text.encode())
        address: int = self.functions.get_topic(message)
        return address

    def queue_object(self, queue: Queue) -> Any:  # noqa: ANN401 - a buffer
        """Return an `MQMessageQueue`. They are few, and kept for the next time."""
        known = self._queue_objects.get(queue)
        if known is None:
            known = (ctypes.c_uint64 * _QUEUE_WORDS)()
            self.functions.make_queue(known, self._text(queue.topic), self._text(queue.broker), queue.queue_id)
            self._queue_objects[queue] = known
        return known

    def read(self, message: int, broker: str) -> ReceivedMessage | None:
        """Return a pulled message; `None` if the library could not read it.

        It takes 8 bytes for each host, be it IPv6, and reads what follows from the wrong place. A body that it cannot
        inflate (LZ4, Zstd) it leaves empty; RocketMQ stores none that is.
        """
        functions, quick = self.functions, self.functions.quick
        flag = functions.get_sys_flag(message)
        body = _bytes(functions.get_body(message))
        if flag & _HOSTS_V6 or not body:
            return None
        if not flag & _COMPRESSED and zlib.crc32(body) & _CRC_BITS != functions.get_body_crc(message):
            return None
        properties = {}
        get_property, missing = functions.get_property, self._missing
        for name, text in self._properties:
            if (found := get_property(message, text)) != missing and (value := _bytes(found)):
                properties[name] = value.decode("utf-8", "surrogateescape")
        topic = _bytes(functions.get_topic(message)).decode("utf-8", "replace")
        if topic.startswith("%RETRY%"):
            topic = properties.get(_RETRY_TOPIC_PROPERTY, topic)
        return ReceivedMessage(
            topic=topic,
            body=body,
            properties=properties,
            broker=broker,
            queue_id=quick.GetMessageQueueId(message),
            offset=quick.GetMessageQueueOffset(message),
            commit_log_offset=quick.GetMessageCommitLogOffset(message),
            born_ms=quick.GetMessageBornTimestamp(message),
            stored_ms=quick.GetMessageStoreTimestamp(message),
            sys_flag=flag,
            flag=0,
            reconsume_times=quick.GetMessageReconsumeTimes(message),
            store_host=b"",
        )


def _bytes(address: int) -> bytes:
    text = Text.from_address(address)
    return ctypes.string_at(text.data, text.length)


class Client(ABC):
    """A producer or a consumer. Clients with one `instance` share connections.

    Args:
        library: that it is of.
        group: unique among the clients of the instance.
        namesrv: name servers, `host:port`, several with `;` between them.
        instance: a name.
        credentials: for a cluster with access control.
    """

    _kind = ""

    def __init__(
        self, library: Library, group: str, *, namesrv: str, instance: str, credentials: Credentials | None
    ) -> None:
        self.library = library
        quick = library.functions.quick
        self._handle: int = getattr(quick, f"Create{self._kind}")(group.encode())
        getattr(quick, f"Set{self._kind}NameServerAddress")(self._handle, namesrv.encode())
        if credentials is not None:
            keys = credentials.access_key.encode(), credentials.secret_key.encode()
            getattr(quick, f"Set{self._kind}SessionCredentials")(self._handle, *keys, _CHANNEL)
        self._set_instance(instance)

    @abstractmethod
    def _set_instance(self, instance: str) -> None: ...

    def start(self) -> None:
        """Start its threads; RocketMQ need not be there.

        Raises:
            ConfigError: the library will not, and says why.
        """
        functions = self.library.functions
        with _LIFECYCLE:
            if getattr(functions.blocking, f"Start{self._kind}")(self._handle) != _OK:
                problem = self.library.latest_error()
                raise ConfigError(f"librocketmq cannot start: {problem} (it writes a log below the home directory)")
        # Not before: it logs its start, and fails it when it can't write. In a thread of its own it aborts the process.
        getattr(functions.quick, f"Set{self._kind}LogLevel")(self._handle, _LOG_ERRORS)
        _started.add(self)

    def close(self) -> None:
        """End its threads and free it. No other call may be under way, or follow."""
        with _LIFECYCLE:
            getattr(self.library.functions.blocking, f"Shutdown{self._kind}")(self._handle)
            getattr(self.library.functions.blocking, f"Destroy{self._kind}")(self._handle)
        _started.discard(self)


@atexit.register
def _close_all() -> None:
    for client in list(_started):
        client.close()


class Producer(Client):
    """Sends to a queue by its index in the route. `send` may be called from several threads at once."""

    _kind = "Producer"

    def _set_instance(self, instance: str) -> None:
        quick = self.library.functions.quick
        quick.SetProducerInstanceName(self._handle, instance.encode())
        quick.SetProducerSendMsgTimeout(self._handle, SEND_MILLISECONDS)
        quick.SetProducerMaxMessageSize(self._handle, _MAX_BODY)

    def send(self, message: RocketMessage, index: int) -> str | None:
        """Store `message`; return `None`, or what the library says of its failure, which is little."""
        with self._native(message) as native:
            result = SendResult()
            # Without retries of its own: those would go to any queue.
            code = self.library.functions.blocking.SendMessageOrderly(
                self._handle, native, select_queue, index + 1, 0, ctypes.byref(result)
            )
            return None if code == _OK else self.library.latest_error()

    @contextmanager
    def _native(self, message: RocketMessage) -> Iterator[int]:
        quick = self.library.functions.quick
        native: int = quick.CreateMessage(message.topic.encode())
        try:
            quick.SetByteMessageBody(native, message.body, len(message.body))
            for name, value in message.properties.items():
                if value:
                    quick.SetMessageProperty(native, name.encode(), value.encode())
            yield native
        finally:
            quick.DestroyMessage(native)


class Consumer(Client):
    """Pulls, fetches and commits offsets. Only `fetch_queues` may be called beside another call."""

    _kind = "PullConsumer"

    def _set_instance(self, instance: str) -> None:
        functions = self.library.functions
        message = functions.quick.CreateMessage(instance.encode())
        functions.set_instance(self._handle, functions.get_topic(message))
        functions.quick.DestroyMessage(message)
        # Its only member, behind the table of its virtual methods.
        self._impl = ctypes.cast(self._handle, ctypes.POINTER(ctypes.c_void_p))[1]
        if functions.get_client_group(self._impl) != functions.get_group(self._handle):
            raise ConfigError(f"{self.library.path} is no librocketmq that this driver knows; {_GET_IT}")

    def fetch_queues(self, topic: str) -> list[Queue]:
        """Return the readable queues of `topic` in the order of its route; none when there is no answer either."""
        queues, size = ctypes.POINTER(CQueue)(), ctypes.c_int()
        calls = self.library.functions
        code = calls.blocking.FetchSubscriptionMessageQueues(
            self._handle, topic.encode(), ctypes.byref(queues), ctypes.byref(size)
        )
        if code != _OK or not queues:
            return []
        found = [Queue(topic, queues[i].broker.decode(), queues[i].queue_id) for i in range(size.value)]
        calls.quick.ReleaseSubscriptionMessageQueue(queues)
        return found

    def pull(self, queue: Queue, offset: int, *, count: int = 1) -> Pulled:
        """Return up to `count` messages of `queue` from `offset` on, without waiting for one to come.

        Of all tags: the library itself filters too, and would drop without a word what it read from the wrong place.
        """
        native = CQueue(queue.topic.encode(), queue.broker.encode(), queue.queue_id)
        result: PullResult = self.library.functions.blocking.Pull(
            self._handle, ctypes.byref(native), b"*", offset, count
        )
        try:
            messages: list[ReceivedMessage] = []
            for index in range(result.size):
                message = self.library.read(result.messages[index], queue.broker)
                # One that was read from the wrong place can look like anything.
                if message is None or message.queue_id != queue.queue_id or message.offset < offset:
                    break
                messages.append(message)
            return Pulled(
                PullStatus(result.status),
                result.next_offset,
                result.min_offset,
                result.max_offset,
                messages,
                result.size,
            )
        finally:
            self.library.functions.quick.ReleasePullResult(result)

    def committed(self, queue: Queue) -> int | None:
        """Return the offset that RocketMQ has for this group; `None` when it has none, or does not answer."""
        offset: int = self.library.functions.fetch_offset(self._handle, self.library.queue_object(queue), True)  # noqa: FBT003 - C's
        return offset if offset >= 0 else None

    def commit(self, offsets: Sequence[tuple[Queue, int]]) -> None:
        """Tell RocketMQ; it does not answer."""
        functions = self.library.functions
        for queue, offset in offsets:
            native = self.library.queue_object(queue)
            functions.note_offset(self._handle, native, offset)
            functions.persist_offset(self._impl, native)


@functools.cache
def load() -> Library:
    """Return the library that rocketmq-client-python finds.

    Raises:
        ConfigError: there is none, or it is not one that this driver can use; one line with the remedy.
    """
    try:
        ffi = importlib.import_module("rocketmq.ffi")
    except (ImportError, OSError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"rocketmq.driver librocketmq needs the native library: {error}; {_GET_IT}") from error
    path: str = ffi._DYLIB_PATH  # noqa: SLF001 - said nowhere else
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        raise ConfigError(f"rocketmq.driver librocketmq cannot use {path}: {error}; {_GET_IT}") from error
