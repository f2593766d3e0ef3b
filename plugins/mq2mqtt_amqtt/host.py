"""`MqttHost` over an amqtt broker in this process.

The private side of amqtt is used here and in the modules that this one puts together: `subscriptions` (its table),
`sessions`, `asking` (its plugins), `routing`, `lifecycle` (connecting and ending), `connection` (its protocol handler),
`wills`, `wire` (its adapters) and `announce`.
"""

import asyncio
from collections.abc import Callable, Collection

from amqtt.broker import Broker
from amqtt.contexts import Action
from amqtt.events import BrokerEvents
from amqtt.session import Session
from loguru import logger

from mq2mqtt.host import Delivery, DropReason, Intake, Missed, Outcome, Settled
from mq2mqtt.message import ClientEventType, MqttMessage
from mq2mqtt.store import SubscriptionStore
from mq2mqtt_amqtt.absent import Absent
from mq2mqtt_amqtt.announce import listens
from mq2mqtt_amqtt.asking import Asking
from mq2mqtt_amqtt.connection import Connection
from mq2mqtt_amqtt.fanout import Fanout, Parcel
from mq2mqtt_amqtt.lifecycle import Lifecycle
from mq2mqtt_amqtt.packets import Frame, Publish
from mq2mqtt_amqtt.patch import check_version, replace
from mq2mqtt_amqtt.retained import Retained
from mq2mqtt_amqtt.roles import is_kept
from mq2mqtt_amqtt.routing import Routing
from mq2mqtt_amqtt.sessions import KeptSessions
from mq2mqtt_amqtt.subscriptions import Subscriptions
from mq2mqtt_amqtt.wills import Wills

__all__ = ["AmqttHost"]

_ROUTING_QUEUE = 1000


class AmqttHost:
    """Implements `mq2mqtt.host.MqttHost`. Make it before the broker starts.

    `intake` is where publishes and events go; set it before the first client connects.

    Raises:
        ConfigError: this version of amqtt is not supported.
    """

    def __init__(self, broker: Broker) -> None:
        check_version()
        self._broker = broker
        self.intake: Intake | None = None
        self._topic_filtering = broker._topic_filtering  # noqa: SLF001 - see the module docstring
        replace(broker, "_topic_filtering", self._permitted)
        # amqtt's is unbounded. Full, it holds up the connections' loops, and `Publishes.full` then stops reading.
        replace(broker, "_broadcast_queue", asyncio.Queue(_ROUTING_QUEUE))
        self._subscriptions = Subscriptions(broker)
        self._sessions = KeptSessions(broker, self._subscriptions)
        self._absent = Absent(broker)
        self._asking = Asking(self, self._absent)
        self._restored = asyncio.Event()
        self._retained = Retained(broker, self._subscriptions)
        self._routing = Routing(broker, self, self._subscriptions)
        self._lifecycle = Lifecycle(broker, self, Wills(broker, self))
        self._warned = False

    # What the bridge asks.

    @property
    def connected_clients(self) -> int:
        """How many clients are connected now."""
        return len(self._lifecycle.online)

    @property
    def problem(self) -> None:
        """It is in this process."""

    @property
    def shows_topics(self) -> bool:
        """Each receiver is addressed on its own."""
        return True

    @property
    def sees_clients(self) -> bool:
        """Every connection is its own."""
        return True

    @property
    def sees_acknowledgements(self) -> bool:
        """Every PUBACK and PUBCOMP comes by."""
        return True

    @property
    def hears_late(self) -> bool:
        """It is in this process."""
        return False

    async def available(self) -> None:
        """See `mq2mqtt.host.MqttHost.available`: it takes messages once it knows who subscribes to them.

        There is no limit for all devices: each connection has a bound of its own. But what those miss who are away has
        to be kept first.
        """
        await self._restored.wait()
        await self._absent.done()

    def is_online(self, client_id: str) -> bool:
        """Whether `client_id` has a live connection."""
        return client_id in self._lifecycle.online

    async def kick(self, client_id: str) -> None:
        """Close the client's connection, if it has one; its will is published."""
        await self._lifecycle.kick(client_id)

    async def close(self) -> None:
        """Refuse new connections and end all there are."""
        await self._lifecycle.close()
        self._absent.close()
        # Not before: until a connection has ended, its SUBACK says that the store has what it subscribes to.
        self._sessions.close()
        self._subscriptions.clear()

    def publish(
        self,
        message: MqttMessage,
        settled: Settled,
        *,
        shown_topic: str | None = None,
        handed: Callable[[], None],
        missed: Missed | None = None,
    ) -> None:
        """See `mq2mqtt.host.MqttHost.publish`."""
        receivers, away = self._receivers(message)
        if not receivers and not away:
            settled(Delivery(Outcome.NO_SUBSCRIBER))
            return
        fanout = Fanout(settled, handed, receivers=len(receivers) + len(away), missed=missed)
        restricted = self.restricted
        frames: dict[int, Frame] = {}
        unasked: list[tuple[Connection, Parcel]] = []
        for connection, qos, kept_for in receivers:
            frame = frames.get(qos)
            if frame is None:
                frame = frames[qos] = Frame(shown_topic or message.topic, message.payload, qos)
            parcel = Parcel(fanout, frame, ready=not restricted, session=kept_for)
            connection.outbox.send(parcel)
            if not parcel.ready and (not parcel.settled or parcel.missed_qos):
                unasked.append((connection, parcel))
        if unasked or (away and restricted):
            self._asking.ask(message.topic, fanout, receivers=unasked, away=away)
        elif away:
            self._absent.miss(fanout, away)

    def _receivers(
        self, message: MqttMessage
    ) -> tuple[list[tuple[Connection, int, str | None]], list[tuple[Session, int]]]:
        """Return who is connected, and of the sessions that get it later those that are away, with their QoS.

        Beside each connection is the client id where its session gets later what the connection misses.
        """
        online = self._lifecycle.online
        here: list[tuple[Connection, int, str | None]] = []
        away: list[tuple[Session, int]] = []
        for session, granted in self._subscriptions.of(message.topic):
            client_id = session.client_id or ""
            qos = min(message.qos, granted)
            kept = qos > 0 and is_kept(session)
            connection = online.get(client_id)
            if connection is not None:
                here.append((connection, qos, client_id if kept else None))
            elif kept:
                away.append((session, qos))
        return here, away

    def deliver(self, client_id: str, message: MqttMessage, settled: Settled, *, handed: Callable[[], None]) -> None:
        """See `mq2mqtt.host.MqttHost.deliver`. The receiver needs no permission: its client id was named (spec 6)."""
        connection = self._lifecycle.online.get(client_id)
        if connection is None:
            settled(Delivery(Outcome.DROPPED, DropReason.NOT_PERSISTENT))
            return
        fanout = Fanout(settled, handed, receivers=1)
        kept = message.qos > 0 and not message.clean_session
        connection.outbox.send(Parcel(fanout, Frame(message.topic, message.payload, message.qos), kept=kept))

    async def restore(self, subscriptions: SubscriptionStore) -> None:
        """Have the persistent sessions that the store knows, and save them there from now on.

        To be called when the broker begins, before it listens.

        Raises:
            StoreError: it cannot be read.
        """
        await self._sessions.restore(subscriptions)
        self._restored.set()

    # What connections ask.

    @property
    def restricted(self) -> bool:
        """Whether any plugin filters topics."""
        manager = self._broker.plugins_manager
        return bool(manager._topic_plugins) and manager.is_topic_filtering_enabled()  # noqa: SLF001 - no public way

    async def may_publish(self, session: Session, topic: str) -> bool:
        """Ask the plugins that filter topics."""
        return await self._topic_filtering(session, topic, Action.PUBLISH)

    async def may_receive(self, session: Session, topic: str) -> bool:
        """Ask the plugins that filter topics."""
        try:
            return await self._topic_filtering(session, topic, Action.RECEIVE)
        except Exception:  # noqa: BLE001 - a task's top edge: the plugins are somebody else's
            logger.exception("a plugin failed to say whether client {} may receive", session.client_id)
            return False

    async def _permitted(self, session: Session, topic: str, action: Action) -> bool:
        """Answer amqtt's routing: what a client published has passed `may_publish` before it got there."""
        return action is Action.PUBLISH or await self._topic_filtering(session, topic, action)

    def wanted(self, publish: Publish) -> bool:
        """Whether anything in the broker wants to see `publish`: most telemetry has no reader but RocketMQ."""
        manager = self._broker.plugins_manager
        return (
            publish.retain
            or bool(self._subscriptions.of(publish.topic))
            or listens(manager, BrokerEvents.MESSAGE_RECEIVED)
            or listens(manager, BrokerEvents.MESSAGE_BROADCAST)
        )

    def online(self, connection: Connection) -> None:
        """CONNACK has been sent."""
        self._lifecycle.online[connection.client_id] = connection
        session = connection.session
        if not connection.clean_session and session is not None and session.is_anonymous:
            self._warn_of_anonymous(connection.client_id)
        if self.intake is not None:
            self.intake.on_client_event(connection.event(ClientEventType.CONNECT))

    def _warn_of_anonymous(self, client_id: str) -> None:
        if self._warned:
            return
        self._warned = True
        logger.warning(
            "client {} connects with cleanSession=false, but an authentication plugin of the broker (amqtt's "
            "AnonymousAuthPlugin does) marks its session as anonymous: amqtt forgets such a session, and nothing that "
            "its subscriptions miss is kept; use mq2mqtt_amqtt.AuthPlugin with allow_anonymous instead",
            client_id,
        )

    def offline(self, connection: Connection) -> None:
        """The connection is ending."""
        if self._lifecycle.online.get(connection.client_id) is connection:
            del self._lifecycle.online[connection.client_id]

    async def finish(self, connection: Connection) -> None:
        """The connection is at its end."""
        await self._lifecycle.finish(connection)

    def writing(self, client_id: str) -> Collection["asyncio.Future[None]"]:
        """See `KeptSessions.writing`."""
        return self._sessions.writing(client_id)
