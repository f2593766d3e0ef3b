"""`/api/v1/parked`: messages that could not go on as they were. Files are read in threads: the loop has devices."""

import asyncio
import base64
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from loguru import logger

from mq2mqtt import parking
from mq2mqtt.admin.answers import ApiError, answer, limit_of, only, parameters
from mq2mqtt.errors import ConfigError, LaneCorruptError
from mq2mqtt.receipts import RECEIPTS_SUFFIX
from mq2mqtt.rules import RuleSet
from mq2mqtt.spool.frame import FrameKind
from mq2mqtt.spool.parked import ParkedMessage, drop, keys_of, read_parked

__all__ = ["Parked", "routes"]

_KINDS: Final[dict[int, str]] = {
    FrameKind.PUBLISH: "mqtt",
    FrameKind.EVENT: "status",
    FrameKind.ROCKETMQ: "rocketmq",
}


@dataclass(frozen=True, slots=True)
class Parked:
    """The parked messages of one spool. `look` has the bridge look for replays now, not within a second."""

    spool: Path
    rules: Callable[[], RuleSet]
    look: Callable[[], None]

    def counts(self) -> list[dict[str, Any]]:
        """Return how many messages each lane has parked, of those that have any."""
        found = parking.lanes_with_parked(self.spool)
        return [{"rule": lane, "messages": len(keys)} for lane, keys in found.items()]

    def page(self, lane: str, after: str | None, limit: int) -> dict[str, Any]:
        """Return up to `limit` messages whose keys come behind `after`, in the order of keys as texts."""
        path = self._lane(lane)
        keys = [key for key in keys_of(path) if after is None or key > after][:limit]
        messages = [found for key in keys if (found := _summary(path, key)) is not None]
        return {"messages": messages, "next": keys[-1] if len(keys) == limit else None}

    def whole(self, lane: str, key: str) -> dict[str, Any]:
        """Return one message with its properties and payload."""
        try:
            message = read_parked(self._lane(lane), key)
        except LaneCorruptError as error:
            raise ApiError(HTTPStatus.CONFLICT, str(error)) from error
        if message is None:
            raise _missing(lane, key)
        return _described(lane, message) | _content(message)

    def replay(self, lane: str, key: str) -> None:
        """Ask for the replay of one message."""
        path = self._lane(lane)
        try:
            if read_parked(path, key) is None:
                raise _missing(lane, key)
            problem = parking.replay(self.rules(), path, key)
        except (ConfigError, LaneCorruptError) as error:
            problem = str(error)
        if problem is not None:
            raise ApiError(HTTPStatus.CONFLICT, problem)
        logger.info("rule {}: the API asks for the replay of {}", lane, key)

    def drop(self, lane: str, key: str) -> None:
        """Delete one message."""
        if not drop(self._lane(lane), key):
            raise _missing(lane, key)
        logger.info("rule {}: the API drops {}", lane, key)

    def _lane(self, lane: str) -> Path:
        try:
            return parking.find_lane(self.spool, lane)
        except ConfigError as error:
            raise ApiError(HTTPStatus.NOT_FOUND, str(error)) from error


def _missing(lane: str, key: str) -> ApiError:
    return ApiError(HTTPStatus.NOT_FOUND, f"there is no parked message {key} of {lane}")


def _summary(lane: Path, key: str) -> dict[str, Any] | None:
    try:
        message = read_parked(lane, key)
    except LaneCorruptError as error:
        return {"key": key, "state": "damaged", "reason": str(error)}
    return None if message is None else _described(lane.name, message)


def _described(lane: str, message: ParkedMessage) -> dict[str, Any]:
    frame = message.frame
    return {
        "key": message.key,
        "state": "replay" if message.replaying else "parked",
        "reason": message.reason,
        "parkedAt": message.parked_us // 1000,
        "kind": "receipt" if lane.endswith(RECEIPTS_SUFFIX) else _KINDS.get(frame.kind, "unknown"),
        "topic": frame.topic,
        "clientId": frame.client_id,
        "acceptedAt": frame.accepted_us // 1000,
        "payloadBytes": len(frame.payload),
    }


def _content(message: ParkedMessage) -> dict[str, Any]:
    frame = message.frame
    content: dict[str, Any] = {"payloadBase64": base64.b64encode(frame.payload).decode()}
    if frame.kind == FrameKind.ROCKETMQ:
        entries = frame.properties.decode("utf-8", "replace").split("\x02")
        content["properties"] = dict(entry.split("\x01", 1) for entry in entries if "\x01" in entry)
    elif frame.kind == FrameKind.PUBLISH:
        content |= {"qos": frame.qos, "retain": frame.retain, "cleanSession": frame.clean_session, "will": frame.will}
        content["propertiesBase64"] = base64.b64encode(frame.properties).decode()
    return content


def routes(parked: Parked) -> list[web.RouteDef]:
    """Return the handlers of `/v1/parked`."""

    async def counts(request: web.Request) -> web.Response:
        parameters(request)
        return answer({"parked": await asyncio.to_thread(parked.counts)})

    async def page(request: web.Request) -> web.Response:
        values = parameters(request, "after", "limit")
        lane, after, limit = request.match_info["rule"], only(values, "after"), limit_of(values)
        return answer(await asyncio.to_thread(parked.page, lane, after, limit))

    async def whole(request: web.Request) -> web.Response:
        parameters(request)
        return answer(await asyncio.to_thread(parked.whole, *_place(request)))

    async def replay(request: web.Request) -> web.Response:
        parameters(request)
        lane, key = _place(request)
        await asyncio.to_thread(parked.replay, lane, key)
        parked.look()
        return answer({"rule": lane, "key": key, "state": "replay"}, status=HTTPStatus.ACCEPTED)

    async def delete(request: web.Request) -> web.Response:
        parameters(request)
        lane, key = _place(request)
        await asyncio.to_thread(parked.drop, lane, key)
        return answer({"rule": lane, "key": key, "state": "dropped"})

    # Names with braces too.
    rule, message = "/v1/parked/{rule:[^/]+}", "/v1/parked/{rule:[^/]+}/{key:[^/]+}"
    return [
        web.get("/v1/parked", counts),
        web.get(rule, page),
        web.get(message, whole),
        web.post(f"{message}/replay", replay),
        web.delete(message, delete),
    ]


def _place(request: web.Request) -> tuple[str, str]:
    return request.match_info["rule"], request.match_info["key"]
