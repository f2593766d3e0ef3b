"""The three questions one asks a RocketMQ that is just starting, over its remoting protocol.

`mq2mqtt.rocketmq` is the real client. This one is small on purpose: one connection for each question and nothing
but the standard library, so that a launcher or a test can use it whatever state the client is in.
"""

import asyncio
import contextlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from mq2mqtt.errors import LinkError

__all__ = ["Answer", "RemotingError", "ask", "broker_addresses", "create_topic", "topic_exists"]

_UPDATE_AND_CREATE_TOPIC = 17
_GET_ROUTEINFO_BY_TOPIC = 105
_GET_BROKER_CLUSTER_INFO = 106
_OK = 0
_TOPIC_NOT_FOUND = 17
_READ_AND_WRITE = 6
_HEADER_LENGTH_MASK = 0xFF_FFFF  # the top byte of that word is the serialization type, 0 = JSON
_CREATION_DEADLINE = 30.0
_MAX_FRAME = 16 << 20
_FIRST_MASTER_ADDRESS = re.compile(rb'"brokerAddrs":\{"?0"?:"([^"]+)"')


class RemotingError(LinkError):
    """RocketMQ could not be asked, or said no; the text is its own remark where there is one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer to a request: code 0 is success, `remark` says why otherwise."""

    code: int
    remark: str
    body: bytes


async def ask(address: str, code: int, fields: Mapping[str, str] | None = None, *, timeout: float = 5.0) -> Answer:  # noqa: ASYNC109
    """Send one request to `address` (`HOST:PORT`) and return the answer.

    Raises:
        RemotingError: not connected, no answer within `timeout` seconds, or no remoting server there.
    """
    host, _, port = address.rpartition(":")
    header = json.dumps(
        {"code": code, "language": "OTHER", "version": 0, "opaque": 1, "flag": 0, "extFields": dict(fields or {})}
    ).encode()
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            try:
                writer.write(struct.pack("!II", 4 + len(header), len(header)) + header)
                length, header_length = struct.unpack("!II", await reader.readexactly(8))
                if length > _MAX_FRAME:
                    raise RemotingError(f"{address} is no RocketMQ: an answer of {length} bytes")
                content = await reader.readexactly(length - 4)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except TimeoutError as exc:
        raise RemotingError(f"{address} did not answer within {timeout:g} s") from exc
    except (OSError, ValueError, asyncio.IncompleteReadError) as exc:
        raise RemotingError(f"{address}: {exc}") from exc
    header_length &= _HEADER_LENGTH_MASK
    try:
        answer = json.loads(content[:header_length])
        return Answer(code=answer["code"], remark=answer.get("remark") or "", body=content[header_length:])
    except (ValueError, KeyError, AttributeError) as exc:
        raise RemotingError(f"{address} is no RocketMQ: {content[:40]!r}") from exc


async def broker_addresses(namesrv: str) -> list[str]:
    """Return the master brokers that are registered at the name server `namesrv`, sorted.

    Raises:
        RemotingError: the name server does not answer.
    """
    answer = await ask(namesrv, _GET_BROKER_CLUSTER_INFO)
    # fastjson writes the broker id 0 as a bare number key, which no JSON parser takes.
    return sorted(match.decode() for match in _FIRST_MASTER_ADDRESS.findall(answer.body))


async def topic_exists(namesrv: str, topic: str) -> bool:
    """Whether the name server `namesrv` has a route for `topic`.

    Raises:
        RemotingError: the name server does not answer, or answers with an error.
    """
    answer = await ask(namesrv, _GET_ROUTEINFO_BY_TOPIC, {"topic": topic})
    if answer.code not in (_OK, _TOPIC_NOT_FOUND):
        raise RemotingError(f"{namesrv}: {answer.remark}")
    return answer.code == _OK


async def create_topic(namesrv: str, topic: str, *, queues: int = 4) -> None:
    """Create `topic` on every master broker and wait until it has a route.

    Raises:
        RemotingError: there is no broker, one refuses, or no route appears within 30 s.
    """
    brokers = await broker_addresses(namesrv)
    if not brokers:
        raise RemotingError(f"no broker is registered at {namesrv}")
    fields = {
        "topic": topic,
        "defaultTopic": "TBW102",
        "readQueueNums": str(queues),
        "writeQueueNums": str(queues),
        "perm": str(_READ_AND_WRITE),
        "topicFilterType": "SINGLE_TAG",
        "topicSysFlag": "0",
        "order": "false",
    }
    for broker in brokers:
        answer = await ask(broker, _UPDATE_AND_CREATE_TOPIC, fields)
        if answer.code != _OK:
            raise RemotingError(f"{broker} did not create topic {topic}: {answer.remark}")
    try:
        async with asyncio.timeout(_CREATION_DEADLINE):
            while not await topic_exists(namesrv, topic):  # noqa: ASYNC110 - another program is awaited
                await asyncio.sleep(0.05)
    except TimeoutError as exc:
        raise RemotingError(f"topic {topic} was created but {namesrv} has no route for it") from exc
