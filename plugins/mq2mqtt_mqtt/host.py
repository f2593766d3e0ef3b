"""`MqttHost` as a client of any MQTT 5 broker: a connection for each outbound rule, and one more to publish on."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from loguru import logger

from mq2mqtt.host import DropReason, Intake, Missed, Settled
from mq2mqtt.message import MqttMessage
from mq2mqtt.rules import InboundRule, OutboundRule, RuleSet
from mq2mqtt.settings import Settings
from mq2mqtt.topics import p2p_topic, parent_of
from mq2mqtt_mosquitto.client import SESSION_FOREVER, Incoming, Login, MqttClient, MqttError
from mq2mqtt_mqtt.connection import Connection
from mq2mqtt_mqtt.feed import UNACKNOWLEDGED, Feed
from mq2mqtt_mqtt.outbox import Job
from mq2mqtt_mqtt.sessions import Sessions

if TYPE_CHECKING:
    from mq2mqtt.telemetry import Telemetry

__all__ = ["ClientHost", "login_of"]

SESSIONS_FILE: Final = ".mqtt-sessions.json"
_RETRY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Export:
    """The parent topic of an enabled outbound rule at work; which rule may change."""

    parent: str
    connection: Connection
    feed: Feed


class ClientHost:
    """Implements `mq2mqtt.host.MqttHost` and `mq2mqtt.host.Subscriber`. `intake` is where publishes go.

    Each outbound rule has a connection of its own: a full lane leaves messages unacknowledged, and what the broker
    sends without an acknowledgement is limited for each connection. What is published under a rule's parent topic goes
    by its connection, so that `no local` keeps it from coming back.

    `delivered` means: acknowledged by the broker; with QoS 0 written to it.
    """

    shows_topics = False
    """A broker shows every receiver the topic that the message is published to."""
    sees_clients = False
    sees_acknowledgements = False
    hears_late = False
    connected_clients = 0
    """Nobody tells."""

    def __init__(self, settings: Settings) -> None:
        """Connect with `start`.

        Raises:
            ConfigError: a file of `host.tls` is no use.
        """
        self._login = login_of(settings)
        self.intake: Intake | None = None
        self.telemetry: Telemetry | None = None
        """Where what `limits` forbid is counted."""
        self._sessions = Sessions(settings.spool.path / SESSIONS_FILE)
        self._rules = RuleSet()
        self._main = Connection(self._login)
        self._exports: dict[str, _Export] = {}  # by parent topic
        self._rule_went = asyncio.Event()
        self._ending: str | None = None
        """Client id of the session that the broker is being asked to end."""
        self._tasks: set[asyncio.Task[None]] = set()

    # What the bridge asks.

    @property
    def problem(self) -> str | None:
        """Why the broker cannot be reached; `None` when it can."""
        return self._main.problem

    def problem_of(self, rule_id: str) -> str | None:
        """See `mq2mqtt.host.Subscriber.problem_of`."""
        rule = self._rules.get(rule_id)
        if isinstance(rule, InboundRule):
            return self._connection(rule.target).problem
        if not isinstance(rule, OutboundRule) or not rule.enabled:
            return None
        export = self._exports.get(rule.source)
        return "not connected yet" if export is None else export.connection.problem or export.feed.problem

    async def available(self) -> None:
        """See `mq2mqtt.host.MqttHost.available`."""
        await self._main.reached.wait()
        await self._main.outbox.room()

    def is_online(self, client_id: str) -> bool:  # noqa: ARG002 - nobody tells
        """Answer yes: whether the client is there is the broker's to find out."""
        return True

    async def kick(self, client_id: str) -> None:
        """Do nothing: a client closes no other client's connection."""

    def publish(
        self,
        message: MqttMessage,
        settled: Settled,
        *,
        shown_topic: str | None = None,  # noqa: ARG002 - see `shows_topics`
        handed: Callable[[], None],
        missed: Missed | None = None,  # noqa: ARG002 - the broker keeps what its sessions miss
    ) -> None:
        """See `mq2mqtt.host.MqttHost.publish`; `handed` is called once, however many receivers there are."""
        self._connection(parent_of(message.topic)).outbox.add(Job(message, settled, handed))

    def deliver(self, client_id: str, message: MqttMessage, settled: Settled, *, handed: Callable[[], None]) -> None:
        """Publish to `{parent}/p2p/{clientId}`, whatever topic the client is to see: it has to subscribe to that."""
        parent = parent_of(message.topic)
        message = replace(message, topic=p2p_topic(parent, client_id))
        self._connection(parent).outbox.add(Job(message, settled, handed, is_private=True))

    def _connection(self, parent: str) -> Connection:
        export = self._exports.get(parent)
        return self._main if export is None else export.connection

    # Its life.

    def start(self) -> None:
        """Connect, and stay connected. `intake` is set by now."""
        self._main.start()
        self._arrange()
        self._do(self._end_sessions(), name="mq2mqtt.mqtt.sessions")

    async def stop(self) -> None:
        """Close the connections; the broker keeps the sessions of the outbound rules. Idempotent."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        connections = [export.connection for export in self._exports.values()]
        await asyncio.gather(*(connection.stop() for connection in (self._main, *connections)))

    def _do(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def go_by(self, rules: RuleSet) -> None:
        """See `mq2mqtt.host.Subscriber.go_by`."""
        self._rules = rules
        if self._main.is_started:
            self._arrange()

    def _arrange(self) -> None:
        """Bring the connections into line with the rules."""
        wanted = {rule.source for rule in self._rules if isinstance(rule, OutboundRule) and rule.enabled}
        for parent, export in tuple(self._exports.items()):
            if parent not in wanted:
                del self._exports[parent]
                self._do(self._retire(export), name=f"mq2mqtt.mqtt.retire[{parent}]")
        for parent in sorted(wanted - self._exports.keys()):
            # Else the session that is begun would be ended.
            if self._session_id(parent) != self._ending:
                self._exports[parent] = self._begin(parent)

    def _session_id(self, parent: str) -> str:
        # Not the rule's id: where another rule has the parent topic from now on, the session loses nothing meanwhile.
        return f"{self._login.client_id}-{parent}"

    def _begin(self, parent: str) -> _Export:
        assert self.intake is not None  # noqa: S101 - see `start`
        feed = Feed(parent, intake=self.intake, dropped=self._dropped)
        client_id = self._session_id(parent)
        login = replace(
            self._login,
            client_id=client_id,
            clean_start=False,
            session_expiry=SESSION_FOREVER,
            receive_maximum=UNACKNOWLEDGED,
        )
        connection = Connection(login, feed=feed, subscribes=partial(self._sessions.keep, client_id, feed.topic_filter))
        connection.had_session = self._sessions.kept.get(client_id) == feed.topic_filter
        # Its subscription gets what other connections publish.
        connection.outbox.take_over(self._main.outbox, parent)
        connection.start()
        return _Export(parent, connection, feed)

    def _dropped(self, rule_id: str, reason: DropReason) -> None:
        rule = None if self.telemetry is None else self.telemetry.rules.get(rule_id)
        if rule is not None:
            rule.dropped(reason)

    async def _retire(self, export: _Export) -> None:
        await export.connection.stop()
        self._connection(export.parent).outbox.take_over(export.connection.outbox, export.parent)
        self._rule_went.set()

    async def _end_sessions(self) -> None:
        """Have the broker end the sessions of rules that have gone: it would queue messages for them for ever."""
        while True:
            await self._main.reached.wait()
            self._rule_went.clear()
            for client_id in self._orphans():
                # A rule may have come back while another session was ended.
                if client_id in self._orphans():
                    self._ending = client_id
                    await self._end_session(client_id)
                    self._ending = None
                    self._arrange()
            try:
                async with asyncio.timeout(_RETRY_SECONDS if self._orphans() else None):
                    await self._rule_went.wait()
            except TimeoutError:
                pass

    def _orphans(self) -> set[str]:
        """Client ids of sessions that no rule needs."""
        return set(self._sessions.kept) - {self._session_id(parent) for parent in self._exports}

    async def _end_session(self, client_id: str) -> None:
        login = replace(self._login, client_id=client_id)
        try:
            client = await MqttClient.connect(login, received=_ignore, room=_nothing)
        except (OSError, MqttError) as error:
            logger.warning("{}: the broker's session of a rule that has gone cannot be ended yet: {}", client_id, error)
        else:
            client.close()
            self._sessions.forget(client_id)


def login_of(settings: Settings) -> Login:
    """Return the login of a connection without a session of its own.

    Raises:
        ConfigError: a file of `host.tls` is no use.
    """
    host = settings.host
    return Login(
        url=host.url,
        client_id=host.client_id,
        username=host.username,
        password=host.password.get_secret_value() if host.password else None,
        tls=host.tls_context(),
        clean_start=True,
        session_expiry=0,
    )


def _ignore(_message: Incoming) -> None:
    """A session that begins anew has no messages."""


def _nothing() -> None:
    """Nothing is sent."""
