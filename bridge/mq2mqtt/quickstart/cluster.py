"""What the launcher, the quickstart and tests ask of a RocketMQ: one short-lived client for each question.

All of them raise `LinkError` when RocketMQ does not answer, or says no; the text is its own remark where there is one.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mq2mqtt.errors import LinkError
from mq2mqtt.link.native import map_errors
from mq2mqtt.rocketmq import Client, Response, admin

__all__ = ["OPEN", "Access", "ask", "broker_addresses", "create_ordered_group", "create_topic", "topic_exists"]

_CREATION_DEADLINE = 30.0
_CREATE_GROUP = 200
_DELIVERIES = 1_000_000


@dataclass(frozen=True)
class Access:
    """How to be let in by a RocketMQ with access control or TLS."""

    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    tls: bool | ssl.SSLContext = False


OPEN = Access()


@asynccontextmanager
async def _client(address: str, access: Access, *, request_timeout: float = 5.0) -> AsyncIterator[Client]:
    with map_errors():
        async with Client(
            namesrv=address,
            client_id="mq2mqtt-quickstart",
            request_timeout=request_timeout,
            access_key=access.access_key,
            secret_key=access.secret_key,
            tls=access.tls,
        ) as client:
            yield client


async def ask(
    address: str,
    code: int,
    *,
    body: bytes = b"",
    timeout: float = 5.0,  # noqa: ASYNC109 - the client's own timer
    access: Access = OPEN,
) -> Response:
    """Send the request `code` without fields to `address` (`HOST:PORT`) and return the answer, whatever its code."""
    async with _client(address, access, request_timeout=timeout) as client:
        return await client.call(address, code, {}, body)


async def broker_addresses(namesrv: str, *, access: Access = OPEN) -> list[str]:
    """Return the master brokers that are registered at the name server `namesrv`, sorted."""
    async with _client(namesrv, access) as client:
        return sorted((await client.masters()).values())


async def topic_exists(namesrv: str, topic: str, *, access: Access = OPEN) -> bool:
    """Whether the name server `namesrv` has a route for `topic`."""
    async with _client(namesrv, access) as client:
        return await client.topic_exists(topic)


async def create_ordered_group(namesrv: str, group: str, *, access: Access = OPEN) -> None:
    """Have every master broker give the members of consumer group `group` the messages of a queue in their order.

    That is for members who come by way of a proxy; an existing group is changed.
    """
    config = {
        "groupName": group,
        "consumeMessageOrderly": True,
        # What was received this often and not acknowledged goes to a dead letter topic.
        "retryMaxTimes": _DELIVERIES,
    }
    async with _client(namesrv, access) as client:
        for address in (await client.masters()).values():
            body = json.dumps(config).encode()
            admin.require_success(await client.call(address, _CREATE_GROUP, {}, body), address)


async def create_topic(
    namesrv: str, topic: str, *, queues: int = 4, message_type: str | None = None, access: Access = OPEN
) -> None:
    """Create `topic` on every master broker and wait until it has a route, at most 30 s."""
    async with _client(namesrv, access) as client:
        if not await client.masters():
            raise LinkError(f"no broker is registered at {namesrv}")
        await client.create_topic(topic, queues=queues, message_type=message_type)
        try:
            async with asyncio.timeout(_CREATION_DEADLINE):
                while not await client.topic_exists(topic):  # noqa: ASYNC110 - another program is awaited
                    await asyncio.sleep(0.05)
        except TimeoutError as exc:
            raise LinkError(f"topic {topic} was created but {namesrv} has no route for it") from exc
