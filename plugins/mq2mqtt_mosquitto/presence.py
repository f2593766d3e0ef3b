"""Who is connected, from the events that the hook writes and the lists that it gives."""

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from loguru import logger

from mq2mqtt.message import ClientEvent, ClientEventType
from mq2mqtt.spool.frame import Frame
from mq2mqtt_mosquitto.control import ConnectedClient

__all__ = ["Presence"]

_GONE: Final = frozenset((ClientEventType.DISCONNECT, ClientEventType.TCPCLEAN))
_ENDS: Final = {"boot": "broker restarted", "shutdown": "broker stopped"}
_UNKNOWN: Final = "unknown"
_REASONS: Final = {
    "disconnect": "disconnected by client",
    "close": "closed by client",
    "keepalive": "no heart",
    "takeover": "clientId conflict",
    "kick": "kicked",
    "invalid": "invalid packet",
}
"""The hook's words as those of `ClientEvent`."""


class _List(NamedTuple):
    """Who was connected when the next event had this `offset`, and the events from it on that were read already."""

    offset: int
    clients: list[ConnectedClient]
    since: list[dict[str, Any]]


class Presence:
    """The table of connected clients. `tell` gets each coming and going, `ask` is called when a list is needed.

    `ended(time_ms, reason, source)` is called where the broker ends, or begins: then nobody is connected.

    A list is as of one offset in the events. It comes into force when the events before it have been read, so that who
    came and went meanwhile is told too; events behind it that were read already are applied to it again.

    The `source` of what is told is the offset of the last event that is wholly told then: whoever notes it can go on
    from it after a crash, and is told no `connect` twice.

    Attributes:
        online: who is connected, by client id.
        known: set while it is known who that is: from where a list comes into force to where the broker ends.
    """

    def __init__(
        self,
        *,
        tell: Callable[[ClientEvent], None],
        ended: Callable[[int, str, int], None],
        ask: Callable[[], None],
    ) -> None:
        self.online: dict[str, ConnectedClient] = {}
        self.known = asyncio.Event()
        self._tell = tell
        self._ended = ended
        self._ask = ask
        # Events before it are in the table.
        self._position = 0
        self._reads = True
        # Since a list was asked for: bounded by the time that its answer may take.
        self._since: list[tuple[int, dict[str, Any]]] | None = None
        self._list: _List | None = None

    def know(self, clients: Iterable[ConnectedClient], *, source: int) -> None:
        """Begin with what was known after the event at offset `source`; -1 for nothing."""
        self.online = {client.client_id: client for client in clients}
        self._position = source + 1

    def list_asked(self) -> None:
        """A list was asked for."""
        self._since, self._list = [], None

    def listed(self, offset: int, clients: list[ConnectedClient]) -> None:
        """Take a list: who was connected when the next event had this `offset`."""
        since, self._since = self._since or [], None
        self._list = _List(offset, clients, [event for at, event in since if at >= offset])
        if self._position >= offset or not self._reads:
            self.caught_up()

    def caught_up(self) -> None:
        """All events that were written before a list came have been read."""
        if self._list is not None:
            self._go_by(self._list)

    def reads(self, *, events: bool) -> None:
        """Whether events can be read now. While they cannot, lists are all there is."""
        self._reads = events
        if not events:
            self.caught_up()

    def take(self, offset: int, frame: Frame) -> None:
        """Take one event of the lane."""
        if self._list is not None and offset >= self._list.offset:
            self._go_by(self._list)
        if offset < self._position:
            return
        try:
            event = _read(frame)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            logger.error("a client event of the hook cannot be read: {!r}", frame.payload[:200])
            return
        if self._since is not None:
            self._since.append((offset, event))
        self._position = offset + 1
        kind = event["type"]
        if kind == "overflow":
            self._ask()
        elif kind in _ENDS:
            self.online.clear()
            self.known.clear()
            self._ended(event["time"], _ENDS[kind], offset)
        else:
            self._changed(event)

    def _go_by(self, listed: _List) -> None:
        self._list = None
        self._position = max(self._position, listed.offset)
        now = {client.client_id: client for client in listed.clients}
        for event in listed.since:
            _apply(now, event)
        source = self._position - 1
        # Of 100 000 clients, and mostly none: comparing is all that may take its time.
        gone = [
            (client, then)
            for client_id, client in self.online.items()
            if (then := now.get(client_id)) is None or then.channel_id != client.channel_id
        ]
        for client, then in gone:
            # Nobody saw it end.
            ended_ms = time.time_ns() // 1_000_000 if then is None else then.connected_ms
            self._gone(client, ended_ms, _UNKNOWN, source)
        for client in [client for client_id, client in now.items() if client_id not in self.online]:
            self._come(client, source)
        if not any(event["type"] in _ENDS for event in listed.since):
            self.known.set()

    def _changed(self, event: dict[str, Any]) -> None:
        client_id, known = event["clientId"], self.online.get(event["clientId"])
        source = self._position - 1
        if event["type"] == ClientEventType.CONNECT:
            if known is not None and known.channel_id != event["channelId"]:
                self._gone(known, event["time"], _REASONS["takeover"], source - 1)
            if client_id not in self.online:
                self._come(_client(event), source)
        elif event["type"] in _GONE and known is not None and known.channel_id == event["channelId"]:
            if event["type"] == ClientEventType.DISCONNECT:
                # It is told as one, and then, as every end of a connection, that it is closed.
                self._tell(_event(ClientEventType.DISCONNECT, known, event["time"], source=source - 1))
            self._gone(known, event["time"], _REASONS.get(event["reason"], _UNKNOWN), source)

    def _come(self, client: ConnectedClient, source: int) -> None:
        self.online[client.client_id] = client
        self._tell(_event(ClientEventType.CONNECT, client, client.connected_ms, source=source))

    def _gone(self, client: ConnectedClient, time_ms: int, reason: str, source: int) -> None:
        del self.online[client.client_id]
        self._tell(_event(ClientEventType.TCPCLEAN, client, time_ms, reason=reason, source=source))


def _read(frame: Frame) -> dict[str, Any]:
    """Return the fields of an event, each of its type; raises what comes of JSON that is something else."""
    # An address may be what a client says of itself (`X-Forwarded-For`): any bytes.
    fields = json.loads(frame.payload.decode("utf-8", "surrogateescape"))
    return {
        "type": str(fields["type"]),
        "clientId": frame.client_id,
        "channelId": str(fields.get("channelId", "")),
        "clientIp": str(fields.get("clientIp", "")),
        "time": int(fields.get("time", 0)),
        "reason": str(fields.get("reason", "")),
        "cleanSession": bool(fields.get("cleanSession", True)),
    }


def _client(event: dict[str, Any]) -> ConnectedClient:
    return ConnectedClient(
        event["clientId"], event["channelId"], event["clientIp"], event["time"], event["cleanSession"]
    )


def _event(
    kind: ClientEventType, client: ConnectedClient, time_ms: int, *, reason: str = "", source: int
) -> ClientEvent:
    return ClientEvent(
        kind, client.client_id, client.channel_id, client.ip, time_ms, client.clean_session, reason, source
    )


def _apply(online: dict[str, ConnectedClient], event: dict[str, Any]) -> None:
    """Do to a list what an event after it says."""
    client_id, kind = event["clientId"], event["type"]
    if kind in _ENDS:
        online.clear()
    elif kind == ClientEventType.CONNECT:
        online[client_id] = _client(event)
    elif kind in _GONE and client_id in online and online[client_id].channel_id == event["channelId"]:
        del online[client_id]
