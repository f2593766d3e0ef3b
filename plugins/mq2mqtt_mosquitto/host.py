"""`MqttHost` over the hook in Mosquitto: files up, one MQTT connection down."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

from loguru import logger

from mq2mqtt.errors import LaneError
from mq2mqtt.host import CLIENT_EVENTS, Delivery, DropReason, Intake, Missed, Outcome, Settled
from mq2mqtt.message import ClientEvent, MqttMessage
from mq2mqtt.rules import RuleSet
from mq2mqtt.settings import Settings
from mq2mqtt.spool.follower import FollowedLane
from mq2mqtt.spool.properties import encode_properties
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.spool.watching import Watcher
from mq2mqtt_mosquitto.control import ConnectedClient, OperationCode, Result, Stats, encode_operation
from mq2mqtt_mosquitto.deliveries import Deliveries
from mq2mqtt_mosquitto.presence import Presence
from mq2mqtt_mosquitto.session import Session
from mq2mqtt_mosquitto.table import lane_table

if TYPE_CHECKING:
    from mq2mqtt.presence import Presence as BridgePresence
    from mq2mqtt.telemetry import Telemetry

__all__ = ["MosquittoHost"]

_EVENTS_BYTES = 16 * 1024 * 1024
# In one turn of the loop: some milliseconds.
_EVENTS_STEP = 64
_LOOK_SECONDS = 1.0
_KICK_SECONDS = 5.0

_DROPS = {
    "dropped_lane_full": DropReason.LANE_FULL,
    "dropped_too_large": DropReason.TOO_LARGE,
    "dropped_not_persistent": DropReason.NOT_PERSISTENT,
}

_DELIVERIES = {
    Result.DELIVERED: Delivery(Outcome.DELIVERED),
    Result.NO_SUBSCRIBER: Delivery(Outcome.NO_SUBSCRIBER),
    Result.OFFLINE: Delivery(Outcome.DROPPED, DropReason.NOT_PERSISTENT),
    Result.REFUSED: Delivery(Outcome.DROPPED, DropReason.HOST_REFUSED),
}


class MosquittoHost:
    """Implements `mq2mqtt.host.MqttHost` and `mq2mqtt.host.LaneWriter`. `intake` is where client events go.

    `delivered` means: handed to Mosquitto for a client that is connected, or, for a topic, whose session it keeps. The
    device's PUBACK is Mosquitto's, which nobody else sees.
    """

    shows_topics = False
    """Mosquitto hands every receiver the topic that the message is published to."""
    sees_clients = True
    sees_acknowledgements = False
    """A device's PUBACK is Mosquitto's."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.intake: Intake | None = None
        self.watcher = Watcher()
        self._table = b""
        self._deliveries = Deliveries()
        self._rules = RuleSet()
        self._presence = Presence(tell=self._told, ended=self._broker_ended, ask=self._ask_for_list)
        self._told_to: BridgePresence | None = None
        self._came_or_went = asyncio.Event()
        self._unreadable: str | None = None
        self._session = Session(settings, self._deliveries, self._presence)
        self._session.told = self._take_stats
        self.telemetry: Telemetry | None = None
        """Where what the hook drops is counted."""
        self._stats = Stats({}, {})
        self.changed: Callable[[], None] = _nobody
        """Called when the hook may have begun a lane, or says something else about one."""
        self._tasks: list[asyncio.Task[None]] = []

    # What the bridge asks.

    @property
    def connected_clients(self) -> int:
        """How many clients are connected now."""
        return len(self._presence.online)

    @property
    def problem(self) -> str | None:
        """Why the hook cannot be reached; `None` when it can."""
        return self._session.problem

    @property
    def hears_late(self) -> bool:
        """Without events the hook's lists tell, each 30 s."""
        return self.problem_of(CLIENT_EVENTS) is not None

    async def available(self) -> None:
        """See `mq2mqtt.host.MqttHost.available`."""
        await self._deliveries.room()
        # Who was connected to a broker that has just ended is not away: it comes back with its broker.
        while not (self._session.reached.is_set() and self._presence.known.is_set()):
            await self._session.reached.wait()
            await self._presence.known.wait()

    def is_online(self, client_id: str) -> bool:
        """Whether `client_id` has a live connection."""
        return client_id in self._presence.online

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
        self._hand(OperationCode.PUBLISH, "", message, settled, handed)

    def deliver(self, client_id: str, message: MqttMessage, settled: Settled, *, handed: Callable[[], None]) -> None:
        """See `mq2mqtt.host.MqttHost.deliver`."""
        self._hand(OperationCode.DELIVER, client_id, message, settled, handed)

    def _hand(
        self, code: OperationCode, client_id: str, message: MqttMessage, settled: Settled, handed: Callable[[], None]
    ) -> None:
        try:
            operation = encode_operation(
                code,
                client_id=client_id,
                topic=message.topic,
                qos=message.qos,
                properties=encode_properties(message.properties) if message.properties is not None else b"",
                payload=message.payload,
            )
        except ValueError:
            settled(Delivery(Outcome.DROPPED, DropReason.TOO_LARGE))
            return
        self._deliveries.add(operation, partial(_done, settled, handed))

    async def kick(self, client_id: str) -> None:
        """Close the client's connection, if it has one; returns when it is gone, or after `_KICK_SECONDS`."""
        client = self._presence.online.get(client_id)
        if client is None:
            return
        self._deliveries.add(encode_operation(OperationCode.KICK, client_id=client_id), _ignore)
        deadline = asyncio.get_running_loop().time() + _KICK_SECONDS
        while self._presence.online.get(client_id) == client:
            self._came_or_went.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._came_or_went.wait()
            except TimeoutError:
                return

    def go_by(self, rules: RuleSet) -> None:
        """See `mq2mqtt.host.LaneWriter.go_by`."""
        self._rules = rules
        table = lane_table(self._settings, rules)
        if table != self._table:
            self._table = table
            self._session.go_by(table, crc32(table), parents=[rule.source for rule in rules if rule.type == "outbound"])

    def problem_of(self, rule_id: str) -> str | None:
        """See `mq2mqtt.host.LaneWriter.problem_of`; while the hook is away nobody knows."""
        if rule_id == CLIENT_EVENTS and self._unreadable is not None:
            return self._unreadable
        return self._stats.problems.get(rule_id) if self.problem is None else None

    # Its life.

    def follow(self, presence: "BridgePresence") -> None:
        """Go on from what `presence` knows, and tell it when the broker ends. Call it before `start`."""
        self._told_to = presence
        known = (
            ConnectedClient(one.client_id, one.channel_id, one.client_ip, one.connected_ms, one.clean_session)
            for one in presence.connections.values()
        )
        self._presence.know(known, source=presence.source)

    def start(self) -> None:
        """Connect, and stay connected; read the hook's events."""
        self._tasks = [
            asyncio.create_task(self._session.run(), name="mq2mqtt.mosquitto.session"),
            asyncio.create_task(self._follow_events(), name="mq2mqtt.mosquitto.events"),
        ]

    async def stop(self) -> None:
        """Close the connection and stop reading. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self.watcher.close()

    def _ask_for_list(self) -> None:
        self._session.ask_for_list()

    def _told(self, event: ClientEvent) -> None:
        self._came_or_went.set()
        if self.intake is not None:
            self.intake.on_client_event(event)

    def _broker_ended(self, time_ms: int, reason: str, source: int) -> None:
        self._came_or_went.set()
        if self._told_to is not None:
            self._told_to.begin(time_ms=time_ms, reason=reason, source=source)

    def _take_stats(self, stats: Stats) -> None:
        before, self._stats = self._stats, stats
        for (of, name), value in stats.counters.items():
            # The hook counts anew with its broker.
            told = before.counters.get((of, name), 0)
            more = value - told if value >= told else value
            if more and name in _DROPS:
                self._count_drops(of, name, more)
            elif more and name == "events_lost":
                logger.warning("the hook lost {} client events: its lane was full, or could not be opened", more)
        problem = stats.problems.get(CLIENT_EVENTS)
        if problem is not None and problem != before.problems.get(CLIENT_EVENTS):
            logger.error("the hook: {}", problem)
        if stats.problems != before.problems or stats.counters.keys() != before.counters.keys():
            self.changed()

    def _count_drops(self, of: str, name: str, count: int) -> None:
        """Count what the hook dropped of a rule, or (P2P) under a parent topic; the rule may be gone by now."""
        reason = _DROPS[name]
        if reason is DropReason.NOT_PERSISTENT:
            owner = self._rules.parent_rule(of)
            of = "" if owner is None else owner.id
        rule = None if self.telemetry is None else self.telemetry.rules.get(of)
        if rule is not None:
            rule.dropped(reason, count=count)

    async def _follow_events(self) -> None:
        path = self._settings.spool.path / CLIENT_EVENTS
        while True:
            try:
                await self._read_events(path)
            except LaneError as error:
                if self._unreadable is None:
                    logger.error("client events cannot be read: {}", error)
                self._unreadable = str(error)
            except Exception:  # noqa: BLE001 - a task's top edge: presence must go on
                logger.exception("unexpected error with client events, going on")
            self._presence.reads(events=False)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _read_events(self, path: Path) -> None:
        """Read until something is wrong; return while the hook has not begun."""
        lane = FollowedLane.open(path, max_bytes=_EVENTS_BYTES, target="", watcher=self.watcher)
        if lane is None:
            return
        try:
            reader = LaneReader(lane)
            self._presence.reads(events=True)
            try:
                while True:
                    entries = reader.read(max_messages=_EVENTS_STEP)
                    self._unreadable = None
                    for entry in entries:
                        self._presence.take(entry.offset, entry.frame)
                    reader.settle([entry.offset for entry in entries])
                    if not entries:
                        self._presence.caught_up()
                    await (asyncio.sleep(0) if entries else _wait(reader))
            finally:
                reader.close()
        finally:
            lane.close()


async def _wait(reader: LaneReader) -> None:
    """Wait for news, and no longer than until it is time to look without."""
    try:
        async with asyncio.timeout(_LOOK_SECONDS):
            await reader.wait()
    except TimeoutError:
        pass


def _done(settled: Settled, handed: Callable[[], None], result: Result) -> None:
    if result is Result.DELIVERED:
        handed()
    settled(_DELIVERIES[result])


def _nobody() -> None:
    """Nobody waits for news."""


def _ignore(_result: Result) -> None:
    """Nobody waits for the outcome."""
