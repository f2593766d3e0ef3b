"""One device's TCP connection, from CONNECT to the closed socket: amqtt's protocol handler with our own reading loop.

amqtt's loop makes one task for each packet and goes on reading, so it neither keeps packets in order while a lane is
full, nor stops reading; it never enforces keep-alive, and drops DISCONNECT when it comes early. All of that is decided
where packets are read, so this is replaced; routing between amqtt's own clients stays amqtt's.
"""

import asyncio
import contextlib
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

from amqtt.adapters import ReaderAdapter, WriterAdapter
from amqtt.errors import AMQTTError, MQTTError, NoDataError
from amqtt.events import BrokerEvents, MQTTEvents
from amqtt.mqtt.disconnect import DisconnectPacket
from amqtt.mqtt.packet import (
    DISCONNECT,
    PINGREQ,
    PUBACK,
    PUBCOMP,
    PUBLISH,
    PUBREC,
    PUBREL,
    SUBSCRIBE,
    UNSUBSCRIBE,
)
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.session import ApplicationMessage, OutgoingApplicationMessage, Session
from loguru import logger

from mq2mqtt.host import Intake
from mq2mqtt.message import ClientEvent, ClientEventType
from mq2mqtt_amqtt.announce import AnnouncingWire, announce, application_message, decode, listens
from mq2mqtt_amqtt.outbox import Outbox
from mq2mqtt_amqtt.packets import PINGRESP, MalformedPacketError, Publish, packet_id, parse_publish
from mq2mqtt_amqtt.publishes import Publishes
from mq2mqtt_amqtt.roles import Host, Reason, Will
from mq2mqtt_amqtt.saving import Saving, forgotten
from mq2mqtt_amqtt.turnstile import Turnstile
from mq2mqtt_amqtt.wire import BUFFER_HIGH, ByteReader, Wire, open_reader, open_wire

if TYPE_CHECKING:
    from amqtt.plugins.manager import PluginManager

__all__ = ["Connection"]

_CONTINUE = 0x80
_MAX_LENGTH_SHIFT = 21  # section 2.2.3: at most four bytes of remaining length
# A connection that never waits for more bytes gives the loop back after so many packets.
_PACKETS_PER_TURN = 32
# Acknowledgements that a device does not read must not pile up; above what the downlink alone can make of it.
_UNREAD_LIMIT = 2 * BUFFER_HIGH
_HELD_POLL_SECONDS = 1.0
_UNRELEASED = "mq2mqtt.unreleased"


class Connection(BrokerProtocolHandler):
    """See the module docstring.

    `channel_id` names the TCP connection in events; address, `clean_session`, `keep_alive` (seconds of silence after
    which it is closed, 0 for never) and `will` are those of its own CONNECT.
    `reason` is why it ended.
    """

    host: Host
    wire: Wire
    outbox: Outbox
    publishes: Publishes

    def __init__(
        self,
        plugins_manager: "PluginManager[Any]",
        session: Session | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(plugins_manager, session, loop)
        self.channel_id = uuid.uuid4().hex
        self.client_id = ""
        self.client_ip = ""
        self.clean_session = True
        self.keep_alive = 0.0
        self.will: Will | None = None
        self.accepted = False
        self.ended = False
        self.reason = Reason.UNKNOWN
        self._bytes: ByteReader | None = None
        self._finishing: asyncio.Task[None] | None = None
        self._end: asyncio.Future[DisconnectPacket | None] = self._loop.create_future()
        self._routed = asyncio.Event()
        self._routed.set()
        self._heard_at = 0.0
        self._held = False
        self._alive_timer: asyncio.TimerHandle | None = None
        self._last_event_ms = 0

    # What amqtt calls, in this order.

    def attach(self, session: Session, reader: ReaderAdapter, writer: WriterAdapter) -> None:
        """Bind the connection to its session; nothing is read yet."""
        super().attach(session, reader, writer)
        # A queue of its own: the predecessor's loop may still wait at the session's old one.
        queue: asyncio.Queue[ApplicationMessage] = asyncio.Queue()  # bounded by `Publishes.full`
        while not session.delivered_message_queue.empty():
            queue.put_nowait(session.delivered_message_queue.get_nowait())
            self._routed.clear()
        session.delivered_message_queue = queue
        self._delivered = queue
        self._bytes = open_reader(reader)
        self.wire = open_wire(writer, self._write_lock, self.client_id)
        if listens(self.plugins_manager, MQTTEvents.PACKET_SENT):
            self.wire = AnnouncingWire(self.wire, self.plugins_manager, session)
        self._turnstile = Turnstile(self.wire, self.client_id)
        self._saving = Saving(self.client_id, self.fail)
        self.outbox = Outbox(wire=self.wire, session=session, client_id=self.client_id, fail=self.fail)
        self.publishes = Publishes(
            routing=self,
            wire=self.wire,
            client_id=self.client_id,
            clean_session=self.clean_session,
            unreleased=session.attributes.setdefault(_UNRELEASED, {}),
        )

    async def mqtt_connack_authorize(self, authorize: bool) -> None:  # noqa: FBT001 - amqtt's signature
        """Send CONNACK, for a clean session once the store has forgotten the one before it: the client is online."""
        if self.clean_session:
            await forgotten(self.host.writing(self.client_id), self._end)
        if self.ended:
            return
        await super().mqtt_connack_authorize(authorize)
        if authorize:
            self.accepted = True
            self._heard_at = self._loop.time()
            self.host.online(self)

    async def start(self) -> None:
        """Read packets from now on."""
        self._reader_task = asyncio.create_task(self._reader_loop(), name=f"mq2mqtt.read[{self.client_id}]")
        if self.keep_alive:
            self._alive_timer = self._loop.call_later(self.keep_alive, self._check_alive)
        await self._retry_deliveries()

    async def wait_disconnect(self) -> DisconnectPacket | None:
        """Return when the connection has ended and everything it published has been routed."""
        result = await asyncio.shield(self._end)
        await self._routed.wait()
        return result

    @property
    def graceful(self) -> bool:
        """Whether it ended with a DISCONNECT: then its will is not published."""
        return self.reason is Reason.DISCONNECTED

    async def stop(self, reason: Reason = Reason.UNKNOWN) -> None:
        """End the connection, and return when its socket is closed and all is told."""
        self.end(reason)
        if self._finishing is not None and self._finishing is not asyncio.current_task():
            await asyncio.shield(self._finishing)

    # The end.

    def end(self, reason: Reason, packet: DisconnectPacket | None = None) -> None:
        """Begin to end the connection, maybe for a DISCONNECT `packet`. Idempotent: the first reason stays."""
        if self.ended:
            return
        self.ended = True
        self.reason = reason
        self.host.offline(self)
        self._finishing = asyncio.create_task(self._finish(packet), name=f"mq2mqtt.finish[{self.client_id}]")

    async def _finish(self, packet: DisconnectPacket | None) -> None:
        if self._alive_timer is not None:
            self._alive_timer.cancel()
        if self._reader_task is not None and not self._reader_task.done():
            self._reader_task.cancel()
        self._saving.close()
        try:
            self.outbox.close()
            await self.publishes.close()
            self._end.set_result(packet)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._routed.wait(), 5)
        except Exception:  # noqa: BLE001 - a task's top edge: the connection must end whatever happened in it
            logger.exception("client {}: unexpected error while its connection ends", self.client_id)
        await self.host.finish(self)

    async def close_socket(self) -> None:
        """Release what amqtt has waiting on this connection and close the socket."""
        self._stop_waiters()
        await self.wire.close()

    async def handle_disconnect(self, disconnect: DisconnectPacket | None) -> None:
        """MQTT DISCONNECT came; amqtt also calls it with `None` for a lost connection."""
        self.end(Reason.UNKNOWN if disconnect is None else Reason.DISCONNECTED, disconnect)

    def fail(self, problem: str, reason: Reason = Reason.UNKNOWN) -> None:
        """Close the connection for something that the device, or a plugin, did wrong."""
        logger.info("client {} at {}: connection closed: {}", self.client_id, self.client_ip, problem)
        self.end(reason)

    def event(self, kind: ClientEventType) -> ClientEvent:
        """Return an event of this connection, never dated before its last one."""
        self._last_event_ms = max(time.time_ns() // 1_000_000, self._last_event_ms)
        return ClientEvent(
            kind,
            self.client_id,
            self.channel_id,
            self.client_ip,
            self._last_event_ms,
            self.clean_session,
            self.reason.value if kind is ClientEventType.TCPCLEAN else "",
        )

    def _check_alive(self) -> None:
        # MQTT-3.1.2-24. While we do not read, it is not the device that is silent.
        silent = 0.0 if self._held else self._loop.time() - self._heard_at
        if silent >= self.keep_alive:
            self.fail("[MQTT-3.1.2-24] nothing heard for one and a half times its keep-alive", Reason.SILENT)
        else:
            self._alive_timer = self._loop.call_later(self.keep_alive - silent, self._check_alive)

    # Reading.

    async def _reader_loop(self) -> None:
        try:
            await self._read_packets()
        except (EOFError, OSError):
            self.end(Reason.CLOSED)
        except (MalformedPacketError, MQTTError, AMQTTError, NoDataError) as error:
            self.fail(str(error) or "malformed packet", Reason.INVALID_PACKET)
        except Exception:  # noqa: BLE001 - a task's top edge: one connection must not harm the others
            logger.exception("client {}: unexpected error, closing its connection", self.client_id)
        finally:
            self.end(Reason.UNKNOWN)

    async def _read_packets(self) -> None:
        assert self._bytes is not None  # noqa: S101 - `attach` came first
        read = self._bytes.readexactly
        publishes = self.publishes
        clock = self._loop.time
        turn = 0
        while not self.ended:
            first, length = await read(2)
            if length & _CONTINUE:
                length = await self._long_length(length)
            body = await read(length) if length else b""
            self._heard_at = clock()
            await self._dispatch(first, body)
            turn += 1
            if turn >= _PACKETS_PER_TURN:
                turn = 0
                await asyncio.sleep(0)
            if publishes.full or self.wire.buffered > _UNREAD_LIMIT:
                await self._hold()

    async def _long_length(self, low: int) -> int:
        assert self._bytes is not None  # noqa: S101 - `attach` came first
        length, shift, more = low & 0x7F, 7, low
        while more & _CONTINUE:
            if shift > _MAX_LENGTH_SHIFT:
                raise MalformedPacketError("the remaining length has more than four bytes")
            more = (await self._bytes.readexactly(1))[0]
            length |= (more & 0x7F) << shift
            shift += 7
        return length

    async def _dispatch(self, first: int, body: bytes) -> None:
        kind = first >> 4
        packet = None
        if listens(self.plugins_manager, MQTTEvents.PACKET_RECEIVED):
            packet = decode(first, body)
            await self.plugins_manager.fire_event(MQTTEvents.PACKET_RECEIVED, packet=packet, session=self.session)
        if kind == PUBLISH:
            self.publishes.take(parse_publish(first & 0x0F, body))
        elif kind == PUBREL:
            self.publishes.release(packet_id(body))
        elif kind in (PUBACK, PUBREC, PUBCOMP):
            await self._dispatch_acknowledgement(kind, packet_id(body), first, body)
        elif kind == PINGREQ:
            self.wire.write(PINGRESP)
        else:
            await self._dispatch_rare(kind, packet or decode(first, body))

    async def _dispatch_acknowledgement(self, kind: int, number: int, first: int, body: bytes) -> None:
        """Take it for a message of ours, or leave it to amqtt for one of its own."""
        if kind == PUBACK:
            if not self.outbox.acknowledged(number, qos=1):
                await self.handle_puback(decode(first, body))
        elif kind == PUBREC:
            if not self.outbox.received(number):
                await self.handle_pubrec(decode(first, body))
        elif not self.outbox.acknowledged(number, qos=2):
            await self.handle_pubcomp(decode(first, body))

    async def _dispatch_rare(self, kind: int, packet: Any) -> None:  # noqa: ANN401 - any of amqtt's packets
        if kind == SUBSCRIBE:
            await self.handle_subscribe(packet)
        elif kind == UNSUBSCRIBE:
            await self.handle_unsubscribe(packet)
        elif kind == DISCONNECT:
            if self.accepted and (intake := self.intake) is not None:
                intake.on_client_event(self.event(ClientEventType.DISCONNECT))
            await self.handle_disconnect(packet)
        else:
            # MQTT-3.1.0-2 for a second CONNECT; the rest is what only a server sends.
            raise MalformedPacketError(f"a client may not send packet type {kind} here")

    async def _hold(self) -> None:
        """Stop reading until the lanes take what waits, and the device what it was sent."""
        assert self._bytes is not None  # noqa: S101 - `attach` came first
        self._held = self.publishes.full
        try:
            while self.publishes.full:
                room = self.publishes.room()
                await asyncio.wait({room}, timeout=_HELD_POLL_SECONDS)
                # The lane may stay full for hours: who has gone meanwhile is not online.
                if not room.done() and (self._bytes.gone() or self.wire.lost):
                    raise EOFError
        finally:
            self._held = False
        self._heard_at = self._loop.time()
        if self.wire.buffered > _UNREAD_LIMIT:
            await self.wire.drained()

    # Subscriptions.

    async def mqtt_acknowledge_subscription(self, packet_id: int, return_codes: list[int]) -> None:
        """Send SUBACK once the store has what a kept session subscribes to."""
        acknowledge = partial(super().mqtt_acknowledge_subscription, packet_id, return_codes)
        await self._saving.then(acknowledge, self.host.writing(self.client_id))

    async def mqtt_acknowledge_unsubscription(self, packet_id: int) -> None:
        """Send UNSUBACK once the store has forgotten it."""
        acknowledge = partial(super().mqtt_acknowledge_unsubscription, packet_id)
        await self._saving.then(acknowledge, self.host.writing(self.client_id))

    # Routing, for `Publishes`.

    @property
    def intake(self) -> Intake | None:
        """The bridge's intake; `None` while it is not running."""
        return self.host.intake

    @property
    def restricted(self) -> bool:
        """Whether any plugin filters topics."""
        return self.host.restricted

    async def may_publish(self, topic: str) -> bool:
        """Ask the plugins that filter topics."""
        assert self.session is not None  # noqa: S101 - `attach` came first
        return await self.host.may_publish(self.session, topic)

    def pass_on(self, publish: Publish) -> None:
        """Queue for amqtt's routing, where anybody wants it."""
        if self.host.wanted(publish):
            self._routed.clear()
            self._delivered.put_nowait(application_message(publish))

    def keep_private(self, publish: Publish) -> None:
        """Tell the plugins that listen for received messages: amqtt tells them of refused ones too."""
        if listens(self.plugins_manager, BrokerEvents.MESSAGE_RECEIVED):
            message = application_message(publish)
            announce(self.plugins_manager, BrokerEvents.MESSAGE_RECEIVED, client_id=self.client_id, message=message)

    async def mqtt_publish(
        self,
        topic: str,
        data: bytes | bytearray,
        qos: int | None,
        retain: bool,  # noqa: FBT001 - amqtt's signature
        ack_timeout: int | None = None,
    ) -> OutgoingApplicationMessage:
        """Send what another client published, unless this one does not read."""
        with contextlib.suppress(TimeoutError):  # no PUBACK: amqtt has said so, and would add a traceback for each
            if self._turnstile.passes() or await self._turnstile.wait(len(data)):
                await super().mqtt_publish(topic, data, qos, retain, ack_timeout)
        return OutgoingApplicationMessage(None, topic, qos, b"", retain)  # amqtt keeps it a while, and reads nothing

    async def _send_packet(self, packet: Any) -> None:  # noqa: ANN401 - any of amqtt's packets
        # amqtt would wait here until the device has read, for ever where it never does.
        self.wire.write(packet.to_bytes())

    def backlog(self) -> int:
        """How many publishes wait in amqtt's routing."""
        return self._delivered.qsize()

    async def mqtt_deliver_next_message(self) -> ApplicationMessage | None:
        """Return the next publish for amqtt's routing; amqtt asks when it is done with the one before."""
        if self._delivered.empty():
            self._routed.set()
        message = await self._delivered.get()
        self.publishes.moved_on()
        return message
