"""A server on 127.0.0.1 that does what a test says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from mq2mqtt.rocketmq.remoting import Command, FrameDecoder, encode_response

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Peer:
    """Counts the connections it accepted."""

    def __init__(self, serve: Serve) -> None:
        self.address = ""
        self.connections = 0
        self._serve = serve
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self, *, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        task = asyncio.create_task(self._run(reader, writer), name="peer")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._serve(reader, writer)
        writer.close()


@asynccontextmanager
async def peer(serve: Serve) -> AsyncIterator[Peer]:
    server = Peer(serve)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def requests(reader: asyncio.StreamReader) -> AsyncIterator[Command]:
    decoder = FrameDecoder()
    while data := await reader.read(65536):
        for command in decoder.feed(data):
            yield command


async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer each request with its own code as the remark."""
    async for request in requests(reader):
        writer.write(encode_response(request, 0, str(request.code)))


async def say_nothing(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Read for ever and never answer: a half-open connection as the client sees it."""
    while await reader.read(65536):
        pass


async def talk_garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"SSH-2.0-OpenSSH_9.9\r\n" * 100)
    await reader.read()
