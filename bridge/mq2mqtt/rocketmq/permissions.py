"""Whether a client may send to a topic or read it, learnt without doing either.

Brokers check key, permissions, group and topic before they look at the queue number, so each is asked for a queue that
no topic has: all that is left to say is that there is none (tried on 4.9.7, 5.3.3 and 5.5.0).
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from mq2mqtt.rocketmq.admin import require_success
from mq2mqtt.rocketmq.client import Client
from mq2mqtt.rocketmq.codes import RequestCode, ResponseCode
from mq2mqtt.rocketmq.errors import AnswerError, NoPermission

__all__ = ["require_reading", "require_writing"]

_NO_QUEUE: Final = 2**31 - 1
_NO_SUCH_QUEUE: Final = f"queueId[{_NO_QUEUE}] is illegal"
_SUBSCRIPTION_FLAG: Final = "4"


class _Message(NamedTuple):
    body: bytes
    properties: dict[str, str]


async def require_writing(client: Client, topic: str) -> None:
    """Return when every broker would take messages to `topic` from this client.

    Raises:
        NoPermission: the key is wrong, or lacks a right to the topic.
        RocketMQError: that cannot be learnt now, or there is another obstacle.
    """

    async def ask(broker: str) -> None:
        with _refused_for_the_queue_alone():
            await client.send(topic, broker, _NO_QUEUE, [_Message(b" ", {})])

    brokers = {queue.broker for queue in await client.queues(topic)}
    await asyncio.gather(*map(ask, sorted(brokers)))


async def require_reading(client: Client, topic: str, group: str) -> None:
    """Return when every broker would let this client consume `topic` in `group`.

    A broker that creates groups by itself (`autoCreateSubscriptionGroup`) creates this one.

    Raises:
        NoPermission: the key is wrong, or lacks a right to the topic or the group; or the topic has no readable queue.
        GroupNotFound: there is no such group, and the broker does not create it.
        RocketMQError: that cannot be learnt now, or there is another obstacle.
    """
    fields = {
        "consumerGroup": group,
        "topic": topic,
        "queueId": str(_NO_QUEUE),
        "queueOffset": "0",
        "maxMsgNums": "1",
        "sysFlag": _SUBSCRIPTION_FLAG,
        "commitOffset": "0",
        "suspendTimeoutMillis": "0",
        "subscription": "*",
        "subVersion": "0",
        "expressionType": "TAG",
    }

    async def ask(address: str) -> None:
        with _refused_for_the_queue_alone():
            require_success(await client.call(address, RequestCode.PULL_MESSAGE, dict(fields)), address)

    route = await client.route(topic)
    if not route.read_queues:
        raise NoPermission(ResponseCode.NO_PERMISSION, f"topic {topic} has no readable queue", address="its route")
    masters = {address for queue in route.read_queues if (address := route.master(queue.broker))}
    await asyncio.gather(*map(ask, sorted(masters)))


@contextmanager
def _refused_for_the_queue_alone() -> Iterator[None]:
    try:
        yield
    except AnswerError as error:
        if _NO_SUCH_QUEUE not in error.remark:
            raise
