"""Sending without choosing queues by hand."""

import zlib
from collections.abc import Sequence

from mq2mqtt.rocketmq.client import Client
from mq2mqtt.rocketmq.message import Sendable
from mq2mqtt.rocketmq.route import WriteQueue
from mq2mqtt.rocketmq.sending import SendResult

__all__ = ["Producer"]


class Producer:
    """A member of a producer group. The caller owns retries; the methods raise as `Client.send` does."""

    def __init__(self, client: Client, group: str) -> None:
        self._client = client
        self._group = group
        self._turn = 0
        client.register_producer(group)

    async def send(self, topic: str, message: Sendable, *, key: str | None = None) -> SendResult:
        """Store one message.

        Messages of one `key` go to one queue as long as the route is the same; others go to the queues in turn.
        """
        return await self.send_batch(topic, (message,), key=key)

    async def send_batch(self, topic: str, messages: Sequence[Sendable], *, key: str | None = None) -> SendResult:
        """Store all messages in one queue, chosen as `send` does: all of them or none."""
        queue = self._choose(await self._client.queues(topic), key)
        return await self._client.send(topic, queue.broker, queue.queue_id, messages, group=self._group)

    async def close(self) -> None:
        """Leave the group."""
        await self._client.unregister_producer(self._group)

    def _choose(self, queues: tuple[WriteQueue, ...], key: str | None) -> WriteQueue:
        if key is not None:
            return queues[zlib.crc32(key.encode()) % len(queues)]
        self._turn += 1
        return queues[self._turn % len(queues)]
