"""A device for the guided tour: the few packets of MQTT 3.1.1 that one publish and one subscription need."""

import asyncio
import contextlib
import struct
from dataclasses import dataclass
from typing import Self

from mq2mqtt.errors import BridgeError

__all__ = ["Device", "DeviceError", "Received"]

_CONNACK, _PUBLISH, _PUBACK, _SUBACK = 2, 3, 4, 9
_INBOX = 1000
_ANSWER_DEADLINE = 20.0
_SUBACK_FAILURE = 0x80


class DeviceError(BridgeError):
    """The MQTT broker refused, closed the connection, or did not answer."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message that the device got."""

    topic: str
    payload: bytes
    qos: int


class Device:
    """One clean session. Use `connect`, then `subscribe` and `publish`; what comes is in `inbox`.

    `inbox` holds the newest 1000 messages that nobody took; older ones are dropped, already acknowledged.
    """

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.inbox: asyncio.Queue[Received] = asyncio.Queue(_INBOX)
        self._answers: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue(1)
        self._lost = asyncio.Event()
        self._packet_id = 0

    async def connect(self, host: str, port: int) -> Self:
        """Connect with a clean session, without keep-alive.

        Raises:
            DeviceError: nobody listens, or the broker refuses.
        """
        try:
            self._reader, self._writer = await asyncio.open_connection(host, port)
        except OSError as exc:
            raise DeviceError(f"no MQTT broker at {host}:{port}: {exc}") from exc
        self._receiver = asyncio.create_task(self._receive(), name=f"quickstart.device[{self.client_id}]")
        # Protocol name, level 4 = MQTT 3.1.1, clean session, keep-alive 0 = none (MQTT-3.1.2).
        self._write(0x10, _text("MQTT") + b"\x04\x02\x00\x00" + _text(self.client_id))
        answer = await self._answer(_CONNACK)
        if answer[1] != 0:
            raise DeviceError(f"the MQTT broker refused the connection, return code {answer[1]}")
        return self

    async def close(self) -> None:
        """Say DISCONNECT and close. Idempotent."""
        with contextlib.suppress(OSError):
            self._write(0xE0, b"")
            await self._writer.drain()
            self._writer.close()
            await self._writer.wait_closed()
        self._receiver.cancel()
        await asyncio.wait([self._receiver])

    async def subscribe(self, topic_filter: str) -> None:
        """Subscribe with QoS 1; raises `DeviceError`."""
        self._write(0x82, self._next_id() + _text(topic_filter) + b"\x01")
        if (await self._answer(_SUBACK))[2] == _SUBACK_FAILURE:
            raise DeviceError(f"the MQTT broker refused the subscription to {topic_filter}")

    async def publish(self, topic: str, payload: bytes) -> None:
        """Publish with QoS 1 and wait for PUBACK; raises `DeviceError`."""
        self._write(0x32, _text(topic) + self._next_id() + payload)
        await self._answer(_PUBACK)

    def _next_id(self) -> bytes:
        self._packet_id += 1
        return struct.pack("!H", self._packet_id)

    def _write(self, first_byte: int, body: bytes) -> None:
        self._writer.write(bytes([first_byte]) + _length(len(body)) + body)

    async def _answer(self, kind: int) -> bytes:
        """Wait for the answer to the one request that is open."""
        lost = asyncio.create_task(self._lost.wait(), name="quickstart.device.lost")
        got = asyncio.create_task(self._answers.get(), name="quickstart.device.answer")
        try:
            await asyncio.wait({lost, got}, timeout=_ANSWER_DEADLINE, return_when=asyncio.FIRST_COMPLETED)
            if got.done():
                packet_kind, body = got.result()
                if packet_kind == kind:
                    return body
                raise DeviceError(f"the MQTT broker answered with packet type {packet_kind}, not {kind}")
        finally:
            lost.cancel()
            got.cancel()
        why = "closed the connection" if self._lost.is_set() else f"did not answer within {_ANSWER_DEADLINE:g} s"
        raise DeviceError(f"the MQTT broker {why}")

    async def _receive(self) -> None:
        try:
            while True:
                first_byte = (await self._reader.readexactly(1))[0]
                body = await self._reader.readexactly(await self._read_length())
                if first_byte >> 4 == _PUBLISH:
                    self._take(first_byte >> 1 & 3, body)
                else:
                    await self._answers.put((first_byte >> 4, body))
        except (OSError, asyncio.IncompleteReadError):
            self._lost.set()

    async def _read_length(self) -> int:
        length = shift = 0
        while True:
            byte = (await self._reader.readexactly(1))[0]
            length |= (byte & 0x7F) << shift
            if byte < 0x80:  # noqa: PLR2004 - the continuation bit (MQTT 2.2.3)
                return length
            shift += 7

    def _take(self, qos: int, body: bytes) -> None:
        end = 2 + int.from_bytes(body[:2], "big")
        topic = body[2:end].decode()
        if qos:
            # Subscribed with QoS 1: never 2.
            self._write(0x40, body[end : end + 2])
            end += 2
        if self.inbox.full():
            self.inbox.get_nowait()
        self.inbox.put_nowait(Received(topic, body[end:], qos))


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("!H", len(data)) + data


def _length(length: int) -> bytes:
    """Encode a remaining length (MQTT 2.2.3)."""
    encoded = bytearray()
    while True:
        length, low = divmod(length, 128)
        encoded.append(low | (0x80 if length else 0))
        if not length:
            return bytes(encoded)
