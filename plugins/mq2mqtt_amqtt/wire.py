"""The bytes of one device's connection: written without waiting, read packet by packet.

amqtt's adapters have no way to write without a coroutine, to see how much is buffered, or to close a socket whose
peer has stopped reading; asyncio's transport and the `websockets` connection below them do.
"""

import asyncio
import contextlib
import io
from typing import Protocol

import websockets
from amqtt.adapters import (
    ReaderAdapter,
    StreamReaderAdapter,
    StreamWriterAdapter,
    WebSocketsReader,
    WebSocketsWriter,
    WriterAdapter,
)

__all__ = ["BUFFER_HIGH", "ByteReader", "Wire", "open_reader", "open_wire"]

BUFFER_HIGH = 256 * 1024
"""Bytes in a connection's write buffer above which nothing more is handed to it (one packet may overshoot)."""

_BUFFER_LOW = 64 * 1024
_GATHER_BYTES = 64 * 1024
_CLOSE_SECONDS = 1.0
_POLL_SECONDS = 0.01


class Wire(Protocol):
    """The writing end of a connection."""

    @property
    def buffered(self) -> int:
        """Bytes written here that the operating system has not taken."""

    @property
    def lost(self) -> bool:
        """Whether the connection is closed or closing."""

    def write(self, data: bytes) -> None:
        """Write a whole packet, or nothing once the connection is lost. Never blocks."""

    async def drained(self) -> None:
        """Return when the buffer has emptied well below `BUFFER_HIGH`, or the connection is lost."""

    async def close(self) -> None:
        """Send what is buffered and close; after a second without that, cut the connection."""


class _StreamWire:
    """TCP and TLS.

    What is written in one turn of the loop leaves together: transports make a system call of each write, which was
    a quarter to a third of what a message cost.
    """

    def __init__(self, adapter: StreamWriterAdapter) -> None:
        self._adapter = adapter
        self._writer: asyncio.StreamWriter = adapter._writer  # noqa: SLF001 - see the module docstring
        self._transport = self._writer.transport
        self._transport.set_write_buffer_limits(high=BUFFER_HIGH, low=_BUFFER_LOW)
        self._loop = asyncio.get_running_loop()
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0

    @property
    def buffered(self) -> int:
        return self._gathered_bytes + self._transport.get_write_buffer_size()

    @property
    def lost(self) -> bool:
        return self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        if not self._gathered:
            self._loop.call_soon(self._flush)
        self._gathered.append(data)
        self._gathered_bytes += len(data)
        if self._gathered_bytes >= _GATHER_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._gathered and not self._transport.is_closing():
            self._transport.write(b"".join(self._gathered))
        self._gathered.clear()
        self._gathered_bytes = 0

    async def drained(self) -> None:
        self._flush()
        with contextlib.suppress(OSError):
            await self._writer.drain()
            # `drain` waits only once the transport has called `pause_writing`; TLS and uvloop do that later.
            while not self.lost and self.buffered > BUFFER_HIGH:
                await asyncio.sleep(_POLL_SECONDS)
                await self._writer.drain()

    async def close(self) -> None:
        self._adapter.is_closed = True
        self._flush()
        self._transport.close()
        cut = asyncio.get_running_loop().call_later(_CLOSE_SECONDS, self._transport.abort)
        try:
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        finally:
            cut.cancel()


class _AdapterWire:
    """WebSocket, and whatever an external listener brings: its `drain` is the only way to send.

    One task sends what has gathered, and ends when there is nothing left. `lock` is the one that amqtt holds while it
    writes: `WebSocketsWriter.drain` throws away what another writer adds meanwhile.
    """

    def __init__(self, adapter: WriterAdapter, lock: asyncio.Lock, name: str) -> None:
        self._adapter = adapter
        self._lock = lock
        self._name = name
        self._parts: list[bytes] = []
        self._buffered = 0
        self._sender: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._lost = False

    @property
    def buffered(self) -> int:
        return self._buffered

    @property
    def lost(self) -> bool:
        return self._lost

    def write(self, data: bytes) -> None:
        if self._lost:
            return
        self._parts.append(data)
        self._buffered += len(data)
        if self._buffered > BUFFER_HIGH:
            self._room.clear()
        if self._sender is None:
            self._sender = asyncio.create_task(self._send(), name=f"mq2mqtt.send[{self._name}]")

    async def _send(self) -> None:
        try:
            while self._parts:
                data = b"".join(self._parts)
                self._parts.clear()
                async with self._lock:
                    self._adapter.write(data)
                    await self._adapter.drain()
                self._buffered -= len(data)
                if self._buffered <= _BUFFER_LOW:
                    self._room.set()
        except (OSError, websockets.ConnectionClosed):
            self._lose()
        finally:
            self._sender = None

    def _lose(self) -> None:
        self._lost = True
        self._parts.clear()
        self._room.set()

    async def drained(self) -> None:
        if not self._lost and self._buffered > BUFFER_HIGH:
            await self._room.wait()

    async def close(self) -> None:
        if self._sender is not None:
            await asyncio.wait({self._sender}, timeout=_CLOSE_SECONDS)
        self._lose()
        sender = self._sender
        if sender is not None:
            sender.cancel()
        with contextlib.suppress(OSError, TimeoutError, websockets.ConnectionClosed):
            await asyncio.wait_for(self._adapter.close(), _CLOSE_SECONDS)
        if isinstance(self._adapter, WebSocketsWriter):
            self._adapter._protocol.transport.abort()  # noqa: SLF001 - see the module docstring


def open_wire(adapter: WriterAdapter, lock: asyncio.Lock, name: str) -> Wire:
    """Return the writing end below an amqtt adapter; `name` is for the task that it may need."""
    return _StreamWire(adapter) if isinstance(adapter, StreamWriterAdapter) else _AdapterWire(adapter, lock, name)


class ByteReader(Protocol):
    """The reading end of a connection."""

    async def readexactly(self, n: int) -> bytes:
        """Return the next `n` bytes.

        Raises:
            EOFError: the peer has gone (also `OSError`).
        """

    def gone(self) -> bool:
        """Whether the peer is known to have closed, although bytes that it sent before may still be unread."""


class _StreamBytes:
    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.readexactly = reader.readexactly

    def gone(self) -> bool:
        # `at_eof` is true only once everything has been read.
        return self._reader._eof or self._reader.exception() is not None  # type: ignore[attr-defined]  # noqa: SLF001


class _WebSocketBytes:
    """amqtt's own reader appends the last message for ever when the connection closes within a packet."""

    def __init__(self, adapter: WebSocketsReader) -> None:
        self._protocol = adapter._protocol  # noqa: SLF001 - see the module docstring
        # What came in one message with CONNECT.
        self._buffer = bytearray(adapter._stream.read())  # noqa: SLF001

    async def readexactly(self, n: int) -> bytes:
        while len(self._buffer) < n:
            try:
                message = await self._protocol.recv()
            except websockets.ConnectionClosed:
                raise EOFError from None
            self._buffer += message.encode() if isinstance(message, str) else message
        data = bytes(self._buffer[:n])
        del self._buffer[:n]
        return data

    def gone(self) -> bool:
        return self._protocol.close_code is not None


class _AdapterBytes:
    """Any other adapter, by its contract: fewer bytes than asked for mean the end."""

    def __init__(self, adapter: ReaderAdapter) -> None:
        self._adapter = adapter

    async def readexactly(self, n: int) -> bytes:
        data = io.BytesIO()
        while data.tell() < n:
            part = await self._adapter.read(n - data.tell())
            if not part:
                raise EOFError
            data.write(part)
        return data.getvalue()

    def gone(self) -> bool:
        return False


def open_reader(adapter: ReaderAdapter) -> ByteReader:
    """Return the reading end below an amqtt adapter, behind the CONNECT packet."""
    if isinstance(adapter, StreamReaderAdapter):
        return _StreamBytes(adapter._reader)  # noqa: SLF001 - see the module docstring
    if isinstance(adapter, WebSocketsReader):
        return _WebSocketBytes(adapter)
    return _AdapterBytes(adapter)
