"""The launcher's questions to a RocketMQ, against answers that this test gives."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mq2mqtt.quickstart.remoting import RemotingError, ask, broker_addresses, topic_exists

# As fastjson writes it: the broker id is no string.
CLUSTER = (
    b'{"brokerAddrTable":{"broker-b":{"brokerAddrs":{0:"10.0.0.2:10911",1:"10.0.0.3:10911"},"brokerName":"broker-b"},'
    b'"broker-a":{"brokerAddrs":{"0":"10.0.0.1:10911"},"brokerName":"broker-a"}},"clusterAddrTable":{}}'
)

Answer = Callable[[dict[str, Any]], bytes]


def framed(header: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("!II", 4 + len(text) + len(body), len(text)) + text + body


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        total, header_length = struct.unpack("!II", await reader.readexactly(8))
        content = await reader.readexactly(total - 4)
        writer.write(answer(json.loads(content[:header_length])))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"


async def test_masters_are_found_whatever_json_the_server_writes() -> None:
    async with server(lambda _: framed({"code": 0}, CLUSTER)) as address:
        assert await broker_addresses(address) == ["10.0.0.1:10911", "10.0.0.2:10911"]


@pytest.mark.parametrize(("code", "exists"), [(0, True), (17, False)])
async def test_a_topic_without_route_does_not_exist(code: int, exists: bool) -> None:  # noqa: FBT001
    def answer(request: dict[str, Any]) -> bytes:
        assert request["code"] == 105
        assert request["extFields"] == {"topic": "t"}
        return framed({"code": code, "remark": "no route"})

    async with server(answer) as address:
        assert await topic_exists(address, "t") is exists


async def test_another_answer_is_an_error_with_the_remark() -> None:
    async with server(lambda _: framed({"code": 1, "remark": "out of order"})) as address:
        with pytest.raises(RemotingError, match="out of order"):
            await topic_exists(address, "t")


@pytest.mark.parametrize("garbage", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", struct.pack("!II", 10, 3) + b"{x}abc"])
async def test_another_kind_of_server_is_an_error(garbage: bytes) -> None:
    async with server(lambda _: garbage) as address:
        with pytest.raises(RemotingError):
            await ask(address, 106, timeout=20)


async def test_nobody_there_is_an_error(free_port: int) -> None:
    with pytest.raises(RemotingError, match=f"127.0.0.1:{free_port}"):
        await ask(f"127.0.0.1:{free_port}", 106)
