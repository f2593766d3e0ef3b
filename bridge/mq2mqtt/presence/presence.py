"""Presence at work: takes the hosts' events, keeps the table of connected clients, and tells who listens."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from loguru import logger

from mq2mqtt.message import ClientEvent, ClientEventType
from mq2mqtt.presence.state import Begun, Came, Connection, State, Went

__all__ = ["CameListener", "GoneListener", "Presence"]

CameListener = Callable[[Connection], None]
GoneListener = Callable[[Connection, int, str], None]
"""Gets the connection, when it ended (milliseconds since 1970), and the reason (`ClientEvent.reason`)."""

CONFLICT = "clientId conflict"
RESTARTED = "broker restarted"


class Presence:
    """Who is connected to the broker now."""

    def __init__(self) -> None:
        self._state = State(seq=0)
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

    def take(self, event: ClientEvent) -> None:
        """Take one event of the host. What is known already, because the host tells it again, changes nothing."""
        known = self.connections.get(event.client_id)
        if event.type is ClientEventType.CONNECT:
            if known is not None and known.channel_id == event.channel_id:
                return
            if known is not None:
                self._end(known, event, CONFLICT)
            self._begin(event)
        elif known is not None and known.channel_id == event.channel_id and event.type is ClientEventType.TCPCLEAN:
            self._end(known, event, event.reason)

    def begin(self, *, time_ms: int, reason: str = RESTARTED, source: int | None = None) -> None:
        """Take it that the broker begins a new life: every connection that is still known ended, for this reason."""
        ended = list(self.connections.values())
        self._state.apply(Begun(self._state.seq + 1, time_ms, source))
        for connection in ended:
            self._tell_gone(connection, time_ms, reason)

    def _begin(self, event: ClientEvent) -> None:
        connection = Connection(event.client_id, event.channel_id, event.client_ip, event.time_ms, event.clean_session)
        self._state.apply(Came(connection, event.source))
        for came in self._came:
            _guarded(partial(came, connection))

    def _end(self, connection: Connection, event: ClientEvent, reason: str) -> None:
        self._state.apply(Went(connection.client_id, event.time_ms, event.source))
        self._tell_gone(connection, event.time_ms, reason)

    def _tell_gone(self, connection: Connection, time_ms: int, reason: str) -> None:
        for gone in self._gone:
            _guarded(partial(gone, connection, time_ms, reason or "unknown"))


def _guarded(tell: Callable[[], None]) -> None:
    """Let one listener's bug neither stop the others nor the host that brings the event."""
    try:
        tell()
    except Exception:  # noqa: BLE001 - see above
        logger.exception("unexpected error while telling of a client, going on")
