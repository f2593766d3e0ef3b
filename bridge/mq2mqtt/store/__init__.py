"""What outlives a restart and is looked up by client: kept messages, subscriptions, past connections.

Writes return at once and are done in the order of the calls, but for messages that are removed, which go first; a
future is done when its transaction is committed.
What the database cannot do now waits and is tried again, so a future may stay open as long as the database is away.
Reads see what is committed, raise `StoreError` while the database is away, and never wait for a write.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from mq2mqtt.message import MqttProperties

__all__ = [
    "CONNECTS_PER_CLIENT",
    "Connect",
    "ConnectStore",
    "MessageHead",
    "MessageKind",
    "OfflineStore",
    "Store",
    "StoredMessage",
    "Subscription",
    "SubscriptionStore",
]

CONNECTS_PER_CLIENT = 20
"""How many past and present connections of a client are kept."""


class MessageKind(StrEnum):
    """Why a message is kept."""

    P2P = "p2p"
    """It is for this client alone."""
    SESSION = "session"
    """A subscription of the client's persistent session missed it."""


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message kept for a client. Times are milliseconds since 1970; `expires_ms` `None` is never.

    `id` is the caller's, at least 0 and higher than each before it: it is the order of the messages. `receipt` is
    text of the caller's own, `None` where nobody wants a receipt.
    """

    id: int
    client_id: str
    kind: MessageKind
    rule: str
    topic: str
    payload: bytes
    qos: int
    stored_ms: int
    expires_ms: int | None = None
    properties: MqttProperties | None = None
    receipt: str | None = None


@dataclass(frozen=True, slots=True)
class MessageHead:
    """A kept message as it is known before it is read: what may be many has no payloads. `size` is its payload's."""

    id: int
    client_id: str
    rule: str
    topic: str
    receipt: str | None
    size: int


@dataclass(frozen=True, slots=True)
class Subscription:
    """A topic filter of a persistent session, with the QoS that was granted, and who had logged in, if anybody."""

    client_id: str
    filter: str
    qos: int
    username: str | None = None


@dataclass(frozen=True, slots=True)
class Connect:
    """A connection of a client; `ended_ms` is `None` while nobody has said that it ended."""

    client_id: str
    channel_id: str
    client_ip: str
    clean_session: bool
    connected_ms: int
    ended_ms: int | None = None
    reason: str = ""


class OfflineStore(Protocol):
    """The messages kept for clients."""

    def add(self, message: StoredMessage) -> asyncio.Future[None]:
        """Keep `message`. An id that is there already is left as it is.

        The future may raise `StoreError`: too much waits to be written, try again later; or `UnstorableError`: the
        database can never hold this one.
        """

    def remove(self, ids: Sequence[int]) -> asyncio.Future[None]:
        """Forget the messages with these ids; unknown ones are nothing. Always taken, however much waits.

        It is done before what waits to be added: none of these may still be among that.
        """

    async def oldest(self, client_id: str, *, after: int = -1, limit: int) -> list[MessageHead]:
        """Return up to `limit` messages of a client whose ids are higher than `after`, lowest first."""

    async def oldest_overall(self, *, after: int = -1, limit: int) -> list[MessageHead]:
        """Return up to `limit` messages, of whatever client, whose ids are higher than `after`, lowest first."""

    async def missed(self, client_id: str, *, upto: int, after: int = -1, limit: int) -> list[MessageHead]:
        """Return as `oldest`, but only what the client's session missed, up to the id `upto`."""

    async def expired(self, now_ms: int, limit: int) -> list[MessageHead]:
        """Return up to `limit` messages whose time is over, first those that ended first; they stay until removed."""

    async def read(self, ids: Sequence[int]) -> list[StoredMessage]:
        """Return those of the messages with these ids that are there, lowest first. Memory holds them all."""

    async def counts(self) -> dict[str, int]:
        """Return how many messages each client has, of those that have any."""

    async def last_id(self) -> int:
        """Return the highest id there is, -1 without messages."""


class SubscriptionStore(Protocol):
    """The subscriptions of persistent sessions. What removes them is always taken, however much waits."""

    def save(self, subscription: Subscription) -> asyncio.Future[None]:
        """Remember a subscription; the same client's with the same filter is replaced.

        The future may raise as that of `OfflineStore.add`.
        """

    def remove(self, client_id: str, topic_filter: str) -> asyncio.Future[None]:
        """Forget a subscription; an unknown one is nothing."""

    def forget(self, client_id: str) -> asyncio.Future[None]:
        """Forget all subscriptions of a client."""

    async def all(self) -> list[Subscription]:
        """Return all subscriptions, in the order of client ids and filters."""


class ConnectStore(Protocol):
    """The last connections of each client. A history to look at: while too much waits to be written, it has gaps."""

    def began(self, connect: Connect) -> None:
        """Note a connection; of a client with `CONNECTS_PER_CLIENT` of them, the oldest go."""

    def ended(self, client_id: str, channel_id: str, *, ended_ms: int, reason: str) -> None:
        """Note how a connection ended; an unknown one is nothing."""

    async def of(self, client_id: str, *, limit: int = CONNECTS_PER_CLIENT) -> list[Connect]:
        """Return up to `limit` connections of a client, the latest first."""


class Store(Protocol):
    """One database, as one node sees it."""

    @property
    def offline(self) -> OfflineStore:
        """The messages kept for clients."""

    @property
    def subscriptions(self) -> SubscriptionStore:
        """The subscriptions of persistent sessions."""

    @property
    def connects(self) -> ConnectStore:
        """The last connections of each client."""

    @property
    def problem(self) -> str | None:
        """Why nothing can be written or read at the moment; `None` when the last attempt was good."""

    async def close(self, *, seconds: float = 3.0) -> None:
        """Write what waits, for `seconds` at most, and close; what is not written by then fails. Idempotent."""
