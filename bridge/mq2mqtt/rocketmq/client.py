"""The client: connections, routes, heartbeats, and the requests that everything else is made of."""

import asyncio
import logging
import ssl
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from mq2mqtt.rocketmq import admin
from mq2mqtt.rocketmq.acl import Credentials
from mq2mqtt.rocketmq.channel import Channel
from mq2mqtt.rocketmq.codes import RequestCode, ResponseCode
from mq2mqtt.rocketmq.connection import Connection
from mq2mqtt.rocketmq.errors import NoPermission, NotConnected, RequestTimeout, RocketMQError, TopicNotFound, for_code
from mq2mqtt.rocketmq.groups import Groups
from mq2mqtt.rocketmq.message import EncodedMessages, Sendable
from mq2mqtt.rocketmq.names import NameServers, parse_addresses
from mq2mqtt.rocketmq.remoting import Command, Response
from mq2mqtt.rocketmq.route import TopicRoute, WriteQueue
from mq2mqtt.rocketmq.route_table import RouteTable
from mq2mqtt.rocketmq.sending import SendEncoder, SendResult, SendStatus

__all__ = ["Client"]

logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS: Final = 30.0  # a broker forgets a client after 120 s of silence
_TICK_SECONDS: Final = 5.0
_IDLE_SECONDS: Final = 120.0
_FAREWELL_SECONDS: Final = 2.0
_STORED: Final = frozenset(SendStatus)
_MASTER_MOVED: Final = frozenset(
    {
        ResponseCode.SYSTEM_ERROR,
        ResponseCode.SERVICE_NOT_AVAILABLE,
        ResponseCode.NO_PERMISSION,
        ResponseCode.TOPIC_NOT_EXIST,
        ResponseCode.INVALID_PARAMETER,  # also the answer to a queue id that no longer exists
    }
)


class Client:
    """A client of one RocketMQ cluster, for any number of topics and groups, within one event loop.

    Nothing is retried here: each method asks once and raises. While an address cannot be reached, calls to it
    fail at once with `NotConnected` between attempts (see `Channel`).

    Args:
        namesrv: name servers, `host:port`, several with `;` between them.
        client_id: this client's name in its groups: unique, and the same after a restart.
        access_key: for a cluster with access control, together with `secret_key`.
        secret_key: signs the requests; is never sent and never shown.
        security_token: of temporary credentials.
        tls: true for TLS verified against the system's authorities; a context for anything else.
        address_map: a broker's address as RocketMQ announces it -> as this machine reaches it.
        request_timeout: seconds until a request without an answer fails; also for connecting.
        producer_group: the group that messages are sent in, unless `send` is told another.

    Raises:
        ValueError: an argument is wrong.
    """

    def __init__(  # noqa: PLR0913 - keyword-only, each a setting of its own
        self,
        *,
        namesrv: str,
        client_id: str,
        access_key: str | None = None,
        secret_key: str | None = None,
        security_token: str | None = None,
        tls: bool | ssl.SSLContext = False,
        address_map: Mapping[str, str] | None = None,
        request_timeout: float = 3.0,
        producer_group: str = "DEFAULT_PRODUCER",
    ) -> None:
        if (access_key is None) != (secret_key is None):
            raise ValueError("access_key and secret_key are given together or not at all")
        self.client_id = client_id
        self.request_timeout = request_timeout
        self._credentials: Credentials | None = None
        if access_key is not None and secret_key is not None:
            self._credentials = Credentials(access_key, secret_key, security_token=security_token)
        self._tls = ssl.create_default_context() if tls is True else tls or None
        self._address_map = dict(address_map or {})
        self._producer_group = producer_group
        self._groups = Groups(client_id, producer=producer_group)
        self._names = NameServers(parse_addresses(namesrv), self.call)
        self._routes = RouteTable(self._names.route)
        self._encoder = SendEncoder(self._credentials)
        self._channels: dict[str, Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._started = False
        self._closed = False

    def __repr__(self) -> str:
        return f"Client({';'.join(self._names.addresses)!r}, client_id={self.client_id!r})"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Begin heartbeats and route refreshes. Needs no network. Idempotent."""
        if not self._started:
            self._started = True
            self._spawn(self._maintain(), name=f"rocketmq.maintain[{self.client_id}]")

    async def close(self) -> None:
        """Leave all groups and close all connections, within about 2 seconds. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._routes.close()
        await self._depart(self._groups.departures())
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    # Requests

    async def call(
        self,
        address: str,
        code: int,
        fields: dict[str, str],
        body: bytes = b"",
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - one timer serves all calls of a connection
    ) -> Response:
        """Send a request to `address`, as RocketMQ announces it, and return the answer, whatever its code.

        Raises:
            NotConnected: there is no connection, or it was lost before the answer.
            RequestTimeout: no answer within `timeout` (default: `request_timeout`) seconds.
        """
        if self._credentials is not None:
            fields = self._credentials.sign(fields, body)
        connection = await self._channel(address).connection()
        seconds = self.request_timeout if timeout is None else timeout
        return await connection.call(code, fields, body, timeout=seconds)

    async def route(self, topic: str, *, max_age: float = 30.0) -> TopicRoute:
        """Return the route of `topic`, at most `max_age` seconds old; it is then refreshed in the background.

        Raises:
            TopicNotFound: no name server knows the topic.
            NotConnected, RequestTimeout: no name server answers.
        """
        return await self._routes.get(topic, max_age=max_age)

    async def queues(self, topic: str) -> tuple[WriteQueue, ...]:
        """Return the writable queues of `topic`, sorted, by the last route that was seen.

        Raises:
            TopicNotFound, NotConnected, RequestTimeout: as `route`, while no route was ever seen.
            NoPermission: the topic has no writable queue.
        """
        route = self._routes.cached(topic) or await self.route(topic)
        if not route.write_queues:
            # Ask again: perhaps the only master is just coming back.
            route = await self.route(topic, max_age=1.0)
        if not route.write_queues:
            if route.brokers and not any(route.master(broker) for broker in route.brokers):
                raise NotConnected(f"the brokers of {topic}", "none has a master now")
            raise NoPermission(ResponseCode.NO_PERMISSION, f"topic {topic} has no writable queue", address="its route")
        return route.write_queues

    async def send(  # noqa: PLR0913 - the queue's name has three parts
        self,
        topic: str,
        broker: str,
        queue_id: int,
        messages: Sequence[Sendable] | EncodedMessages,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
        group: str | None = None,
    ) -> SendResult:
        """Store `messages` in one queue in their order: all of them, or none.

        Several messages go as one batch; `encoded_size` tells what each takes of `MAX_BODY`.

        Raises:
            MessageIllegal: a message cannot be stored, by our own check or the broker's.
            NotConnected, RequestTimeout: not known to be stored.
            AnswerError: not stored.
            ValueError: there is no message.
        """
        encoded = self._encoder.encode(
            topic, broker, queue_id, messages, group=self._producer_group if group is None else group
        )
        route = self._routes.cached(topic) or await self.route(topic)
        address = route.master(broker)
        try:
            if address is None:
                raise NotConnected(f"broker {broker}", f"it has no master in the route of {topic}")  # noqa: TRY301 - as a lost one
            connection = await self._channel(address).connection()
            seconds = self.request_timeout if timeout is None else timeout
            response = await connection.call_encoded(encoded.encode, timeout=seconds)
        except (NotConnected, RequestTimeout):
            self._routes.doubt(topic)
            raise
        if response.code not in _STORED:
            if response.code in _MASTER_MOVED:
                self._routes.doubt(topic)
            raise for_code(response.code, response.remark, address=address)
        # A stored message is not to be reported as failed because of what the answer lacks.
        stored_at = response.fields.get("queueOffset", "")
        offset = int(stored_at) if stored_at.isdecimal() else -1
        return SendResult(SendStatus(response.code), broker, queue_id, offset, encoded.message_ids)

    # Groups

    async def heartbeat(self, address: str, *, consumer: str | None = None) -> None:
        """Tell the broker at `address` which groups this client is in, or only that it is in the group `consumer`.

        Raises:
            NotConnected, RequestTimeout: it did not answer.
            AnswerError: it refuses; for lack of a permission on one group, all of them.
        """
        response = await self.call(address, RequestCode.HEART_BEAT, {}, self._groups.heartbeat(consumer=consumer))
        admin.require_success(response, address)

    def register_producer(self, group: str) -> None:
        """Be a member of the producer group `group`."""
        self._groups.producers.add(group)
        self._wake.set()

    def register_consumer(self, group: str, subscription: Mapping[str, object]) -> None:
        """Be a member of the consumer group `group`.

        `subscription` is the consumer's part of the heartbeat: `consumeType`, `messageModel`,
        `consumeFromWhere`, `subscriptionDataSet`, `unitMode`.
        """
        self._groups.consumers[group] = subscription
        self._wake.set()

    async def unregister_producer(self, group: str) -> None:
        """Leave the producer group; brokers that cannot be reached learn it from the missing heartbeats."""
        self._groups.producers.discard(group)
        await self._depart([self._groups.departure(producer=group)])

    async def unregister_consumer(self, group: str) -> None:
        """Leave the consumer group, so that the others share its queues at once; see `unregister_producer`."""
        self._groups.consumers.pop(group, None)
        await self._depart([self._groups.departure(consumer=group)])

    def on_group_changed(self, group: str, callback: Callable[[], None] | None) -> None:
        """Have `callback` called when a broker says that the members of `group` changed; `None` ends it."""
        self._groups.listen(group, callback)

    # Topics and offsets

    async def create_topic(
        self, topic: str, *, queues: int = 4, perm: int = 6, message_type: str | None = None
    ) -> None:
        """Create `topic` on every master of the cluster; where it exists it is left as it is.

        `perm` is 4 for readable plus 2 for writable. `message_type` is for RocketMQ 5: `FIFO`, by default `NORMAL`;
        its proxy lets nothing else in.

        Raises:
            RocketMQError: a name server or a broker refuses or does not answer.
        """
        await admin.create_topic(self, self._names, topic, queues=queues, perm=perm, message_type=message_type)
        self._routes.forget(topic)

    async def delete_topic(self, topic: str) -> None:
        """Delete `topic` everywhere; raises as `create_topic`."""
        await admin.delete_topic(self, self._names, topic)
        self._routes.forget(topic)

    async def topic_exists(self, topic: str) -> bool:
        """Whether a name server has a route for `topic` now; raises as `route` when none answers."""
        try:
            await self.route(topic, max_age=0.0)
        except TopicNotFound:
            return False
        return True

    async def masters(self) -> dict[str, str]:
        """Return the address of each broker's master by the broker's name; raises as `route`."""
        return await self._names.cluster_masters()

    async def max_offset(self, address: str, topic: str, queue_id: int) -> int:
        """Return the offset that the next message of the queue will get."""
        return await self._offset(address, RequestCode.GET_MAX_OFFSET, topic, queue_id)

    async def min_offset(self, address: str, topic: str, queue_id: int) -> int:
        """Return the offset of the oldest message that the queue still has."""
        return await self._offset(address, RequestCode.GET_MIN_OFFSET, topic, queue_id)

    async def offset_by_time(self, address: str, topic: str, queue_id: int, time_ms: int) -> int:
        """Return the offset of the first message stored at `time_ms` (since 1970) or later."""
        return await self._offset(
            address, RequestCode.SEARCH_OFFSET_BY_TIMESTAMP, topic, queue_id, timestamp=str(time_ms)
        )

    async def _offset(self, address: str, code: RequestCode, topic: str, queue_id: int, **more: str) -> int:
        return await admin.queue_offset(self, address, code, {"topic": topic, "queueId": str(queue_id), **more})

    # Upkeep

    def _channel(self, address: str) -> Channel:
        channel = self._channels.get(address)
        if channel is None:
            if self._closed:
                raise NotConnected(address, "this client is closed")
            channel = self._channels[address] = Channel(
                address,
                target=self._address_map.get(address, address),
                ssl_context=self._tls,
                connect_timeout=self.request_timeout,
                on_request=self._serve,
                on_connected=self._connected,
            )
        return channel

    def _serve(self, connection: Connection, request: Command) -> tuple[int, str] | None:
        """Answer a request of a broker: code and remark, or `None` for no answer."""
        if request.code == RequestCode.NOTIFY_CONSUMER_IDS_CHANGED:
            callback = self._groups.listener(request.fields.get("consumerGroup", ""))
            if callback is not None:
                # Not from within the transport: an error of the callback must not end the connection.
                asyncio.get_running_loop().call_soon(callback)
            return ResponseCode.SUCCESS, ""
        if request.code == RequestCode.CHECK_TRANSACTION_STATE:
            return None
        logger.debug("%s asks for %d, which this client does not do", connection.address, request.code)
        return ResponseCode.REQUEST_CODE_NOT_SUPPORTED, f"request code {request.code} is not supported by this client"

    def _connected(self, address: str) -> None:
        if not self._closed and address in self._routes.addresses(masters_only=False):
            self._spawn(self._beat(address), name=f"rocketmq.heartbeat[{address}]")

    async def _maintain(self) -> None:
        loop = asyncio.get_running_loop()
        beat_at = loop.time()
        while True:
            try:
                async with asyncio.timeout(_TICK_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._routes.refresh_old()
            if self._wake.is_set() or loop.time() >= beat_at:
                self._wake.clear()
                beat_at = loop.time() + _HEARTBEAT_SECONDS
                addresses = self._routes.addresses(masters_only=not self._groups.consumers)
                await asyncio.gather(*map(self._beat, sorted(addresses)))
            await self._close_idle(loop.time() - _IDLE_SECONDS)

    async def _beat(self, address: str) -> None:
        try:
            await self.heartbeat(address)
        except NoPermission:
            # Those that are allowed must not be forgotten for the sake of one that is not.
            beats = (self.heartbeat(address, consumer=group) for group in list(self._groups.consumers))
            for result in await asyncio.gather(*beats, return_exceptions=True):
                if isinstance(result, BaseException):
                    logger.debug("heartbeat: %s", result)
        except RocketMQError as error:
            logger.debug("heartbeat: %s", error)

    async def _close_idle(self, since: float) -> None:
        idle = [address for address, channel in self._channels.items() if channel.used_at < since]
        for address in idle:
            await self._channels.pop(address).close()

    async def _depart(self, departures: list[dict[str, str]]) -> None:
        """Send UNREGISTER_CLIENT to every connected broker; what fails does not matter."""
        brokers = self._routes.addresses(masters_only=False)
        addresses = [a for a, channel in self._channels.items() if channel.is_connected and a in brokers]
        calls = [
            self.call(address, RequestCode.UNREGISTER_CLIENT, fields, timeout=_FAREWELL_SECONDS)
            for address in addresses
            for fields in departures
        ]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                logger.debug("leaving a group: %s", result)

    def _spawn(self, work: Coroutine[None, None, None], *, name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s ended", task.get_name(), exc_info=error)
