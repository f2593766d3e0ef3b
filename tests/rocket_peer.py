"""A RocketMQ application for tests that are not coroutines: sends, and collects what a topic gets."""

import asyncio
import struct
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from mq2mqtt.link import ConsumeFrom
from mq2mqtt.link.native import NativeLink
from mq2mqtt.message import ReceivedMessage, RocketMessage
from tests.bridge_process import wait_for

_Result = TypeVar("_Result")


class RocketPeer:
    """Runs a link in a thread of its own, with `options` such as keys. Use as a context manager."""

    def __init__(self, namesrv: str, **options: Any) -> None:  # noqa: ANN401 - as `NativeLink`
        self._namesrv = namesrv
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rocket-peer", daemon=True)
        self._collectors: list[asyncio.Task[None]] = []
        self._next = 0

    def __enter__(self) -> Self:
        self._thread.start()
        # A busy broker may take longer than a bridge waits for it, and what is sent again may be there twice.
        options = {"request_timeout": 20.0, **self._options}
        self._link = NativeLink(namesrv=self._namesrv, client_id=f"peer@{uuid.uuid4().hex}", **options)
        self._do(self._link.start())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        for task in self._collectors:
            task.cancel()
        await asyncio.gather(*self._collectors, return_exceptions=True)
        await self._link.close()

    def _do(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    def create_topic(self, topic: str, *, queues: int = 4) -> None:
        self._do(self._link.create_topic(topic, queues=queues))

    def delete_topic(self, topic: str, *, broker_address: str) -> None:
        """Delete it as `mqadmin deleteTopic` does: in the broker, then in the name server."""
        call = self._link._client.call  # noqa: SLF001 - the bridge never deletes a topic
        for address, code in ((broker_address, 215), (self._namesrv, 216)):
            self._do(call(address, code, {"topic": topic}))

    def set_permission(self, topic: str, perm: int, *, broker_address: str, queues: int) -> None:
        """Change it as `mqadmin updateTopicPerm` does; 4 is readable, 2 writable, 6 both."""
        fields = {
            "topic": topic,
            "defaultTopic": topic,
            "readQueueNums": str(queues),
            "writeQueueNums": str(queues),
            "perm": str(perm),
            "topicFilterType": "SINGLE_TAG",
            "topicSysFlag": "0",
            "order": "false",
        }
        self._do(self._link._client.call(broker_address, 17, fields))  # noqa: SLF001 - the bridge never does

    def configure_broker(self, setting: str, *, broker_address: str) -> None:
        """Change a setting, `name=value`, as `mqadmin updateBrokerConfig` does."""
        answer = self._do(self._link._client.call(broker_address, 25, {}, setting.encode()))  # noqa: SLF001 - as above
        assert answer.code == 0, answer

    def committed_offset(self, group: str, topic: str, *, broker_address: str) -> int:
        """Return how far `group` has committed queue 0 of `topic`."""
        fields = {"consumerGroup": group, "topic": topic, "queueId": "0"}
        call = self._link._client.call  # noqa: SLF001 - the bridge reads its own group's offsets only
        return int(self._do(call(broker_address, 14, fields)).fields["offset"])

    def send(self, topic: str, body: bytes, *, tag: str | None = "MQ2MQTT", **properties: str) -> None:
        """Send one message to a queue of `topic`, the queues in turn."""
        self.send_many(topic, [body], tag=tag, **properties)

    def send_many(self, topic: str, bodies: list[bytes], *, tag: str | None = "MQ2MQTT", **properties: str) -> None:
        """Send messages with equal properties as one batch to one queue."""
        tags = {} if tag is None else {"TAGS": tag}
        messages = [RocketMessage(topic, body, {**tags, **properties}) for body in bodies]
        self._do(self._send(topic, messages))

    def send_all(self, topic: str, messages: list[RocketMessage]) -> None:
        """Send messages of different properties as one batch to one queue."""
        self._do(self._send(topic, messages))

    def stored(self, topic: str) -> int:
        """Return how many messages RocketMQ has got for `topic` since it was made."""
        return self._do(self._stored(topic))

    async def _stored(self, topic: str) -> int:
        client = self._link._client  # noqa: SLF001 - the bridge asks for the queues that it consumes only
        route, queues = await client.route(topic), await client.queues(topic)
        masters = {queue.broker: route.master(queue.broker) or "" for queue in queues}
        ends = (client.max_offset(masters[queue.broker], topic, queue.queue_id) for queue in queues)
        return sum(await asyncio.gather(*ends))

    def send_not_utf8(self, topic: str, *, broker_address: str) -> None:
        """Send to queue 0 a message whose properties are not UTF-8, as a careless client's batch can."""
        properties = b"TAGS\x01MQ2MQTT\x02mqttSecondTopic\x01/\xff\xfe\x02"
        entry = struct.pack(">iiiii", 22 + 1 + len(properties), 0, 0, 0, 1) + b"x"
        body = entry + struct.pack(">H", len(properties)) + properties
        self._send_raw(320, {**_send_fields(topic), "m": "true"}, body, broker_address=broker_address)

    def send_not_compressed(self, topic: str, *, broker_address: str) -> None:
        """Send to queue 0 a message that says it is compressed, and is not."""
        properties = "TAGS\x01MQ2MQTT\x02mqttSecondTopic\x01/odd\x02"
        fields = {**_send_fields(topic), "f": "1", "i": properties}
        self._send_raw(310, fields, b"not compressed", broker_address=broker_address)

    def _send_raw(self, code: int, fields: dict[str, str], body: bytes, *, broker_address: str) -> None:
        call = self._link._client.call  # noqa: SLF001 - our own client sends nothing of the kind
        answer = self._do(call(broker_address, code, fields, body))
        assert answer.code == 0, answer

    async def _send(self, topic: str, messages: list[RocketMessage]) -> None:
        queues = await self._link.queues(topic)
        self._next += 1
        await self._link.send(queues[self._next % len(queues)], messages)

    @contextmanager
    def collect(self, topic: str) -> Iterator[list[ReceivedMessage]]:
        """All messages of `topic`, in a list that grows."""
        messages: list[ReceivedMessage] = []
        with self._collecting(topic, messages.append):
            yield messages

    @contextmanager
    def collect_bodies(self, topic: str) -> Iterator[list[bytes]]:
        """The bodies of all messages of `topic`: for more of them than one wants to keep."""
        bodies: list[bytes] = []
        with self._collecting(topic, lambda message: bodies.append(message.body)):
            yield bodies

    @contextmanager
    def _collecting(self, topic: str, take: Callable[[ReceivedMessage], None]) -> Iterator[None]:
        task = asyncio.run_coroutine_threadsafe(self._start_collecting(topic, take), self._loop).result(60)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(task.cancel)

    async def _start_collecting(self, topic: str, take: Callable[[ReceivedMessage], None]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._collect(topic, take), name=f"collect {topic}")
        self._collectors.append(task)
        return task

    async def _collect(self, topic: str, take: Callable[[ReceivedMessage], None]) -> None:
        group = f"GID_peer_{uuid.uuid4().hex[:12]}"
        subscription = await self._link.subscribe(topic, group, tags="*", start=ConsumeFrom.EARLIEST)
        try:
            async for batch in subscription:
                for message in batch:
                    take(message)
                    subscription.settle(message)
        finally:
            await subscription.close()


def _send_fields(topic: str) -> dict[str, str]:
    """Return the header of SEND_MESSAGE_V2, with its one-letter names."""
    values = {"a": "GID_raw", "b": topic, "c": topic, "d": "4", "e": "0", "f": "0", "g": str(int(time.time() * 1000))}
    return {**values, "h": "0", "i": "", "j": "0", "k": "false", "m": "false"}


def wait_for_messages(messages: list[Any], count: int, *, seconds: float = 30.0) -> None:
    """Wait until at least `count` messages are there."""
    wait_for(lambda: len(messages) >= count, seconds=seconds, what=lambda: f"{len(messages)} of {count} messages")
