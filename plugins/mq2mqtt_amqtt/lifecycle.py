"""Connections come and go: authentication first, one connection for a client id, its session, its will, its events.

amqtt 0.12.1 registers a session, and deletes a clean one's predecessor, before it authenticates; leaves the sockets of
clean predecessors open; marks a persistent session disconnected when the predecessor's loop ends; and goes through the
filters of all clients for each that connects, 45 ms with 100 000 of them. So the methods of its `Broker` that set up
and end a connection are written anew here.
"""

import asyncio
from typing import Any, Final

from amqtt.adapters import ReaderAdapter, WriterAdapter
from amqtt.broker import Broker
from amqtt.errors import AMQTTError, MQTTError, NoDataError
from amqtt.events import BrokerEvents, MQTTEvents
from amqtt.mqtt.connack import NOT_AUTHORIZED, ConnackPacket
from amqtt.session import Session
from loguru import logger

from mq2mqtt.host import Intake
from mq2mqtt.message import ClientEventType
from mq2mqtt_amqtt.connection import Connection
from mq2mqtt_amqtt.patch import replace
from mq2mqtt_amqtt.roles import Host, Reason, Will
from mq2mqtt_amqtt.wills import Wills
from mq2mqtt_amqtt.wire import open_wire

__all__ = ["CONNECT_SECONDS", "Lifecycle"]

CONNECT_SECONDS: Final = 10.0
"""How long a new connection may take to send its CONNECT."""

_GRACE: Final = 1.5  # MQTT-3.1.2-24
_WILL_SECONDS = 5.0


class Lifecycle:
    """Owns the connections of one broker. `intake` gets their events."""

    def __init__(self, broker: Broker, host: Host, wills: Wills) -> None:
        self._broker = broker
        self._host = host
        self._wills = wills
        self._connections: dict[str, Connection] = {}
        self._opening: set[WriterAdapter] = set()
        self._closing = False
        self.online: dict[str, Connection] = {}
        self._authenticate = broker._authenticate  # noqa: SLF001 - see the module docstring
        replace(broker, "_initialize_client_session", self._initialize)
        replace(broker, "_handle_client_session", self._run)
        replace(broker, "_handle_disconnect", self._ended)

    @property
    def intake(self) -> Intake | None:
        """Where events go."""
        return self._host.intake

    async def close(self) -> None:
        """Refuse new connections and end all there are; returns when everything is told."""
        self._closing = True
        await asyncio.gather(*(_close(writer) for writer in tuple(self._opening)))
        for connection in list(self._connections.values()):
            connection.end(Reason.BROKER_STOPPED)
        # Shielded tasks within: one that hangs is bounded by its own timeouts.
        await asyncio.gather(*(connection.stop() for connection in list(self._connections.values())))
        self._wills.close()

    async def kick(self, client_id: str) -> None:
        """Close the client's connection, if it has one; its will is published."""
        if (connection := self._connections.get(client_id)) is not None:
            await connection.stop(Reason.KICKED)

    # In place of the broker's methods.

    async def _initialize(
        self, reader: ReaderAdapter, writer: WriterAdapter, remote_address: str, remote_port: int
    ) -> tuple[Connection, Session]:
        """Read CONNECT, authenticate, end the predecessor, find the session.

        From the last look at the predecessors to `Connection.attach` nothing waits, so two connections with one
        client id cannot both get through.
        """
        self._opening.add(writer)
        try:
            connection, session = await self._read_connect(reader, writer)
            host = f"[{remote_address}]" if ":" in remote_address else remote_address
            connection.client_ip = f"{host}:{remote_port}"
            if not await self._authenticate(session, None):  # type: ignore[arg-type]  # amqtt ignores it too
                await self._refuse(connection, writer)
            while (predecessor := self._connections.get(connection.client_id)) is not None:
                logger.info("client {} connects again: closing {}", connection.client_id, predecessor.client_ip)
                await predecessor.stop(Reason.TAKEN_OVER)
            self._check_open()
            session = await self._adopt(session)
        except (AMQTTError, MQTTError):
            await _close(writer)
            raise
        except Exception as error:
            # amqtt counts a connection as closed only after errors of its own.
            await _close(writer)
            raise AMQTTError(f"{type(error).__name__}: {error}") from error
        finally:
            self._opening.discard(writer)
        self._connections[connection.client_id] = connection
        return connection, session

    def _check_open(self) -> None:
        if self._closing:
            raise AMQTTError("the broker is shutting down")

    async def _read_connect(self, reader: ReaderAdapter, writer: WriterAdapter) -> tuple[Connection, Session]:
        try:
            # Section 3.1.4 of MQTT 3.1.1; amqtt waits for ever, with a socket for each who never says a word.
            async with asyncio.timeout(CONNECT_SECONDS):
                handler, session = await Connection.init_from_connect(reader, writer, self._broker.plugins_manager)
        except TimeoutError:
            raise AMQTTError(f"no CONNECT within {CONNECT_SECONDS:g} s") from None
        except NoDataError as error:
            raise AMQTTError(f"no CONNECT: {error}") from error
        assert isinstance(handler, Connection)  # noqa: S101 - for the type checker: amqtt's signature names the base
        connection = handler
        connection.host = self._host
        connection.client_id = session.client_id or ""
        connection.clean_session = bool(session.clean_session)
        delay = self._broker.config.get("timeout-disconnect-delay", 0) or 0
        if session.keep_alive:
            connection.keep_alive = session.keep_alive * _GRACE + delay
            session.keep_alive += delay
        if session.will_flag:
            connection.will = Will(
                session.will_topic or "",
                bytes(session.will_message or b""),
                session.will_qos or 0,
                bool(session.will_retain),
            )
        return connection, session

    async def _refuse(self, connection: Connection, writer: WriterAdapter) -> None:
        packet = ConnackPacket.build(0, NOT_AUTHORIZED)
        await packet.to_stream(writer)
        await self._broker.plugins_manager.fire_event(MQTTEvents.PACKET_SENT, packet=packet)
        raise AMQTTError(f"client {connection.client_id} at {connection.client_ip} is not authorized")

    async def _adopt(self, fresh: Session) -> Session:
        """Return the session that the connection continues: the stored one, brought up to date, or `fresh`."""
        client_id = fresh.client_id or ""
        stored, _ = self._broker.sessions.get(client_id, (None, None))
        # MQTT-3.1.2-6: a clean session's state must not be reused, even where it has not been removed yet.
        if stored is None or fresh.clean_session or stored.clean_session:
            await self._broker._delete_session(client_id)  # noqa: SLF001 - see the module docstring
            fresh.parent = 0
            return fresh
        for name in (
            *("clean_session", "will_flag", "will_message", "will_topic", "will_qos", "will_retain", "keep_alive"),
            *("username", "password", "remote_address", "remote_port", "ssl_object", "is_anonymous"),
        ):
            setattr(stored, name, getattr(fresh, name))
        stored.attributes.update(fresh.attributes)
        stored.parent = 1
        return stored

    async def _run(
        self,
        reader: ReaderAdapter,
        writer: WriterAdapter,
        session: Session,
        handler: Connection,
        *_: Any,  # noqa: ANN401 - unused
    ) -> None:
        """Serve a client that was let in, until it goes. Its predecessor has ended: see `_initialize`."""
        broker = self._broker
        try:
            session.transitions.connect()
            handler.attach(session, reader, writer)
            broker.sessions[handler.client_id] = (session, handler)
            await handler.mqtt_connack_authorize(authorize=True)
            if not handler.accepted:
                return
            await broker.plugins_manager.fire_event(
                BrokerEvents.CLIENT_CONNECTED, client_id=handler.client_id, client_session=session
            )
            await handler.start()
            await broker._publish_session_retained_messages(session)  # noqa: SLF001 - see the module docstring
            await broker._client_message_loop(session, handler)  # noqa: SLF001
        finally:
            await handler.stop()

    async def _ended(self, _session: Session, handler: Connection, _waiter: Any) -> None:  # noqa: ANN401 - unused
        await handler.stop()

    # The end of a connection.

    async def finish(self, connection: Connection) -> None:
        """Publish the will, close the socket, update the session and tell of it. Called once for each connection."""
        session = connection.session
        try:
            if connection.will is not None and connection.accepted and not connection.graceful and session is not None:
                await asyncio.wait_for(self._wills.publish(connection, connection.will, session), _WILL_SECONDS)
        except Exception:  # noqa: BLE001 - plugins of others are asked; the connection must end all the same
            logger.exception("client {}: its will could not be published", connection.client_id)
        try:
            await connection.close_socket()
        finally:
            del self._connections[connection.client_id]
            if session is not None:
                session.transitions.disconnect()
            if connection.accepted:
                await self._tell(connection, session)

    async def _tell(self, connection: Connection, session: Session | None) -> None:
        await self._broker.plugins_manager.fire_event(
            BrokerEvents.CLIENT_DISCONNECTED, client_id=connection.client_id, client_session=session
        )
        if (intake := self.intake) is not None:
            intake.on_client_event(connection.event(ClientEventType.TCPCLEAN))


async def _close(writer: WriterAdapter) -> None:
    # amqtt's own way waits for the peer: half a minute for one that has TLS and does not answer.
    await open_wire(writer, asyncio.Lock(), "no client yet").close()
