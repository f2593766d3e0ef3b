"""Who is connected, from the events that the hook writes and the lists that it gives."""

import json
from collections.abc import Callable
from typing import Any, Final

from loguru import logger

from mq2mqtt.message import ClientEvent, ClientEventType
from mq2mqtt.spool.frame import Frame
from mq2mqtt_mosquitto.control import ConnectedClient

__all__ = ["Presence"]

_GONE: Final = frozenset((ClientEventType.DISCONNECT, ClientEventType.TCPCLEAN))
_ENDS: Final = frozenset(("boot", "shutdown"))


class Presence:
    """The table of connected clients. `tell` gets each coming and going, `ask` is called when a list is needed.

    A list is as of one offset in the events. Events that were read already and lie behind it are applied to it again.
    """

    def __init__(self, *, tell: Callable[[ClientEvent], None], ask: Callable[[], None]) -> None:
        self.online: dict[str, ConnectedClient] = {}
        self._tell = tell
        self._ask = ask
        self._listed_at = 0
        # Since a list was asked for: bounded by the time that its answer may take.
        self._since: list[tuple[int, dict[str, Any]]] | None = None

    def list_asked(self) -> None:
        """A list was asked for."""
        self._since = []

    def listed(self, offset: int, clients: list[ConnectedClient]) -> None:
        """Take a list: who was connected when the next event had this `offset`."""
        since, self._since = self._since or [], None
        self._listed_at = offset
        now = {client.client_id: client for client in clients}
        for at, event in since:
            if at >= offset:
                _apply(now, event)
        for client_id, client in list(self.online.items()):
            if client_id not in now or now[client_id].channel_id != client.channel_id:
                self._gone(client, ClientEventType.TCPCLEAN, client.connected_ms)
        for client_id, client in now.items():
            if client_id not in self.online:
                self._come(client)

    def take(self, offset: int, frame: Frame) -> None:
        """Take one event of the lane."""
        try:
            event = _read(frame)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            logger.error("a client event of the hook cannot be read: {!r}", frame.payload[:200])
            return
        kind = event["type"]
        if self._since is not None:
            self._since.append((offset, event))
        if offset < self._listed_at:
            return
        if kind == "overflow":
            self._ask()
        elif kind in _ENDS:
            for client in list(self.online.values()):
                self._gone(client, ClientEventType.TCPCLEAN, event["time"])
        else:
            self._changed(event)

    def _changed(self, event: dict[str, Any]) -> None:
        client_id, known = event["clientId"], self.online.get(event["clientId"])
        if event["type"] == ClientEventType.CONNECT:
            if known is not None and known.channel_id != event["channelId"]:
                self._gone(known, ClientEventType.TCPCLEAN, event["time"])
            if client_id not in self.online:
                self._come(_client(event))
        elif event["type"] in _GONE and known is not None and known.channel_id == event["channelId"]:
            self._gone(known, ClientEventType(event["type"]), event["time"])

    def _come(self, client: ConnectedClient) -> None:
        self.online[client.client_id] = client
        self._tell(_event(ClientEventType.CONNECT, client, client.connected_ms))

    def _gone(self, client: ConnectedClient, kind: ClientEventType, time_ms: int) -> None:
        """A DISCONNECT is told as one, and then, as every end of a connection, that it is closed."""
        del self.online[client.client_id]
        for told in dict.fromkeys((kind, ClientEventType.TCPCLEAN)):
            self._tell(_event(told, client, time_ms))


def _read(frame: Frame) -> dict[str, Any]:
    """Return the fields of an event, each of its type; raises what comes of JSON that is something else."""
    fields = json.loads(frame.payload)
    return {
        "type": str(fields["type"]),
        "clientId": frame.client_id,
        "channelId": str(fields.get("channelId", "")),
        "clientIp": str(fields.get("clientIp", "")),
        "time": int(fields.get("time", 0)),
        "cleanSession": bool(fields.get("cleanSession", True)),
    }


def _client(event: dict[str, Any]) -> ConnectedClient:
    return ConnectedClient(
        event["clientId"], event["channelId"], event["clientIp"], event["time"], event["cleanSession"]
    )


def _event(kind: ClientEventType, client: ConnectedClient, time_ms: int) -> ClientEvent:
    return ClientEvent(kind, client.client_id, client.channel_id, client.ip, time_ms)


def _apply(online: dict[str, ConnectedClient], event: dict[str, Any]) -> None:
    """Do to a list what an event after it says."""
    client_id, kind = event["clientId"], event["type"]
    if kind in _ENDS:
        online.clear()
    elif kind == ClientEventType.CONNECT:
        online[client_id] = _client(event)
    elif kind in _GONE and client_id in online and online[client_id].channel_id == event["channelId"]:
        del online[client_id]
