"""Presence at work: takes the host's events, keeps the table of connected clients, has the status rules tell."""

import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from loguru import logger

from mq2mqtt.errors import LaneError
from mq2mqtt.message import ClientEvent, ClientEventType
from mq2mqtt.presence.journal import Journal
from mq2mqtt.presence.state import Begun, Came, Connection, Followed, Forgotten, Record, Said, State, Told, Went
from mq2mqtt.presence.teller import Teller
from mq2mqtt.rules import RuleSet, StatusRule, group_of
from mq2mqtt.spool.lane import Lane
from mq2mqtt.telemetry import RuleTelemetry

__all__ = ["CameListener", "GoneListener", "Presence"]

CameListener = Callable[[Connection], None]
GoneListener = Callable[[Connection, int, str], None]
"""Gets the connection, when it ended (milliseconds since 1970), and the reason (`ClientEvent.reason`)."""

CONFLICT = "clientId conflict"
RESTARTED = "broker restarted"
_UNKNOWN = "unknown"
_MAX_WAIT = 30
"""Calls of `watch`, so seconds, between two tries to write a journal again."""
_FAILED = "unexpected error while telling of a client, going on"


class Presence:
    """Who is connected to the broker now, and what the status rules tell of it.

    Without a `journal` it forgets everything with its process. `node` is the bridge's name in what is told.
    """

    def __init__(self, journal: Journal | None = None, *, node: str = "") -> None:
        self._journal = journal
        self._node = node
        self._state = journal.state if journal is not None else State(seq=time.time_ns() // 1000)
        self._is_written = True
        self._wait = self._waited = 1
        if journal is not None and journal.problem is not None:
            self._has(journal.problem)
        self._started = False
        self._rules = RuleSet()
        self._tellers: dict[str, Teller] = {}
        self._came: list[CameListener] = []
        self._gone: list[GoneListener] = []
        self.connections: Mapping[str, Connection] = MappingProxyType(self._state.connections)
        """By client id. A live view."""

    @property
    def source(self) -> int:
        """The highest `ClientEvent.source` that was taken; -1 before any."""
        return self._state.source

    def listen(self, *, came: CameListener, gone: GoneListener) -> None:
        """Have each coming and going told from now on, after it was written down. A call must not wait for anything.

        Who is connected already is in `connections`.
        """
        self._came.append(came)
        self._gone.append(gone)

    # -- what the host says --

    def start(self, *, lives_on: bool) -> None:
        """Begin, with who was connected when the last process ended: gone, unless the broker `lives_on` without us."""
        if not lives_on:
            self.begin(time_ms=time.time_ns() // 1_000_000)
        self._started = True
        self._compare_all(self._tellers)

    def take(self, event: ClientEvent) -> None:
        """Take one event of the host. What is known already, because the host tells it again, changes nothing."""
        known = self.connections.get(event.client_id)
        is_known = known is not None and known.channel_id == event.channel_id
        if event.type is ClientEventType.CONNECT and not is_known:
            if known is not None:
                self._end(known, event, CONFLICT)
            self._begin(event)
        elif known is None or not is_known:
            return
        elif event.type is ClientEventType.TCPCLEAN:
            self._end(known, event, event.reason or _UNKNOWN)
        elif event.type is ClientEventType.DISCONNECT and event.client_id not in self._state.said:
            self._write(Said(event.client_id, event.source))
            if (teller := self._teller_of(event.client_id)) is not None:
                teller.said_goodbye(known, event.time_ms)

    def begin(self, *, time_ms: int, reason: str = RESTARTED, source: int | None = None) -> None:
        """Take it that the broker begins a new life: every connection that is still known ended, for this reason."""
        ended = list(self.connections.values())
        self._write(Begun(self._state.seq + 1, time_ms, source))
        for connection in ended:
            self._tell_gone(connection, time_ms, reason)
        if self._started:
            self._compare_all(self._tellers)

    def _begin(self, event: ClientEvent) -> None:
        connection = Connection(event.client_id, event.channel_id, event.client_ip, event.time_ms, event.clean_session)
        self._write(Came(connection, event.source))
        self._tell_rule(event.client_id)
        for came in self._came:
            try:
                came(connection)
            except Exception:  # noqa: BLE001 - see `_tell_gone`
                logger.exception(_FAILED)

    def _end(self, connection: Connection, event: ClientEvent, reason: str) -> None:
        self._write(Went(connection.client_id, event.time_ms, event.source))
        self._tell_rule(connection.client_id)
        self._tell_gone(connection, event.time_ms, reason)

    def _tell_gone(self, connection: Connection, time_ms: int, reason: str) -> None:
        for gone in self._gone:
            try:
                gone(connection, time_ms, reason)
            except Exception:  # noqa: BLE001 - one listener's bug stops neither the others nor the host
                logger.exception(_FAILED)

    def _write(self, record: Record) -> bool:
        """Write a record and take it in; return whether it is written. The table is right in any case."""
        if self._is_written and self._journal is not None:
            try:
                self._journal.append(record)
            except LaneError as error:
                self._has(str(error))
        if self._is_written or not isinstance(record, Told):
            self._state.apply(record)
        return self._is_written

    def _has(self, problem: str) -> None:
        logger.error("client status is not told until the journal can be written again: {}", problem)
        self._is_written = False

    # -- what the rules tell --

    def apply(self, rules: RuleSet) -> None:
        """Go by these rules from now on. A rule that comes, or changes, tells of the clients that are there."""
        before, self._rules = self._rules, rules
        for rule in rules:
            if isinstance(rule, StatusRule):
                known = self._state.rules.get(rule.id)
                if known is None or (known.group, known.target) != (rule.source, rule.target):
                    self._write(Followed(rule.id, rule.source, rule.target))
        for rule_id, teller in self._tellers.items():
            now = rules.get(rule_id)
            if now is None or not now.enabled:
                teller.pause()
        if self._started:
            self._compare_all([rule_id for rule_id in self._tellers if before.get(rule_id) != rules.get(rule_id)])

    def attach(self, lane: Lane, telemetry: RuleTelemetry) -> None:
        """Tell a rule's events to this lane from now on; `apply` has named the rule once."""
        teller = Teller(lane, node=self._node, state=self._state, write=self._write, telemetry=telemetry)
        self._tellers[telemetry.rule_id] = teller
        teller.take_up()
        if self._started:
            self._compare_all([telemetry.rule_id])

    def detach(self, rule_id: str) -> None:
        """The lane is closed."""
        if (teller := self._tellers.pop(rule_id, None)) is not None:
            teller.close()

    def has_told(self, rule_id: str) -> bool:
        """Whether a status rule with this id has, or had, a lane of client events that is not removed yet."""
        return rule_id in self._state.rules

    def forget(self, rule_id: str) -> None:
        """The rule is gone, and its lane is removed."""
        if self.has_told(rule_id):
            self._write(Forgotten(rule_id))

    def watch(self) -> None:
        """Try again what the disk refused; call it about once a second."""
        if not self._is_written and self._journal is not None:
            self._write_again(self._journal)
        if not self._is_written:
            return
        for teller in self._tellers.values():
            teller.watch()

    def _write_again(self, journal: Journal) -> None:
        """Try to, ever more rarely: it takes the loop for as long as it takes to encode everybody who is connected."""
        self._waited += 1
        if self._waited < self._wait:
            return
        self._waited = 0
        try:
            journal.rewrite()
        except LaneError:
            self._wait = min(2 * self._wait, _MAX_WAIT)
            return
        self._is_written = True
        self._wait = self._waited = 1
        logger.info("the journal of who is connected is written again")

    def _teller_of(self, client_id: str) -> Teller | None:
        rule = self._rules.status(group_of(client_id))
        return None if rule is None else self._tellers.get(rule.id)

    def _tell_rule(self, client_id: str) -> None:
        if (teller := self._teller_of(client_id)) is not None:
            teller.changed(client_id)

    def _compare_all(self, rule_ids: Iterable[str]) -> None:
        """Have rules tell what they have not told of who is there now."""
        concerned = {
            rule.source: self._tellers[rule_id]
            for rule_id in rule_ids
            if isinstance(rule := self._rules.get(rule_id), StatusRule) and rule.enabled
        }
        clients: dict[str, list[str]] = {group: [] for group in concerned}
        if not concerned:
            return
        for client_id in self.connections:
            if (found := clients.get(group_of(client_id))) is not None:
                found.append(client_id)
        for group, teller in concerned.items():
            teller.compare(clients[group])
            teller.try_again()

    def close(self) -> None:
        """Take nothing more down. Idempotent."""
        for rule_id in tuple(self._tellers):
            self.detach(rule_id)
        if self._journal is not None:
            self._journal.close()
