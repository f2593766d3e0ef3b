"""`/api/v1/sessions`: who is connected, since when, from where, and how connections before ended."""

import asyncio
import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web

from mq2mqtt.admin.answers import ApiError, answer, limit_of, only, parameters
from mq2mqtt.errors import StoreError
from mq2mqtt.host import MqttHost
from mq2mqtt.presence import Connection
from mq2mqtt.store import Connect, ConnectStore

__all__ = ["Sessions", "routes"]

_MAX_AT_ONCE: Final = 10
_READ_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Sessions:
    """What is known of clients. `connections` is who is connected now, by client id; `kept` counts their messages."""

    host: MqttHost
    connections: Mapping[str, Connection]
    connects: Callable[[], ConnectStore | None]
    """The connections of the past; `None` while there is no store."""
    kept: Callable[[str], int]
    started: Callable[[], bool]
    """Whether `connections` is what the host says, and not what it was when the last process ended."""

    def check(self) -> None:
        """Tell whether it is known who is connected.

        Raises:
            ApiError: 501, never; 503, not now.
        """
        if not self.host.sees_clients:
            text = "the bridge is a plain client of its MQTT broker and cannot see who is connected: see docs/mqtt.md"
            raise ApiError(HTTPStatus.NOT_IMPLEMENTED, text)
        problem = self.host.problem if self.started() else "the bridge is starting"
        if problem is not None:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, f"who is connected is not known: {problem}")

    def of(self, client_id: str) -> dict[str, Any]:
        """Return the state of one client, known or not."""
        connection = self.connections.get(client_id)
        state: dict[str, Any] = {"clientId": client_id, "online": connection is not None}
        if connection is not None:
            state |= {
                "channelId": connection.channel_id,
                "clientIp": connection.client_ip,
                "connectedAt": connection.connected_ms,
                "cleanSession": connection.clean_session,
            }
        return state | {"offlineMessages": self.kept(client_id)}

    async def history(self, client_id: str) -> list[dict[str, Any]] | None:
        """Return the last connections of a client, the latest first; `None` while the store cannot be read."""
        connects = self.connects()
        if connects is None:
            return None
        try:
            async with asyncio.timeout(_READ_SECONDS):
                found = await connects.of(client_id)
        except (StoreError, TimeoutError):
            return None
        online = self.connections.get(client_id)
        return [_past(connect, online) for connect in found]

    async def page(self, after: str | None, limit: int) -> list[str]:
        """Return up to `limit` ids of connected clients that come behind `after`, in order."""
        ids = list(self.connections)
        # Of 100 000 clients: 20 ms.
        return await asyncio.to_thread(_first, ids, after, limit)


def _first(ids: list[str], after: str | None, limit: int) -> list[str]:
    return heapq.nsmallest(limit, ids if after is None else [name for name in ids if name > after])


def _past(connect: Connect, online: Connection | None) -> dict[str, Any]:
    # Nobody was there to note how it ended.
    lost = connect.ended_ms is None and (online is None or online.channel_id != connect.channel_id)
    return {
        "channelId": connect.channel_id,
        "clientIp": connect.client_ip,
        "cleanSession": connect.clean_session,
        "connectedAt": connect.connected_ms,
        "endedAt": connect.ended_ms,
        "reason": "unknown" if lost else connect.reason,
    }


def routes(sessions: Sessions) -> list[web.RouteDef]:
    """Return the handlers of `/v1/sessions`."""

    async def one(request: web.Request) -> web.Response:
        parameters(request)
        sessions.check()
        client_id = request.match_info["client_id"]
        history = await sessions.history(client_id)
        return answer(sessions.of(client_id) | {"history": history})

    async def several(request: web.Request) -> web.Response:
        values = parameters(request, "clientId", "after", "limit")
        client_ids, after, limit = values["clientId"], only(values, "after"), limit_of(values)
        if client_ids and (values["after"] or values["limit"]):
            raise ApiError(HTTPStatus.BAD_REQUEST, "clientId: use it alone; after and limit page through who is online")
        if len(client_ids) > _MAX_AT_ONCE:
            text = f"clientId: {len(client_ids)} of them, at most {_MAX_AT_ONCE} can be asked for at once"
            raise ApiError(HTTPStatus.BAD_REQUEST, text)
        sessions.check()
        if client_ids:
            return answer({"sessions": [sessions.of(client_id) for client_id in client_ids]})
        found = await sessions.page(after, limit)
        # Some may have left meanwhile.
        online = [sessions.of(client_id) for client_id in found if client_id in sessions.connections]
        return answer({"sessions": online, "next": found[-1] if len(found) == limit else None})

    return [web.get("/v1/sessions", several), web.get("/v1/sessions/{client_id:[^/]+}", one)]
