"""Apache's client as the bridge uses it; the only module that imports the package `rocketmq`.

Its public calls block, retry by themselves, hide the queue of what was received, or lose their future on the way: these
subclasses reach one layer below. So the package is pinned to 5.1 in pyproject.toml.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import grpc
from rocketmq import ClientConfiguration, Credentials, FilterExpression, Message, Producer, SimpleConsumer
from rocketmq.grpc_protocol import (
    AckMessageRequest,
    ChangeInvisibleDurationRequest,
    Code,
    MessageType,
    Permission,
    QueryRouteRequest,
)
from rocketmq.v5.exception import ClientException
from rocketmq.v5.util import MessagingResultChecker

from mq2mqtt.errors import (
    BridgeError,
    LinkError,
    MessageRejectedError,
    NotAuthorizedError,
    NotConnectedError,
    TopicNotFoundError,
)
from mq2mqtt.link import Queue
from mq2mqtt.link.grpc.incoming import GrpcMessage
from mq2mqtt.link.grpc.route import Route
from mq2mqtt.message import RocketMessage

__all__ = [
    "Incoming",
    "LinkConsumer",
    "LinkProducer",
    "ask_route",
    "configuration",
    "outgoing",
    "require_success",
    "to_route",
    "translate",
]

REQUEST_SECONDS = 3
# A poll that is cancelled hides what comes after it from everybody: short ones can be waited for. The proxy makes 5 s
# of it (grpcClientConsumerMinLongPollingTimeoutMillis).
_POLL_SECONDS = 1
POLL_AT_MOST_SECONDS = 5
RECEIVE_MESSAGES = 32

_REJECTED = {
    Code.ILLEGAL_MESSAGE_TAG,
    Code.ILLEGAL_MESSAGE_KEY,
    Code.ILLEGAL_MESSAGE_GROUP,
    Code.ILLEGAL_MESSAGE_ID,
    Code.ILLEGAL_MESSAGE_PROPERTY_KEY,
    Code.MESSAGE_CORRUPTED,
    Code.MESSAGE_BODY_EMPTY,
    Code.MESSAGE_BODY_TOO_LARGE,
    Code.MESSAGE_PROPERTIES_TOO_LARGE,
    Code.PAYLOAD_TOO_LARGE,
    Code.REQUEST_HEADER_FIELDS_TOO_LARGE,
}
_NOT_AUTHORIZED = {Code.UNAUTHORIZED, Code.FORBIDDEN, Code.PAYMENT_REQUIRED}
# The proxy makes one code of nearly all that a broker says; this is the remark of the broker's code 13.
_BROKER_REJECTED = "the message is illegal"


def configuration(proxy: str, *, access_key: str | None, secret_key: str | None) -> Any:  # noqa: ANN401
    """Return how to reach `proxy`: `host:port`, several IPv4 addresses with `;` between them."""
    return ClientConfiguration(proxy, Credentials(access_key, secret_key), request_timeout=REQUEST_SECONDS)


def translate(error: BaseException) -> BridgeError:
    """Return the bridge's error for one of the client's; the only place that does."""
    if isinstance(error, grpc.RpcError):
        return _for_rpc(error)
    if isinstance(error, ClientException) and error.code:
        return _for_code(error.code, str(error.args[0]))
    return LinkError(f"{type(error).__name__}: {error}")


def _for_rpc(error: Any) -> BridgeError:  # noqa: ANN401 - grpc has no types
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNAVAILABLE:
        return NotConnectedError(f"the proxy does not answer: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return LinkError("the proxy did not answer in time")
    if code in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}:
        return NotAuthorizedError(f"the proxy refuses: {details}")
    return LinkError(f"{code.name}: {details}")


def _for_code(code: int, text: str) -> BridgeError:
    text = f"{text.splitlines()[0] if text else 'no reason given'} ({Code.Name(code)})"
    if code in _REJECTED or _BROKER_REJECTED in text:
        return MessageRejectedError(text)
    if code in _NOT_AUTHORIZED:
        return NotAuthorizedError(text)
    if code == Code.TOPIC_NOT_FOUND:
        return TopicNotFoundError(text)
    return LinkError(text)


class LinkProducer(Producer):  # type: ignore[misc]  # has no types
    """A producer that sends once: the delivery loop owns retries."""

    max_body = Producer.DEFAULT_MAX_BODY_SIZE
    """Bytes, as the proxy says with its settings."""

    def reset_setting(self, settings: Any) -> None:  # noqa: ANN401
        """Take the proxy's settings, in the client's thread."""
        self.max_body = settings.publishing.max_body_size or self.max_body
        settings.backoff_policy.max_attempts = 1
        super().reset_setting(settings)

    def hold_route(self, topic: str) -> None:
        """Ask for the route of `topic` that a send needs and would ask for itself. Blocks for a request.

        Raises:
            LinkError: there was no answer, and the client holds no older one either.
        """
        if self.route_manager.update_topic_route(topic) is None:
            raise LinkError(f"the proxy did not answer for the route of topic {topic}")


def outgoing(message: RocketMessage, *, group: str) -> Any:  # noqa: ANN401
    """Return `message` as the client sends it, in message group `group`."""
    made = Message()
    made.topic = message.topic
    made.body = message.body
    made.message_group = group
    for name, value in message.properties.items():
        if not value:
            continue
        if name == "TAGS":
            made.tag = value
        elif name == "KEYS":
            made.keys = value
        else:
            # `add_property` takes no value of spaces.
            made.properties[name] = value
    return made


class Incoming:
    """A message that was received, and the receipt to answer for it with."""

    __slots__ = ("endpoints", "message", "problem", "receipt")

    def __init__(self, received: Any, queue: Any) -> None:  # noqa: ANN401
        system = received.system_properties
        self.endpoints = queue.endpoints
        self.receipt: str = system.receipt_handle
        """A renewal gives another one."""
        body, self.problem = _body(received)
        self.message = GrpcMessage(
            topic=received.topic.name,
            body=body,
            properties=_properties(received),
            born_ms=system.born_timestamp.ToMilliseconds(),
            broker=queue.message_queue0().broker.name,
            queue_id=system.queue_id,
            offset=system.queue_offset,
        )


def _body(received: Any) -> tuple[bytes, str | None]:  # noqa: ANN401
    """Return the body, decompressed, and why it can't be read."""
    try:
        message = Message().fromProtobuf(received)
    except Exception as error:  # noqa: BLE001 - whatever was stored, such as a compression that the client lacks
        return b"", f"{type(error).__name__}: {error}"
    return message.body, "its body does not match its checksum" if message.corrupted else None


def _properties(received: Any) -> dict[str, str]:  # noqa: ANN401
    system = received.system_properties
    properties = dict(received.user_properties)
    named = {"TAGS": system.tag, "KEYS": " ".join(system.keys), "UNIQ_KEY": system.message_id}
    return properties | {name: value for name, value in named.items() if value}


class LinkConsumer(SimpleConsumer):  # type: ignore[misc]  # has no types
    """A simple consumer of one topic whose calls all return futures.

    Args:
        config: as `configuration` makes it.
        group: consumer group.
        topic: what it reads.
        tags: tag expression.
        tls: whether it connects with TLS.
        on_settings: called in the client's thread when the proxy has answered whether the group keeps order.
    """

    def __init__(  # noqa: PLR0913 - keyword-only but for one
        self,
        config: Any,  # noqa: ANN401
        *,
        group: str,
        topic: str,
        tags: str,
        tls: bool,
        on_settings: Callable[[bool], None],
    ) -> None:
        super().__init__(config, group, {topic: FilterExpression(tags)}, await_duration=_POLL_SECONDS, tls_enable=tls)
        self._topic = topic
        self._on_settings = on_settings

    def reset_setting(self, settings: Any) -> None:  # noqa: ANN401
        """Take the proxy's settings, in the client's thread."""
        super().reset_setting(settings)
        self._on_settings(settings.subscription.fifo)

    def hold_queues(self) -> dict[str, Any]:
        """Ask for the route; return one readable queue for each broker's name. Blocks for a request."""
        self.route_manager.update_topic_route(self._topic)
        return self.queues()

    def queues(self) -> dict[str, Any]:
        """Return one readable queue for each broker's name, by the route that the client has.

        The proxy gives the messages of all of a broker's queues for any of them.
        """
        route = self.route_manager.retrieve_topic_route_data(self._topic)
        queues = [queue for queue in route.message_queues if queue.is_readable() and queue.is_master_broker()]
        return {queue.message_queue0().broker.name: queue for queue in queues}

    def ask_settings(self, queue: Any) -> None:  # noqa: ANN401
        """Tell the proxy of `queue` who this is, and have it answer with the group's settings.

        A proxy that was started again knows nobody; the client itself would tell it after 5 to 10 minutes.
        """
        self._rpc_channel_io_loop().call_soon_threadsafe(self.on_new_endpoints, queue.endpoints)

    def beat(self, queue: Any) -> Future[Any]:  # noqa: ANN401
        """Send a heartbeat; `require_success` reads the answer. Settings that are refused have none."""
        answer: Future[Any] = self.rpc_client.heartbeat_async(
            queue.endpoints, self._heartbeat_req(), metadata=self.sign(), timeout=REQUEST_SECONDS
        )
        return answer

    def take(self, queue: Any, *, hidden: int) -> Future[list[Incoming]]:  # noqa: ANN401
        """Receive what `queue`'s broker has, or has within some seconds; hide it from others for `hidden` seconds."""
        request = self._receive_req(self._topic, queue, RECEIVE_MESSAGES, False, hidden, _POLL_SECONDS)  # noqa: FBT003
        return asyncio.run_coroutine_threadsafe(self._take(queue, request), self._rpc_channel_io_loop())

    async def _take(self, queue: Any, request: Any) -> list[Incoming]:  # noqa: ANN401 - in the client's thread
        call = await self.rpc_client.receive_message(
            queue.endpoints, request, metadata=self.sign(), timeout=REQUEST_SECONDS + POLL_AT_MOST_SECONDS
        )
        received = []
        status = None
        try:
            async for response in call:
                if response.HasField("status"):
                    status = response.status
                elif response.HasField("message"):
                    # Checking the sums of long bodies is nothing for the bridge's thread.
                    received.append(Incoming(response.message, queue))
        except asyncio.CancelledError:
            call.cancel()
            raise
        MessagingResultChecker.check(status)
        return received

    # The package's own calls for these two give back futures of asyncio that another thread fulfils.

    def acknowledge(self, done: Sequence[Incoming]) -> Future[Any]:
        """Say that messages of one broker are done; `acknowledged` reads the answer."""
        request = AckMessageRequest()
        request.group.name = self.consumer_group
        request.topic.name = self._topic
        for one in done:
            request.entries.add(message_id=one.message.properties.get("UNIQ_KEY", ""), receipt_handle=one.receipt)
        answer: Future[Any] = self.rpc_client.ack_message_async(
            done[0].endpoints, request, metadata=self.sign(), timeout=REQUEST_SECONDS
        )
        return answer

    def hide(self, one: Incoming, seconds: int) -> Future[Any]:
        """Have a message come again in `seconds` unless it is acknowledged; `hidden` reads the answer."""
        request = ChangeInvisibleDurationRequest()
        request.group.name = self.consumer_group
        request.topic.name = self._topic
        request.message_id = one.message.properties.get("UNIQ_KEY", "")
        request.receipt_handle = one.receipt
        request.invisible_duration.seconds = seconds
        answer: Future[Any] = self.rpc_client.change_invisible_duration_async(
            one.endpoints, request, metadata=self.sign(), timeout=REQUEST_SECONDS
        )
        return answer


def require_success(response: Any) -> None:  # noqa: ANN401
    """Read an answer that has nothing but its status.

    Raises:
        BridgeError: it is a refusal.
    """
    if response.status.code != Code.OK:
        raise _for_code(response.status.code, response.status.message)


def acknowledged(sent: dict[str, Incoming], response: Any) -> list[tuple[Incoming, BridgeError]]:  # noqa: ANN401
    """Read the answer of `acknowledge`: return what it refuses, with the reason.

    Args:
        sent: what was acknowledged, by the receipt that it had then.
        response: the answer.

    Raises:
        BridgeError: all of it is refused, or a receipt that was not sent.
    """
    refused = []
    for entry in response.entries:
        if entry.status.code != Code.OK:
            error = _for_code(entry.status.code, entry.status.message)
            if entry.receipt_handle not in sent:
                raise error
            refused.append((sent[entry.receipt_handle], error))
    if not response.entries:
        require_success(response)
    return refused


def hidden(response: Any) -> str:  # noqa: ANN401
    """Read the answer of `hide`: return the receipt that counts from now on.

    Raises:
        BridgeError: it is refused.
    """
    require_success(response)
    receipt: str = response.receipt_handle
    return receipt


def ask_route(client: Any, topic: str) -> Future[Any]:  # noqa: ANN401
    """Ask for a route; `to_route` reads the answer. The client's own question hides why there is none."""
    config = client.client_configuration
    request = QueryRouteRequest()
    request.topic.name = topic
    request.endpoints.CopyFrom(config.rpc_endpoints.endpoints)
    answer: Future[Any] = client.rpc_client.query_topic_route_async(
        config.rpc_endpoints, request, metadata=client.sign(), timeout=REQUEST_SECONDS
    )
    return answer


def to_route(topic: str, response: Any) -> Route:  # noqa: ANN401
    """Read the answer of `ask_route`.

    Raises:
        BridgeError: there is no route.
    """
    require_success(response)
    masters = [queue for queue in response.message_queues if queue.broker.id == 0]
    writable = [queue for queue in masters if queue.permission in {Permission.WRITE, Permission.READ_WRITE}]
    readable = [queue for queue in masters if queue.permission in {Permission.READ, Permission.READ_WRITE}]
    return Route(
        topic=topic,
        queues=tuple(sorted(Queue(topic, queue.broker.name, queue.id) for queue in writable)),
        readable=bool(readable),
        ordered=all(MessageType.FIFO in queue.accept_message_types for queue in writable),
    )
