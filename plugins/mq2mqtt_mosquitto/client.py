"""One MQTT 5 connection to a broker: paho-mqtt on the event loop. Beside `client_types`, nothing else knows paho.

A connection is never mended: whoever made it decides what comes after it has ended.
"""

import asyncio
import ssl
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

import paho.mqtt.client as paho
from loguru import logger
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.exception import MQTTException
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from mq2mqtt.message import MqttProperties
from mq2mqtt_mosquitto.client_types import (
    SESSION_FOREVER,
    BrokerLimits,
    Incoming,
    Login,
    MqttError,
    Subscription,
    limits_of,
    new_paho,
    options,
    pack,
    unpack,
)

__all__ = [
    "NO_SUBSCRIBER",
    "SESSION_FOREVER",
    "BrokerLimits",
    "Incoming",
    "Login",
    "MqttClient",
    "MqttError",
    "Subscription",
]

NO_SUBSCRIBER: Final = 0x10
"""Reason with which a broker may acknowledge a publish that nobody has subscribed to."""

_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 10.0
_FAILURE = 0x80
_TURN_SECONDS = 0.005
_FULL_BYTES = 1 << 20


class MqttClient:
    """A connection. `closed` gets the reason when it ends, however that happens."""

    def __init__(self, login: Login, received: Callable[[Incoming], None], room: Callable[[], None]) -> None:
        """Use `MqttClient.connect`."""
        self._login = login
        self._received = received
        self._room = room
        self._loop = asyncio.get_running_loop()
        self._paho = new_paho(login)
        self._connected: asyncio.Future[tuple[bool, ReasonCode, BrokerLimits]] = self._loop.create_future()
        # Bounded: whoever subscribes waits for the answer.
        self._answers: dict[int, asyncio.Future[list[ReasonCode]]] = {}
        # Bounded by the windows of those who publish.
        self._unacknowledged: dict[int, Callable[[int], None]] = {}
        self._descriptor = -1
        self._is_writing = self._has_writer = False
        self._unsent_bytes = 0
        self._heard = 0
        self._looking: asyncio.TimerHandle | None = None
        self.session_present = False
        """Whether the broker had kept this client's session."""
        self.limits = BrokerLimits()
        self.closed: asyncio.Future[str] = self._loop.create_future()

    @classmethod
    async def connect(cls, login: Login, *, received: Callable[[Incoming], None], room: Callable[[], None]) -> Self:
        """Connect. `received` gets each message; what is not acknowledged comes again in a later connection.

        Raises:
            OSError: there is no connection.
            MqttError: the broker lets nobody in like this.
        """
        client = cls(login, received, room)
        async with asyncio.timeout(_ANSWER_SECONDS):
            # It blocks: name lookup, TCP, TLS. paho's callbacks are set only when it is back on this thread.
            await asyncio.to_thread(client._paho.reconnect)
            client._attach()
            try:
                await client._log_in()
            except BaseException:
                client.close()
                raise
        return client

    async def _log_in(self) -> None:
        waited: list[asyncio.Future[Any]] = [self._connected, self.closed]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not self._connected.done():
            raise MqttError(f"the broker ended the connection before it let anybody in: {self.closed.result()}")
        self.session_present, reason, self.limits = self._connected.result()
        if reason.value >= _FAILURE:
            raise MqttError(f"the broker refuses client id {self._login.client_id}: {reason}")

    # -- sending --

    @property
    def is_full(self) -> bool:
        """Whether there is more to send than is good; `room` is called when all is sent."""
        return self._unsent_bytes > _FULL_BYTES

    def publish(  # noqa: PLR0913 - the fields of PUBLISH
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 0,
        retain: bool = False,
        properties: MqttProperties | None = None,
        done: Callable[[int], None] | None = None,
    ) -> None:
        """Send a message; nothing once the connection is closed. Whoever publishes keeps to `limits`.

        `done` is called with the broker's reason (0 or `NO_SUBSCRIBER`; from 0x80 on it refuses), for QoS 0 with 0 when
        the message is written, and not at all if the connection ends before. A later connection does not know which of
        them the broker has got: with QoS 2 it should begin with `clean_start`.

        Raises:
            ValueError: the topic holds a wildcard, or a property has a value that MQTT does not have.
        """
        try:
            packed = None if properties is None else pack(properties)
            info = self._paho.publish(topic, payload, qos, retain, packed)
        except (MQTTException, struct.error) as error:
            raise ValueError(f"a property does not fit: {error}") from error
        if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._unsent_bytes += len(payload)
            if done is not None:
                self._unacknowledged[info.mid] = done

    def acknowledge(self, message: Incoming) -> None:
        """Tell the broker that it need not send `message` again; nothing once the connection is closed.

        With QoS 2 the broker hands it over before it is `received`: what must survive this process is subscribed with
        QoS 1.
        """
        if message.qos:
            self._paho.ack(message.packet_id, message.qos)

    async def subscribe(self, subscriptions: Sequence[Subscription]) -> list[int]:
        """Subscribe; return the QoS that the broker grants each.

        Raises:
            MqttError: the broker refuses one, or does not answer.
        """
        wanted = [(one.topic_filter, options(one)) for one in subscriptions]
        return await self._ask("subscription to", [name for name, _ in wanted], self._paho.subscribe(wanted))

    async def unsubscribe(self, topic_filters: Sequence[str]) -> None:
        """End subscriptions.

        Raises:
            MqttError: the broker refuses one, or does not answer.
        """
        await self._ask("end of the subscription to", topic_filters, self._paho.unsubscribe(list(topic_filters)))

    async def _ask(self, what: str, names: Sequence[str], sent: tuple[MQTTErrorCode, int | None]) -> list[int]:
        _, number = sent
        if number is None:
            raise MqttError("the connection is closed")
        answer: asyncio.Future[list[ReasonCode]] = self._loop.create_future()
        self._answers[number] = answer
        waited: list[asyncio.Future[Any]] = [answer, self.closed]
        try:
            await asyncio.wait(waited, timeout=_ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._answers[number]
        if not answer.done():
            raise MqttError(f"the broker does not answer a {what} {', '.join(names)}")
        for name, reason in zip(names, answer.result(), strict=False):
            if reason.value >= _FAILURE:
                raise MqttError(f"the broker refuses the {what} {name}: {reason}")
        return [reason.value for reason in answer.result()]

    def close(self) -> None:
        """Say goodbye and close. Idempotent."""
        self._end("closed")
        self._paho.disconnect()
        self._paho.loop_write()
        # It is open still where there was no room for the goodbye.
        if (connection := self._paho.socket()) is not None:
            self._detach()
            connection.close()

    # -- between paho and the event loop --

    def _attach(self) -> None:
        client = self._paho
        client.on_connect = lambda _, __, flags, reason, told: self._let_in(flags.session_present, reason, told)
        client.on_message = lambda _, __, message: self._take(message)
        client.on_publish = lambda _, __, number, reason, ___: self._acknowledged(number, reason)
        client.on_subscribe = lambda _, __, number, reasons, ___: self._answered(number, reasons)
        client.on_unsubscribe = lambda _, __, number, reasons, ___: self._answered(number, reasons)
        client.on_disconnect = lambda _, __, flags, reason, ___: self._lost(flags, reason)
        client.on_socket_close = lambda _, __, ___: self._detach()
        client.on_socket_register_write = lambda _, __, ___: self._write_soon()
        connection = client.socket()
        if connection is None:
            self._end("the broker closed the connection")
            return
        self._descriptor = connection.fileno()
        self._loop.add_reader(self._descriptor, self._read)
        self._write_soon()
        self._look()

    def _detach(self) -> None:
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            self._loop.remove_writer(self._descriptor)
            self._descriptor = -1

    def _read(self) -> None:
        """Take what came; the rest in a later turn of the loop."""
        until = self._loop.time() + _TURN_SECONDS
        while self._loop.time() < until:
            heard = self._heard
            if not self._guarded(self._paho.loop_read):
                return
            connection = self._paho.socket()
            is_more_decrypted = isinstance(connection, ssl.SSLSocket) and connection.pending() > 0
            if heard == self._heard and not is_more_decrypted:
                return
        # What TLS has decrypted already makes no socket readable.
        self._loop.call_soon(self._read)

    def _write_soon(self) -> None:
        # Not at once: paho may be in one of its callbacks, and must not write there.
        if not self._is_writing:
            self._is_writing = True
            self._loop.call_soon(self._write)

    def _write(self) -> None:
        self._is_writing = False
        if self._descriptor < 0 or not self._guarded(self._paho.loop_write) or self._descriptor < 0:
            return
        wants_more = self._paho.want_write()
        if wants_more and not self._has_writer:
            self._loop.add_writer(self._descriptor, self._write)
        elif not wants_more:
            if self._has_writer:
                self._loop.remove_writer(self._descriptor)
            was_full, self._unsent_bytes = self.is_full, 0
            if was_full:
                self._room()
        self._has_writer = wants_more

    def _look(self) -> None:
        """Have paho keep the connection alive, and find out whether it is."""
        if self._guarded(self._paho.loop_misc):
            self._looking = self._loop.call_later(_LOOK_SECONDS, self._look)

    def _guarded(self, step: Callable[[], MQTTErrorCode]) -> bool:
        """Do a step of paho's; return whether the connection goes on."""
        try:
            step()
        except Exception as error:  # noqa: BLE001 - whatever the broker sends that paho cannot read
            self._end(f"unexpected answer of the broker: {error!r}")
            self.close()
        return not self.closed.done()

    # -- what paho tells --

    def _let_in(self, session_present: bool, reason: ReasonCode, told: Properties) -> None:  # noqa: FBT001 - see `_attach`
        if not self._connected.done():
            self._connected.set_result((session_present, reason, limits_of(told)))

    def _take(self, message: paho.MQTTMessage) -> None:
        self._heard += 1
        properties = None if message.properties is None else unpack(message.properties)
        try:
            topic = message.topic
        except UnicodeDecodeError:
            logger.error("the broker sent a message whose topic is not UTF-8; it is ignored")
            self._paho.ack(message.mid, message.qos)
            return
        self._received(Incoming(topic, bytes(message.payload), message.qos, message.retain, properties, message.mid))

    def _acknowledged(self, number: int, reason: ReasonCode) -> None:
        self._heard += 1
        done = self._unacknowledged.pop(number, None)
        if done is not None:
            done(reason.value)

    def _answered(self, number: int, reasons: list[ReasonCode]) -> None:
        answer = self._answers.get(number)
        if answer is not None and not answer.done():
            answer.set_result(reasons)

    def _lost(self, flags: paho.DisconnectFlags, reason: ReasonCode) -> None:
        if flags.is_disconnect_packet_from_server:
            self._end(f"the broker says: {reason}")
        elif reason.getName() == "Keep alive timeout":
            self._end("the broker does not answer")
        else:
            self._end("the broker closed the connection")

    def _end(self, reason: str) -> None:
        if self._looking is not None:
            self._looking.cancel()
        if not self.closed.done():
            self.closed.set_result(reason)
