"""What the journal holds, as records that are applied one after another: at work, and again at a start. Pure.

Who is connected, and what each status rule has told: the two are kept apart, because a lane may take nothing for a
while. What differs between them is told when it takes again.
"""

from dataclasses import dataclass, field
from typing import TypeAlias

from mq2mqtt.message import ClientEventType

__all__ = [
    "Announced",
    "Begun",
    "Came",
    "Connection",
    "Followed",
    "Forgotten",
    "Record",
    "RuleState",
    "Said",
    "State",
    "Told",
    "Untold",
    "Went",
]


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection that a client has, or had. `connected_ms` is milliseconds since 1970."""

    client_id: str
    channel_id: str
    client_ip: str
    connected_ms: int
    clean_session: bool = True


@dataclass(slots=True)
class Announced:
    """A connection whose `connect` is in a rule's lane and whose `tcpclean` is not.

    `ended_ms` is when it ended, if it has. `stale`: its `connect` went to a target that the rule no longer has.
    """

    connection: Connection
    ended_ms: int | None = None
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Begun:
    """The broker began its present life: whoever was connected is gone. `seq` is the life's `epoch`."""

    seq: int
    time_ms: int
    source: int | None = None


@dataclass(frozen=True, slots=True)
class Came:
    """A client connected."""

    connection: Connection
    source: int | None = None


@dataclass(frozen=True, slots=True)
class Went:
    """A connection ended."""

    client_id: str
    time_ms: int
    source: int | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """A client said DISCONNECT; it counts as connected until the connection ends."""

    client_id: str
    source: int | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """An event is to be appended to a rule's lane, where it gets `offset`.

    Written before it is appended: of each rule's records only the last one may not have come true.
    """

    rule_id: str
    offset: int
    type: ClientEventType
    connection: Connection
    time_ms: int
    seq: int


@dataclass(frozen=True, slots=True)
class Untold:
    """The last `Told` of a rule did not come true: its lane took nothing."""

    rule_id: str


@dataclass(frozen=True, slots=True)
class Followed:
    """A rule tells of this GroupID's clients to this topic from now on."""

    rule_id: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A rule, and its lane, are gone."""

    rule_id: str


Record: TypeAlias = Begun | Came | Went | Said | Told | Untold | Followed | Forgotten


@dataclass(slots=True)
class RuleState:
    """What one status rule has told; `announced` by client id.

    A client has one entry at most: its next `connect` is told after the `tcpclean` of the one before. `last` is the
    last `Told`, and `before` the client's entry before that.
    """

    source: str
    target: str
    announced: dict[str, Announced] = field(default_factory=dict)
    last: Told | None = None
    before: Announced | None = None


class State:
    """Who is connected (`connections`, by client id), what was told (`rules`, by id), and the numbers given out.

    `seq` is the last number given out, `epoch` the one at which the broker's present life began; `source` is up to
    where the host's events are in here.
    """

    def __init__(self, *, seq: int) -> None:
        self.seq = seq
        self.epoch = seq
        self.source = -1
        self.connections: dict[str, Connection] = {}
        self.said: set[str] = set()
        """Clients that are connected and have said DISCONNECT."""
        self.rules: dict[str, RuleState] = {}

    def apply(self, record: Record) -> None:
        """Take one record in. What it names was there when it was made, so a record that fits nothing is a bug."""
        match record:
            case Told():
                self._told(record)
            case Came(connection, source):
                self.connections[connection.client_id] = connection
                self.said.discard(connection.client_id)
                self._read(source)
            case Went(client_id, time_ms, source):
                self._end(self.connections.pop(client_id), time_ms)
                self.said.discard(client_id)
                self._read(source)
            case Said(client_id, source):
                self.said.add(client_id)
                self._read(source)
            case Untold(rule_id):
                self._untold(self.rules[rule_id])
            case Begun(seq, time_ms, source):
                for connection in self.connections.values():
                    self._end(connection, time_ms)
                self.connections.clear()
                self.said.clear()
                self.seq = self.epoch = seq
                self._read(source)
            case Followed(rule_id, source_group, target):
                self._follow(rule_id, source_group, target)
            case Forgotten(rule_id):
                self.rules.pop(rule_id, None)

    def _read(self, source: int | None) -> None:
        if source is not None:
            self.source = max(self.source, source)

    def _end(self, connection: Connection, time_ms: int) -> None:
        for rule in self.rules.values():
            entry = rule.announced.get(connection.client_id)
            if entry is not None and entry.connection.channel_id == connection.channel_id:
                entry.ended_ms = time_ms

    def _told(self, told: Told) -> None:
        rule, client_id = self.rules[told.rule_id], told.connection.client_id
        rule.last, rule.before = told, rule.announced.get(client_id)
        if told.type is ClientEventType.CONNECT:
            rule.announced[client_id] = Announced(told.connection)
        elif told.type is ClientEventType.TCPCLEAN:
            rule.announced.pop(client_id, None)
        self.seq = max(self.seq, told.seq)

    def _untold(self, rule: RuleState) -> None:
        told = rule.last
        if told is None:
            return
        client_id = told.connection.client_id
        if rule.before is None:
            rule.announced.pop(client_id, None)
        else:
            rule.announced[client_id] = rule.before
        rule.last = rule.before = None

    def _follow(self, rule_id: str, source: str, target: str) -> None:
        rule = self.rules.get(rule_id)
        if rule is None:
            self.rules[rule_id] = RuleState(source, target)
            return
        if source != rule.source:
            rule.announced.clear()
            rule.before = None
        if target != rule.target:
            for entry in rule.announced.values():
                entry.stale = True
        rule.source, rule.target = source, target
