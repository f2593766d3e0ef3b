"""Topics and queue offsets: requests about the cluster rather than about messages."""

import asyncio
from collections.abc import Awaitable, Iterable, Mapping
from typing import Protocol

from mq2mqtt.rocketmq.codes import RequestCode, ResponseCode
from mq2mqtt.rocketmq.errors import NoBroker, TopicNotFound, for_code
from mq2mqtt.rocketmq.names import NameServers
from mq2mqtt.rocketmq.remoting import Response

__all__ = ["Caller", "create_topic", "delete_topic", "queue_offset", "require_success"]


class Caller(Protocol):
    """What sends the requests: `Client`."""

    def call(self, address: str, code: int, fields: dict[str, str]) -> Awaitable[Response]:
        """Send a request and return the answer, whatever its code."""


def require_success(response: Response, address: str) -> Response:
    """Return `response`.

    Raises:
        AnswerError: its code is not 0.
    """
    if response.code != ResponseCode.SUCCESS:
        raise for_code(response.code, response.remark, address=address)
    return response


async def create_topic(  # noqa: PLR0913 - keyword-only, each a field of the topic
    caller: Caller, names: NameServers, topic: str, *, queues: int, perm: int, message_type: str | None = None
) -> None:
    """Create `topic` on every master that has no queues of it; where it exists it is left as it is.

    The broker answers when the name servers know the topic (seen on 5.3.3).

    Raises:
        NoBroker: there is none to create it on.
    """
    masters = await names.cluster_masters()
    if not masters:
        raise NoBroker(";".join(names.addresses))
    known = await _brokers_with(names, topic)
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
    if message_type is not None:
        fields["attributes"] = f"+message.type={message_type}"
    missing = {name: address for name, address in masters.items() if name not in known}
    await _each(caller, missing.values(), RequestCode.UPDATE_AND_CREATE_TOPIC, fields)


async def delete_topic(caller: Caller, names: NameServers, topic: str) -> None:
    """Delete `topic` from every broker and from the name servers; an unknown topic is no error."""
    masters = await names.cluster_masters()
    await _each(caller, masters.values(), RequestCode.DELETE_TOPIC_IN_BROKER, {"topic": topic})
    await _each(caller, names.addresses, RequestCode.DELETE_TOPIC_IN_NAMESRV, {"topic": topic})


async def queue_offset(caller: Caller, address: str, code: RequestCode, fields: Mapping[str, str]) -> int:
    """Ask a broker for an offset of one queue."""
    response = require_success(await caller.call(address, code, dict(fields)), address)
    return response.integer("offset")


async def _brokers_with(names: NameServers, topic: str) -> Mapping[str, object]:
    try:
        return (await names.route(topic)).brokers
    except TopicNotFound:
        return {}


async def _each(caller: Caller, addresses: Iterable[str], code: RequestCode, fields: dict[str, str]) -> None:
    async def ask(address: str) -> None:
        require_success(await caller.call(address, code, fields), address)

    results = await asyncio.gather(*map(ask, addresses), return_exceptions=True)
    for result in results:
        if result is not None:
            raise result
