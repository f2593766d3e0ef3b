import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from amqtt.adapters import StreamWriterAdapter

from mq2mqtt_amqtt.wire import Wire, open_wire


@dataclass
class Line:
    """A wire, the peer's reading end, and what the wire gave to its transport."""

    wire: Wire
    peer: asyncio.StreamReader
    writes: list[bytes] = field(default_factory=list)


@pytest.fixture
async def line(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Line]:
    accepted: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    accepted = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda *streams: accepted.set_result(streams), "127.0.0.1", 0)
    peer, peer_writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    _, writer = await accepted
    line = Line(open_wire(StreamWriterAdapter(writer), asyncio.Lock(), "c1"), peer)
    write = writer.transport.write

    def noted(data: bytes) -> None:
        line.writes.append(data)
        write(data)

    monkeypatch.setattr(writer.transport, "write", noted)
    yield line
    await line.wire.close()
    peer_writer.close()
    await peer_writer.wait_closed()
    server.close()
    await server.wait_closed()


async def test_packets_of_one_turn_leave_together_and_count_as_buffered_until_then(line: Line) -> None:
    line.wire.write(b"one")
    line.wire.write(b"two")
    assert (line.writes, line.wire.buffered) == ([], 6)
    assert await line.peer.readexactly(6) == b"onetwo"
    assert (line.writes, line.wire.buffered) == ([b"onetwo"], 0)
    line.wire.write(b"three")
    assert await line.peer.readexactly(5) == b"three"


async def test_much_is_not_gathered(line: Line) -> None:
    line.wire.write(b"small")
    line.wire.write(bytes(65_536))
    assert line.writes == [b"small" + bytes(65_536)]


async def test_what_was_written_before_the_end_arrives(line: Line) -> None:
    line.wire.write(b"last words")
    await line.wire.close()
    assert line.wire.lost
    line.wire.write(b"too late")
    assert await line.peer.read() == b"last words"
