"""A TCP proxy that can be cut, or swallow what it gets: RocketMQ away, without stopping one that other tests use."""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

_Result = TypeVar("_Result")


class TcpProxy:
    """Runs in a thread of its own. Use as a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        self._open = True
        self._swallowing = False
        self._delay = 0.0
        self._left: int | None = None
        """Bytes until `cut_after` cuts."""
        self._living: set[int] = set()
        """Connections whose data goes through, by their number."""
        self._numbers = itertools.count()
        self._writers: set[asyncio.StreamWriter] = set()
        self._servers: list[asyncio.Server] = []
        self._serving: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def listen(self, target: str) -> str:
        """Return an address that leads to `target`."""
        return self._do(self._listen(target))

    def cut(self) -> None:
        """Reset all connections, and every new one."""
        self._do(self._cut())

    def cut_after(self, count: int) -> None:
        """Reset all connections when `count` more bytes have gone through, both ways; new ones go through."""
        self._left = count

    @property
    def is_to_cut(self) -> bool:
        """Whether what `cut_after` said is yet to come."""
        return self._left is not None

    def delay(self, seconds: float) -> None:
        """Hold all that comes, either way, for so long, up to 64 KiB at a time."""
        self._delay = seconds

    def swallow(self) -> None:
        """Make all connections half-open, and every new one: they stay, and what is sent over them is gone."""
        self._do(self._swallow())

    def mend(self) -> None:
        """Let new connections through again; half-open ones stay as they are."""
        self._open = True
        self._swallowing = False
        self._delay = 0.0

    async def _listen(self, target: str) -> str:
        host, _, port = target.rpartition(":")

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._serving.add(task)
            try:
                if self._open:
                    there = await asyncio.open_connection(host, int(port))
                    self._writers |= {writer, there[1]}
                    number = next(self._numbers)
                    if not self._swallowing:
                        self._living.add(number)
                    await asyncio.gather(self._pump(number, reader, there[1]), self._pump(number, there[0], writer))
                    self._living.discard(number)
                    self._writers -= {writer, there[1]}
            except (OSError, asyncio.CancelledError):
                pass
            finally:
                writer.transport.abort()
                self._serving.discard(task)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self._servers.append(server)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _pump(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self._delay:
                    await asyncio.sleep(self._delay)
                if number in self._living:
                    writer.write(data[: self._left])
                    await writer.drain()
                    self._count(len(data))
        writer.transport.abort()

    def _count(self, carried: int) -> None:
        if self._left is None:
            return
        self._left -= min(carried, self._left)
        if self._left == 0:
            self._left = None
            self._reset_all()

    def _reset_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _swallow(self) -> None:
        self._swallowing = True
        self._living.clear()

    async def _cut(self) -> None:
        self._open = False
        self._reset_all()

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        await self._cut()
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving)
