import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mq2mqtt.rocketmq.connection import Connection, open_connection
from mq2mqtt.rocketmq.errors import NotConnected, RequestTimeout
from mq2mqtt.rocketmq.remoting import Command, FrameDecoder, encode_request, encode_response
from tests.unit.rocketmq.peer import Serve, answer_all, peer, requests, say_nothing, talk_garbage


class Watch:
    """What a connection reports."""

    def __init__(self) -> None:
        self.asked: list[Command] = []
        self.lost: list[str] = []

    def on_request(self, _connection: Connection, request: Command) -> tuple[int, str] | None:
        self.asked.append(request)
        return (3, "not done") if request.code != 39 else None

    def on_lost(self, _connection: Connection, reason: str) -> None:
        self.lost.append(reason)


@asynccontextmanager
async def connected(serve: Serve) -> AsyncIterator[tuple[Connection, Watch]]:
    watch = Watch()
    async with peer(serve) as server:
        connection = await open_connection(
            server.address, ssl_context=None, on_request=watch.on_request, on_lost=watch.on_lost, timeout=10
        )
        yield connection, watch
        connection.close()


async def test_answers_find_their_callers_in_any_order_and_cut_anywhere() -> None:
    async def reverse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = []
        async for request in requests(reader):
            seen.append(request)
            if len(seen) == 50:
                answers = b"".join(encode_response(request, request.code, "x" * request.code) for request in seen[::-1])
                for start in range(0, len(answers), 7):
                    writer.write(answers[start : start + 7])
                    await writer.drain()

    async with connected(reverse) as (connection, _):
        answers = await asyncio.gather(*(connection.call(code, {}, timeout=10) for code in range(50)))
    assert [(answer.code, len(answer.remark)) for answer in answers] == [(code, code) for code in range(50)]


async def test_a_call_without_answer_times_out_alone() -> None:
    async def answer_even(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for request in requests(reader):
            if request.code % 2 == 0:
                writer.write(encode_response(request, 0))

    async with connected(answer_even) as (connection, watch):
        with pytest.raises(RequestTimeout, match=r"within 0\.1 s"):
            await connection.call(1, {}, timeout=0.1)
        assert (await connection.call(2, {}, timeout=10)).code == 0
        assert not watch.lost


async def test_a_late_answer_is_nobodys() -> None:
    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held: list[Command] = []
        async for request in requests(reader):
            held.append(request)
            if request.code == 2:
                for one in held:
                    writer.write(encode_response(one, 0, str(one.code)))

    async with connected(late) as (connection, _):
        with pytest.raises(RequestTimeout):
            await connection.call(1, {}, timeout=0.05)
        assert (await connection.call(2, {}, timeout=10)).remark == "2"


async def test_a_peer_that_answers_nothing_at_all_is_given_up() -> None:
    async with connected(say_nothing) as (connection, watch):
        waiting = asyncio.ensure_future(connection.call(9, {}, timeout=60))
        for _ in range(2):
            assert not connection.is_lost
            with pytest.raises((RequestTimeout, NotConnected)):
                await connection.call(1, {}, timeout=0.1)
        with pytest.raises(NotConnected, match="stopped answering"):
            await waiting
        assert connection.is_lost
        assert len(watch.lost) == 1
        with pytest.raises(NotConnected):
            await connection.call(1, {}, timeout=10)


async def test_garbage_ends_the_connection_and_every_call() -> None:
    async with connected(talk_garbage) as (connection, watch):
        results = await asyncio.gather(*(connection.call(1, {}, timeout=60) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [NotConnected] * 3
    assert not connection.answered
    assert ["frame" in reason or "header" in reason for reason in watch.lost] == [True]


async def test_a_connection_closed_by_the_peer_fails_what_is_in_flight() -> None:
    async def hang_up(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async with connected(hang_up) as (connection, watch):
        with pytest.raises(NotConnected):
            await connection.call(1, {}, timeout=60)
        assert len(watch.lost) == 1


async def test_requests_of_the_peer_are_answered_unless_one_way() -> None:
    answers: asyncio.Queue[Command] = asyncio.Queue(maxsize=10)

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = FrameDecoder()
        one_way = encode_request(40, 7, {"consumerGroup": "g"}).replace(b'"flag":0', b'"flag":2')
        writer.write(encode_request(39, 6, {}) + one_way + encode_request(307, 8, {}))
        while data := await reader.read(65536):
            for command in decoder.feed(data):
                answers.put_nowait(command)

    async with connected(ask) as (_, watch):
        answer = await asyncio.wait_for(answers.get(), 10)
        assert (answer.opaque, answer.code, answer.is_response, answer.remark) == (8, 3, True, "not done")
        assert [request.code for request in watch.asked] == [39, 40, 307]
        assert answers.empty()


async def test_a_peer_that_does_not_read_holds_callers_back() -> None:
    reading = asyncio.Event()

    async def read_later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reading.wait()
        await answer_all(reader, writer)

    body = bytes(8 * 1024 * 1024)  # more than the kernel's buffers take
    async with connected(read_later) as (connection, _):
        calls = [asyncio.ensure_future(connection.call(1, {}, body, timeout=60)) for _ in range(5)]
        await asyncio.sleep(0.1)
        let_through = connection._opaque  # noqa: SLF001
        reading.set()
        assert {answer.code for answer in await asyncio.gather(*calls)} == {0}
    assert let_through == 1


async def test_a_peer_that_never_reads_is_given_up() -> None:
    async def never(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    body = bytes(8 * 1024 * 1024)
    async with connected(never) as (connection, watch):
        calls = [asyncio.ensure_future(connection.call(1, {}, body, timeout=60)) for _ in range(8)]
        await asyncio.sleep(0.01)
        with pytest.raises(RequestTimeout):
            await connection.call(2, {}, timeout=0.2)
        assert watch.lost == ["the peer does not read"]
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} == {NotConnected}


async def test_a_cancelled_call_leaves_nothing_behind() -> None:
    async with connected(say_nothing) as (connection, _):
        call = asyncio.ensure_future(connection.call(1, {}, timeout=60))
        await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not connection._waiting  # noqa: SLF001


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no.such.host.invalid:9876", "127.0.0.1:x", f"{'x' * 70}.y:1"])
async def test_what_cannot_be_reached_is_not_connected(address: str) -> None:
    watch = Watch()
    with pytest.raises(NotConnected, match=address[:20]):
        await open_connection(address, ssl_context=None, on_request=watch.on_request, on_lost=watch.on_lost, timeout=10)


async def test_who_closes_without_an_answer_may_want_tls() -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.close()

    async with connected(close) as (connection, watch):
        with pytest.raises(NotConnected, match="closed by the peer without an answer; does it want TLS"):
            await connection.call(1, {}, timeout=10)
        assert connection.is_lost
    assert watch.lost == ["closed by the peer without an answer; does it want TLS?"]


async def test_who_does_not_speak_tls_is_named() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"no TLS here")

    watch = Watch()
    async with peer(talk) as server:
        with pytest.raises(NotConnected, match=r"no TLS connection: wrong version number; is TLS enabled there\?"):
            await open_connection(
                server.address,
                ssl_context=ssl.create_default_context(),
                on_request=watch.on_request,
                on_lost=watch.on_lost,
                timeout=10,
            )
