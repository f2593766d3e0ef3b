"""What one transaction changes: operations in the order of their calls, brought down to few statements.

Every statement may be done twice: whether a commit was done is not known when the connection is lost in it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final, TypeAlias

from sqlalchemy import Executable, Table, bindparam, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite

from mq2mqtt.store import CONNECTS_PER_CLIENT, Connect, StoredMessage, Subscription
from mq2mqtt.store.properties import encode_properties
from mq2mqtt.store.tables import connects, offline, subscriptions

__all__ = ["Batch", "ConnectChanges", "OfflineChanges", "Operation", "Step", "SubscriptionChanges"]

Step: TypeAlias = tuple[Executable, Sequence[dict[str, object]]]
"""A statement and its parameters, once for each time it is done."""

_INSERT: Final[dict[str, Callable[[Table], Any]]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def _insert_missing(table: Table) -> dict[str, Executable]:
    """Return the statement for each dialect that leaves rows alone that are there."""
    return {dialect: insert(table).on_conflict_do_nothing() for dialect, insert in _INSERT.items()}


def _upsert_subscription(dialect: str) -> Executable:
    statement = _INSERT[dialect](subscriptions)
    upsert: Executable = statement.on_conflict_do_update(
        index_elements=["node", "client_id", "filter"],
        set_={column: statement.excluded[column] for column in ("qos", "username")},
    )
    return upsert


class OfflineChanges:
    """Messages added and removed."""

    _ADD: Final = _insert_missing(offline)
    _DELETE: Final = delete(offline).where(offline.c.node == bindparam("n"), offline.c.id == bindparam("i"))

    def __init__(self) -> None:
        self._added: dict[int, StoredMessage] = {}
        self._removed: set[int] = set()

    def add(self, message: StoredMessage) -> None:
        """See `OfflineStore.add`."""
        self._added.setdefault(message.id, message)

    def remove(self, ids: Sequence[int]) -> None:
        """See `OfflineStore.remove`."""
        for number in ids:
            self._added.pop(number, None)
        self._removed.update(ids)

    def steps(self, node: str, dialect: str) -> Iterator[Step]:
        """Return what has to be done, in this order."""
        yield self._DELETE, [{"n": node, "i": number} for number in sorted(self._removed)]
        yield self._ADD[dialect], [_message_row(node, message) for message in self._added.values()]


class SubscriptionChanges:
    """Subscriptions saved and removed."""

    _SAVE: Final = {dialect: _upsert_subscription(dialect) for dialect in _INSERT}
    _OF_CLIENT: Final = (subscriptions.c.node == bindparam("n"), subscriptions.c.client_id == bindparam("c"))
    _FORGET: Final = delete(subscriptions).where(*_OF_CLIENT)
    _DELETE: Final = delete(subscriptions).where(*_OF_CLIENT, subscriptions.c.filter == bindparam("f"))

    def __init__(self) -> None:
        self._forgotten: set[str] = set()
        self._removed: set[tuple[str, str]] = set()
        self._saved: dict[tuple[str, str], Subscription] = {}

    def save(self, subscription: Subscription) -> None:
        """See `SubscriptionStore.save`."""
        self._saved[subscription.client_id, subscription.filter] = subscription

    def remove(self, client_id: str, topic_filter: str) -> None:
        """See `SubscriptionStore.remove`."""
        self._saved.pop((client_id, topic_filter), None)
        self._removed.add((client_id, topic_filter))

    def forget(self, client_id: str) -> None:
        """See `SubscriptionStore.forget`."""
        for key in [key for key in self._saved if key[0] == client_id]:
            del self._saved[key]
        self._forgotten.add(client_id)

    def steps(self, node: str, dialect: str) -> Iterator[Step]:
        """Return what has to be done, in this order."""
        yield self._FORGET, [{"n": node, "c": client} for client in sorted(self._forgotten)]
        yield self._DELETE, [{"n": node, "c": client, "f": filter_} for client, filter_ in sorted(self._removed)]
        yield (
            self._SAVE[dialect],
            [{"node": node, **asdict(subscription)} for _, subscription in sorted(self._saved.items())],
        )


class ConnectChanges:
    """Connections that began and ended."""

    _BEGIN: Final = _insert_missing(connects)
    _END: Final = (
        update(connects)
        .where(
            connects.c.node == bindparam("n"),
            connects.c.client_id == bindparam("c"),
            connects.c.channel_id == bindparam("h"),
        )
        .values(ended_ms=bindparam("e"), reason=bindparam("r"))
    )
    _OF_CLIENT: Final = (connects.c.node == bindparam("n"), connects.c.client_id == bindparam("c"))
    _FORGET_OLDEST: Final = delete(connects).where(
        *_OF_CLIENT,
        connects.c.connected_ms
        < select(connects.c.connected_ms)
        .where(*_OF_CLIENT)
        .order_by(connects.c.connected_ms.desc())
        .limit(1)
        .offset(CONNECTS_PER_CLIENT - 1)
        .scalar_subquery(),
    )
    _TRIM: Final = delete(connects).where(
        connects.c.node == bindparam("n"),
        connects.c.connected_ms
        < select(connects.c.connected_ms)
        .where(connects.c.node == bindparam("n"))
        .order_by(connects.c.connected_ms.desc())
        .limit(1)
        .offset(bindparam("skip"))
        .scalar_subquery(),
    )

    def __init__(self) -> None:
        self._began: dict[tuple[str, str], Connect] = {}
        self._ended: dict[tuple[str, str], tuple[int, str]] = {}
        self._kept: int | None = None

    def began(self, connect: Connect) -> None:
        """See `ConnectStore.began`."""
        self._began.setdefault((connect.client_id, connect.channel_id), connect)

    def ended(self, client_id: str, channel_id: str, ended_ms: int, reason: str) -> None:
        """See `ConnectStore.ended`."""
        self._ended[client_id, channel_id] = (ended_ms, reason)

    def trim(self, kept: int) -> None:
        """Keep the last `kept` connections of all clients."""
        self._kept = kept

    def steps(self, node: str, dialect: str) -> Iterator[Step]:
        """Return what has to be done, in this order."""
        yield self._BEGIN[dialect], [_connect_row(node, connect) for connect in self._began.values()]
        yield (
            self._END,
            [
                {"n": node, "c": client, "h": channel, "e": ended_ms, "r": reason}
                for (client, channel), (ended_ms, reason) in self._ended.items()
            ],
        )
        yield self._FORGET_OLDEST, [{"n": node, "c": client} for client in sorted({key[0] for key in self._began})]
        yield self._TRIM, [] if self._kept is None else [{"n": node, "skip": self._kept - 1}]


class Batch:
    """The changes of one transaction, by table."""

    def __init__(self) -> None:
        self.offline = OfflineChanges()
        self.subscriptions = SubscriptionChanges()
        self.connects = ConnectChanges()

    def steps(self, node: str, dialect: str) -> Iterator[Step]:
        """Return what has to be done, in this order, for `node`; `dialect` is the database's name."""
        for changes in (self.offline, self.subscriptions, self.connects):
            for statement, parameters in changes.steps(node, dialect):
                if parameters:
                    yield statement, parameters


Operation: TypeAlias = Callable[[Batch], None]
"""Notes one change in the batch that it will be done with."""


def _message_row(node: str, message: StoredMessage) -> dict[str, object]:
    return {
        "node": node,
        "id": message.id,
        "client_id": message.client_id,
        "kind": message.kind.value,
        "rule": message.rule,
        "topic": message.topic,
        "payload": message.payload,
        "qos": message.qos,
        "stored_ms": message.stored_ms,
        "expires_ms": message.expires_ms,
        "properties": None if message.properties is None else encode_properties(message.properties),
        "receipt": message.receipt,
    }


def _connect_row(node: str, connect: Connect) -> dict[str, object]:
    return {
        "node": node,
        "client_id": connect.client_id,
        "channel_id": connect.channel_id,
        "client_ip": connect.client_ip,
        "clean_session": connect.clean_session,
        "connected_ms": connect.connected_ms,
        "ended_ms": connect.ended_ms,
        "reason": connect.reason,
    }
