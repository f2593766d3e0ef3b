"""What the journal holds, as records that are applied one after another: at work, and again at a start. Pure.

Who is connected, and what each status rule has told: the two are kept apart, because a lane may take nothing for a
while. What differs between them is told when it takes again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from mq2mqtt.message import ClientEventType

__all__ = [
    "Announced",
    "Begun",
    "Came",
    "Connection",
    "Followed",
    "Forgotten",
    "Head",
    "Kept",
    "Noted",
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


@dataclass(frozen=True, slots=True)
class Announced:
    """A connection whose `connect` is in a rule's lane and whose `tcpclean` is not.

    `ended_ms` is when it ended, if the broker told of that; what ended with the broker has none. `stale`: its
    `connect` went to a target that the rule no longer has.
    """

    connection: Connection
    ended_ms: int | None = None
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Head:
    """The numbers of a state; see `State`."""

    seq: int
    epoch: int
    source: int
    began_ms: int


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
class Said:
    """A client said DISCONNECT; it counts as connected until the connection ends."""

    client_id: str
    source: int | None = None


@dataclass(frozen=True, slots=True)
class Went:
    """A client's connection ended."""

    client_id: str
    time_ms: int
    source: int | None = None


@dataclass(frozen=True, slots=True)
class Followed:
    """A rule tells of this GroupID's clients to this topic from now on."""

    rule_id: str
    group: str
    target: str


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A rule, and its lane, are gone."""

    rule_id: str


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
    epoch: int


@dataclass(frozen=True, slots=True)
class Untold:
    """The last `Told` of a rule did not come true: its lane took nothing."""

    rule_id: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A rule has announced this: a `Told` of before the journal was written anew."""

    rule_id: str
    announced: Announced


@dataclass(frozen=True, slots=True)
class Noted:
    """A rule's last `Told`, whose effect `Kept` has, and what was announced of its client before."""

    told: Told
    before: Announced | None


Record: TypeAlias = Head | Begun | Came | Said | Went | Followed | Forgotten | Told | Untold | Kept | Noted


@dataclass(slots=True)
class RuleState:
    """What one status rule has told; `announced` by client id.

    A client has one entry at most: its next `connect` is told after the `tcpclean` of the one before. `last` is the
    last `Told`, and `before` the client's entry before that.
    """

    group: str
    target: str
    announced: dict[str, Announced] = field(default_factory=dict)
    last: Told | None = None
    before: Announced | None = None


class State:
    """Who is connected (`connections`, by client id), what was told (`rules`, by id), and the numbers given out.

    `seq` is the last number given out, `epoch` the one at which the broker's present life began, and `began_ms` the
    time; `source` is up to where the host's events are in here. `said` are the clients that are connected and have
    said DISCONNECT.
    """

    def __init__(self, *, seq: int) -> None:
        self.seq = self.epoch = seq
        self.source = -1
        self.began_ms = seq // 1000
        self.connections: dict[str, Connection] = {}
        self.said: set[str] = set()
        self.rules: dict[str, RuleState] = {}

    def apply(self, record: Record) -> None:  # noqa: C901 - one line for each kind of record
        """Take one record in.

        Raises:
            KeyError: it speaks of a client or rule that is not there: something is missing before it.
        """
        match record:
            case Told():
                self._tell(record)
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
                self._take_back(self.rules[rule_id])
            case Begun(seq, time_ms, source):
                self._begin(seq, time_ms)
                self._read(source)
            case Followed(rule_id, group, target):
                self._follow(rule_id, group, target)
            case Forgotten(rule_id):
                self.rules.pop(rule_id, None)
            case Head():
                self.seq, self.epoch = record.seq, record.epoch
                self.source, self.began_ms = record.source, record.began_ms
            case Kept(rule_id, announced):
                self.rules[rule_id].announced[announced.connection.client_id] = announced
            case Noted(told, before):
                rule = self.rules[told.rule_id]
                rule.last, rule.before = told, before

    def _read(self, source: int | None) -> None:
        if source is not None:
            self.source = max(self.source, source)

    def _begin(self, seq: int, time_ms: int) -> None:
        # What was announced is not gone through here: there may be 100 000 of it, and `began_ms` says when it ended.
        self.connections.clear()
        self.said.clear()
        self.seq = self.epoch = seq
        self.began_ms = time_ms

    def _end(self, connection: Connection, time_ms: int) -> None:
        for rule in self.rules.values():
            entry = rule.announced.get(connection.client_id)
            if entry is not None and entry.connection.channel_id == connection.channel_id:
                rule.announced[connection.client_id] = replace(entry, ended_ms=time_ms)

    def _tell(self, told: Told) -> None:
        rule, client_id = self.rules[told.rule_id], told.connection.client_id
        rule.last, rule.before = told, rule.announced.get(client_id)
        if told.type is ClientEventType.CONNECT:
            rule.announced[client_id] = Announced(told.connection)
        elif told.type is ClientEventType.TCPCLEAN:
            rule.announced.pop(client_id, None)
        self.seq = max(self.seq, told.seq)

    def _take_back(self, rule: RuleState) -> None:
        told, before = rule.last, rule.before
        rule.last = rule.before = None
        if told is None or told.type is ClientEventType.DISCONNECT:
            return
        if before is None:
            rule.announced.pop(told.connection.client_id, None)
        else:
            rule.announced[told.connection.client_id] = before

    def _follow(self, rule_id: str, group: str, target: str) -> None:
        rule = self.rules.get(rule_id)
        if rule is None or rule.group != group:
            self.rules[rule_id] = RuleState(group, target)
            return
        if target != rule.target:
            rule.target = target
            for client_id, entry in rule.announced.items():
                rule.announced[client_id] = replace(entry, stale=True)

    @property
    def size(self) -> int:
        """About how many records `snapshot` gives."""
        return len(self.connections) + sum(len(rule.announced) for rule in self.rules.values())

    def snapshot(self) -> Iterator[Record]:
        """Return records that make this state, as it is now, of an empty one; the state may go on meanwhile."""
        head = Head(self.seq, self.epoch, self.source, self.began_ms)
        connections, said = list(self.connections.values()), list(self.said)
        rules = [(rule_id, replace(rule), list(rule.announced.values())) for rule_id, rule in self.rules.items()]

        def records() -> Iterator[Record]:
            yield head
            yield from map(Came, connections)
            yield from map(Said, said)
            for rule_id, rule, announced in rules:
                yield Followed(rule_id, rule.group, rule.target)
                for entry in announced:
                    yield Kept(rule_id, entry)
                if rule.last is not None:
                    yield Noted(rule.last, rule.before)

        return records()
