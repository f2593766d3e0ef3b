"""One MQTT 5 connection to the broker. Whoever makes it decides what comes after it has ended."""

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast
from urllib.parse import urlsplit

from mq2mqtt_mosquitto.mqtt5 import (
    PINGREQ,
    Connack,
    Decoder,
    Disconnect,
    MqttError,
    Packet,
    Publish,
    Suback,
    connect_packet,
    disconnect_packet,
    publish_packet,
    reason_text,
    subscribe_packet,
)

__all__ = ["Login", "MqttClient"]

KEEPALIVE_SECONDS = 10
_ANSWER_SECONDS = 10.0
_FAILURE = 0x80
_PORT, _TLS_PORT = 1883, 8883


@dataclass(frozen=True, slots=True)
class Login:
    """Who connects, and where to: `mqtt://`, `mqtts://` or `unix://`."""

    url: str
    client_id: str
    username: str | None = None
    password: str | None = None


class MqttClient(asyncio.Protocol):
    """A connection. `closed` gets the reason when it ends, however that happens."""

    def __init__(self, received: Callable[[str, bytes], None], room: Callable[[], None]) -> None:
        """Use `MqttClient.connect`."""
        self._received = received
        self._room = room
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._connack: asyncio.Future[Connack] = self._loop.create_future()
        # Bounded: whoever subscribes waits for the answer.
        self._subacks: dict[int, asyncio.Future[Suback]] = {}
        self._last_id = 0
        self._heard = True
        self._pinging: asyncio.TimerHandle | None = None
        self.is_full = False
        """Whether the connection has more to send than is good; `room` is called when it has not any more."""
        self.closed: asyncio.Future[str] = self._loop.create_future()

    @classmethod
    async def connect(cls, login: Login, *, received: Callable[[str, bytes], None], room: Callable[[], None]) -> Self:
        """Connect. `received` gets each message's topic and payload.

        Raises:
            OSError: there is no connection.
            MqttError: the broker lets nobody in like this.
        """
        loop = asyncio.get_running_loop()
        client = cls(received, room)
        url = urlsplit(login.url)
        async with asyncio.timeout(_ANSWER_SECONDS):
            if url.scheme == "unix":
                await loop.create_unix_connection(lambda: client, url.path)
            else:
                tls = ssl.create_default_context() if url.scheme == "mqtts" else None
                port = url.port or (_TLS_PORT if tls else _PORT)
                await loop.create_connection(lambda: client, url.hostname or "", port, ssl=tls)
            try:
                await client._log_in(login)
            except BaseException:
                client.close()
                raise
        client._ping()
        return client

    async def _log_in(self, login: Login) -> None:
        self._write(
            connect_packet(
                client_id=login.client_id,
                username=login.username,
                password=login.password,
                keepalive=KEEPALIVE_SECONDS,
            )
        )
        waited: list[asyncio.Future[Any]] = [self._connack, self.closed]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not self._connack.done():
            raise MqttError(f"the broker closed the connection: {self.closed.result()}")
        if self._connack.result().reason >= _FAILURE:
            raise MqttError(
                f"the broker refuses client id {login.client_id}: {reason_text(self._connack.result().reason)}"
            )

    # -- sending --

    def publish(self, topic: str, payload: bytes) -> None:
        """Send with QoS 0; nothing once the connection is closed."""
        self._write(publish_packet(topic, payload))

    async def subscribe(self, filters: Sequence[tuple[str, int]]) -> None:
        """Subscribe to topic filters, each with its QoS.

        Raises:
            MqttError: the broker refuses one, or does not answer.
        """
        self._last_id = self._last_id % 0xFFFF + 1
        number = self._last_id
        answer: asyncio.Future[Suback] = self._loop.create_future()
        self._subacks[number] = answer
        self._write(subscribe_packet(number, filters))
        waited: list[asyncio.Future[Any]] = [answer, self.closed]
        try:
            await asyncio.wait(waited, timeout=_ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._subacks[number]
        if not answer.done():
            raise MqttError("the broker did not answer a subscription")
        for (name, _), reason in zip(filters, answer.result().reasons, strict=False):
            if reason >= _FAILURE:
                raise MqttError(f"the broker refuses the subscription to {name}: {reason_text(reason)}")

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _ping(self) -> None:
        """Keep the connection alive, and find out whether it is."""
        if self.closed.done():
            return
        if not self._heard:
            self._end("the broker does not answer")
            return
        self._heard = False
        self._write(PINGREQ)
        self._pinging = self._loop.call_later(KEEPALIVE_SECONDS / 2, self._ping)

    def close(self) -> None:
        """Say goodbye and close. Idempotent."""
        self._write(disconnect_packet())
        if self._transport is not None:
            self._transport.close()
        self._ended("closed")

    # -- receiving: asyncio calls these --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        # uvloop's are none by inheritance.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._heard = True
        try:
            for packet in self._decoder.feed(data):
                self._take(packet)
        except MqttError as error:
            self._end(str(error))

    def _take(self, packet: Packet) -> None:
        if isinstance(packet, Publish):
            self._received(packet.topic, packet.payload)
        elif isinstance(packet, Connack):
            if not self._connack.done():
                self._connack.set_result(packet)
        elif isinstance(packet, Suback):
            answer = self._subacks.get(packet.packet_id)
            if answer is not None and not answer.done():
                answer.set_result(packet)
        elif isinstance(packet, Disconnect):
            self._end(reason_text(packet.reason))

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self.is_full = True

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self.is_full = False
        self._room()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._ended(str(exc) if exc else "the broker closed the connection")

    def _end(self, reason: str) -> None:
        self._ended(reason)
        if self._transport is not None:
            self._transport.abort()

    def _ended(self, reason: str) -> None:
        if self._pinging is not None:
            self._pinging.cancel()
        if not self.closed.done():
            self.closed.set_result(reason)
