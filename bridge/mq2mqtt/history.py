"""The device trace: every connection and how it ended, from `Presence` into the store."""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from mq2mqtt.presence import Connection, Presence
from mq2mqtt.store import Connect, ConnectStore

__all__ = ["keep_history"]

# Noted before devices get their turn: about 2 ms. A broker that ends takes all its connections with it at once.
_AT_ONCE: Final = 200


def keep_history(presence: Presence, connects: ConnectStore) -> Callable[[], None]:
    """Have each coming and going noted in `connects` soon, from now on, and who is connected already.

    Returns:
        What notes all that has happened by now, at once: before the store is closed.
    """
    notes = _Notes()

    def came(connection: Connection) -> None:
        connect = Connect(
            client_id=connection.client_id,
            channel_id=connection.channel_id,
            client_ip=connection.client_ip,
            clean_session=connection.clean_session,
            connected_ms=connection.connected_ms,
        )
        notes.add(partial(connects.began, connect))

    def gone(connection: Connection, ended_ms: int, reason: str) -> None:
        notes.add(
            partial(connects.ended, connection.client_id, connection.channel_id, ended_ms=ended_ms, reason=reason)
        )

    presence.listen(came=came, gone=gone)
    # Their beginning may not have reached the store before the last end of this process.
    for connection in presence.connections.values():
        came(connection)
    return notes.make_all


class _Notes:
    """Makes notes soon, in their order, some at a time."""

    def __init__(self) -> None:
        # Bounded by who comes and goes within a few turns of the loop: each turn makes `_AT_ONCE`.
        self._waiting: deque[Callable[[], None]] = deque()  # bounded, see above
        self._next: asyncio.Handle | None = None

    def add(self, note: Callable[[], None]) -> None:
        self._waiting.append(note)
        self._go_on()

    def _go_on(self) -> None:
        if self._waiting and self._next is None:
            self._next = asyncio.get_running_loop().call_soon(self._make)

    def make_all(self) -> None:
        while self._waiting:
            self._waiting.popleft()()

    def _make(self) -> None:
        self._next = None
        try:
            for _ in range(min(_AT_ONCE, len(self._waiting))):
                self._waiting.popleft()()
        finally:
            self._go_on()
