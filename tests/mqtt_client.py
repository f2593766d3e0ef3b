"""A raw MQTT 3.1.1 client for tests: sends any packet, answers only what it is told to, and can stop reading."""

import asyncio
import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = 1, 2, 3, 4, 5, 6, 7
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT = 8, 9, 10, 11, 12, 13, 14

SECONDS = 60.0
"""How long a test waits for what must happen; the machine may be busy."""


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet as it came: type, flags, and everything behind the fixed header."""

    kind: int
    flags: int
    body: bytes

    @property
    def packet_id(self) -> int:
        """Of an acknowledgement."""
        return int(struct.unpack_from("!H", self.body)[0])


@dataclass(frozen=True, slots=True)
class Message:
    """A PUBLISH that the client received."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    packet_id: int


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("!H", len(data)) + data


def packet(first: int, body: bytes) -> bytes:
    length = bytearray()
    rest = len(body)
    while True:
        rest, low = divmod(rest, 128)
        length.append(low | 128 if rest else low)
        if not rest:
            return bytes((first,)) + bytes(length) + body


def connect_packet(  # noqa: PLR0913 - the fields of CONNECT
    client_id: str,
    *,
    clean: bool = True,
    keep_alive: int = 60,
    will: tuple[str, bytes, int, bool] | None = None,
    username: str | None = None,
    password: str | None = None,
) -> bytes:
    flags = 2 if clean else 0
    payload = text(client_id)
    if will is not None:
        topic, message, qos, retain = will
        flags |= 4 | qos << 3 | (32 if retain else 0)
        payload += text(topic) + text(message)
    if username is not None:
        flags |= 128
        payload += text(username)
    if password is not None:
        flags |= 64
        payload += text(password)
    return packet(0x10, text("MQTT") + bytes((4, flags)) + struct.pack("!H", keep_alive) + payload)


def publish_packet(  # noqa: PLR0913 - the fields of PUBLISH
    topic: str, payload: bytes, *, qos: int = 0, packet_id: int = 0, retain: bool = False, dup: bool = False
) -> bytes:
    first = 0x30 | (8 if dup else 0) | qos << 1 | (1 if retain else 0)
    return packet(first, text(topic) + (struct.pack("!H", packet_id) if qos else b"") + payload)


def subscribe_packet(packet_id: int, *filters: tuple[str, int]) -> bytes:
    body = b"".join(text(name) + bytes((qos,)) for name, qos in filters)
    return packet(0x82, struct.pack("!H", packet_id) + body)


def unsubscribe_packet(packet_id: int, *filters: str) -> bytes:
    return packet(0xA2, struct.pack("!H", packet_id) + b"".join(text(name) for name in filters))


def ack_packet(kind: int, packet_id: int) -> bytes:
    return packet(kind << 4 | (2 if kind == PUBREL else 0), struct.pack("!H", packet_id))


class Client:
    """A connection. `packets` is everything that came but PUBLISH, `messages` the PUBLISH packets.

    With `acknowledge` (the default) it answers PUBLISH and PUBREL by itself.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, acknowledge: bool) -> None:
        self._reader = reader
        self.writer = writer
        self.acknowledge = acknowledge
        self.packets: list[Packet] = []
        self.messages: list[Message] = []
        self.closed = asyncio.Event()
        self._changed = asyncio.Condition()
        self._reading = asyncio.Event()
        self._reading.set()
        self._task = asyncio.create_task(self._read(), name="test.mqtt-client")
        self._last_id = 0

    @classmethod
    async def open(cls, port: int, *, acknowledge: bool = True, host: str = "127.0.0.1", limit: int = 2**16) -> Self:
        """Connect the socket; nothing is sent."""
        reader, writer = await asyncio.open_connection(host, port, limit=limit)
        return cls(reader, writer, acknowledge=acknowledge)

    @classmethod
    async def connect(  # noqa: PLR0913 - the fields of CONNECT
        cls,
        port: int,
        client_id: str,
        *,
        clean: bool = True,
        keep_alive: int = 60,
        will: tuple[str, bytes, int, bool] | None = None,
        username: str | None = None,
        password: str | None = None,
        acknowledge: bool = True,
        code: int = 0,
    ) -> Self:
        """Connect and wait for CONNACK with this return code."""
        client = await cls.open(port, acknowledge=acknowledge)
        client.send(
            connect_packet(
                client_id, clean=clean, keep_alive=keep_alive, will=will, username=username, password=password
            )
        )
        try:
            answer = await client.wait_packet(CONNACK)
            assert answer.body[1] == code, f"CONNACK {answer.body[1]}"
        except AssertionError:
            await client.drop()
            raise
        return client

    @property
    def address(self) -> str:
        host, port = self.writer.get_extra_info("sockname")[:2]
        return f"{host}:{port}"

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def _read(self) -> None:
        try:
            while True:
                await self._reading.wait()
                first = (await self._reader.readexactly(1))[0]
                length = shift = 0
                while True:
                    low = (await self._reader.readexactly(1))[0]
                    length |= (low & 127) << shift
                    shift += 7
                    if not low & 128:
                        break
                body = await self._reader.readexactly(length)
                async with self._changed:
                    self._take(Packet(first >> 4, first & 15, body))
                    self._changed.notify_all()
        except (EOFError, OSError):
            pass
        finally:
            async with self._changed:
                self.closed.set()
                self._changed.notify_all()

    def _take(self, came: Packet) -> None:
        if came.kind == PUBREL and self.acknowledge:
            self.send(ack_packet(PUBCOMP, came.packet_id))
        if came.kind != PUBLISH:
            self.packets.append(came)
            return
        size = struct.unpack_from("!H", came.body)[0]
        end, qos, number = 2 + size, came.flags >> 1 & 3, 0
        if qos:
            number = struct.unpack_from("!H", came.body, end)[0]
        message = Message(
            came.body[2:end].decode(),
            came.body[end + (2 if qos else 0) :],
            qos,
            bool(came.flags & 1),
            bool(came.flags & 8),
            number,
        )
        self.messages.append(message)
        if qos and self.acknowledge:
            self.send(ack_packet(PUBACK if qos == 1 else PUBREC, number))

    async def wait(self, condition: Callable[[], bool], what: str = "condition") -> None:
        """Wait until `condition` holds; it is looked at whenever something came or the connection closed."""
        try:
            async with asyncio.timeout(SECONDS), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            raise AssertionError(f"no {what}; {len(self.messages)} messages, {self.packets[-3:]}") from None

    async def wait_packet(self, kind: int, packet_id: int | None = None) -> Packet:
        """Wait for a packet and take it out of `packets`."""
        found: list[Packet] = []

        def look() -> bool:
            found[:] = [p for p in self.packets if p.kind == kind and (packet_id is None or p.packet_id == packet_id)][
                :1
            ]
            return bool(found) or self.closed.is_set()

        await self.wait(look, f"packet {kind}")
        assert found, f"connection closed before packet {kind}"
        self.packets.remove(found[0])
        return found[0]

    async def wait_messages(self, count: int) -> list[Message]:
        await self.wait(lambda: len(self.messages) >= count, f"{count} messages")
        return self.messages

    async def wait_closed(self) -> None:
        await self.wait(self.closed.is_set, "end of the connection")

    async def subscribe(self, *filters: tuple[str, int]) -> list[int]:
        """Subscribe; return the granted QoS of each filter."""
        self._last_id += 1
        self.send(subscribe_packet(self._last_id, *filters))
        return list((await self.wait_packet(SUBACK, self._last_id)).body[2:])

    async def unsubscribe(self, *filters: str) -> None:
        self._last_id += 1
        self.send(unsubscribe_packet(self._last_id, *filters))
        await self.wait_packet(UNSUBACK, self._last_id)

    async def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        """Publish and wait until the broker has taken it (QoS 0: until it has answered a PINGREQ behind it)."""
        self._last_id += 1
        number = self._last_id
        self.send(publish_packet(topic, payload, qos=qos, packet_id=number, retain=retain))
        if qos == 0:
            await self.ping()
        elif qos == 1:
            await self.wait_packet(PUBACK, number)
        else:
            await self.wait_packet(PUBREC, number)
            self.send(ack_packet(PUBREL, number))
            await self.wait_packet(PUBCOMP, number)

    async def ping(self) -> None:
        self.send(b"\xc0\x00")
        await self.wait_packet(PINGRESP)

    def stop_reading(self) -> None:
        """Read nothing more from the socket; what is on its way fills the buffers of both systems."""
        self._reading.clear()
        transport = self.writer.transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()

    def resume_reading(self) -> None:
        """Undo `stop_reading`."""
        self._reading.set()
        transport = self.writer.transport
        assert isinstance(transport, asyncio.Transport)
        transport.resume_reading()

    async def disconnect(self) -> None:
        """Send DISCONNECT and close."""
        self.send(b"\xe0\x00")
        await self.drop()

    async def drop(self) -> None:
        """Close the socket without a word."""
        self._task.cancel()
        self.writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await self._task
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    def abort(self) -> None:
        """Reset the connection."""
        self._task.cancel()
        self.writer.transport.abort()
