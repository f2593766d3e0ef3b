"""The routes of the topics in use, cached, refreshed and shared among callers."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from mq2mqtt.rocketmq.errors import NotConnected, RocketMQError
from mq2mqtt.rocketmq.route import TopicRoute

__all__ = ["RouteTable"]

logger = logging.getLogger(__name__)

REFRESH_SECONDS: Final = 30.0  # as the Java client
_FORGET_SECONDS: Final = 600.0
_USED_SECONDS: Final = 2.0
_HURRY_SECONDS: Final = 1.0  # at most one hurried refresh of a topic in this time


class _Entry:
    __slots__ = ("fetched_at", "fetching", "route", "tried_at", "used_at")

    def __init__(self) -> None:
        self.route: TopicRoute | None = None
        self.fetched_at = 0.0
        self.tried_at = float("-inf")
        self.used_at = 0.0
        self.fetching: asyncio.Task[TopicRoute] | None = None


class RouteTable:
    """Routes by topic.

    A route that cannot be refreshed is kept: brokers go on serving while name servers are away or have just
    started, and a broker says itself when a topic is gone. Topics not used for 10 minutes are forgotten.
    """

    def __init__(self, fetch: Callable[[str], Awaitable[TopicRoute]]) -> None:
        self._fetch = fetch
        self._entries: dict[str, _Entry] = {}

    async def get(self, topic: str, *, max_age: float) -> TopicRoute:
        """Return a route no older than `max_age` seconds; concurrent callers share one request.

        Raises:
            RocketMQError: as the fetch does.
        """
        now = asyncio.get_running_loop().time()
        entry = self._entries.get(topic)
        if entry is None:
            entry = self._entries[topic] = _Entry()
        entry.used_at = now
        if entry.route is not None and now - entry.fetched_at <= max_age:
            return entry.route
        task = self._refresh(topic, entry)
        # Not `await task`: neither a cancelled caller ends it for the others, nor does `close` cancel a caller.
        await asyncio.wait([task])
        if task.cancelled():
            raise NotConnected("the name servers", "this client is closed")
        return task.result()

    def cached(self, topic: str) -> TopicRoute | None:
        """Return the last route that was seen, however old, and count that as use.

        While it is used it is kept at most about 2 seconds old: brokers go on taking messages for a topic that was
        made read-only, so the route alone tells that (seen on 5.3.3).
        """
        entry = self._entries.get(topic)
        if entry is None:
            return None
        now = entry.used_at = asyncio.get_running_loop().time()
        if entry.route is not None and now - max(entry.fetched_at, entry.tried_at) >= _USED_SECONDS:
            self._refresh(topic, entry)
        return entry.route

    def doubt(self, topic: str) -> None:
        """A broker of `topic` failed: refresh its route soon."""
        entry = self._entries.get(topic)
        if entry is not None and asyncio.get_running_loop().time() - entry.tried_at >= _HURRY_SECONDS:
            self._refresh(topic, entry)

    def forget(self, topic: str) -> None:
        """Drop the route of `topic`: it was just created or deleted."""
        entry = self._entries.get(topic)
        if entry is not None:
            entry.route = None

    def refresh_old(self) -> None:
        """Begin to refresh routes older than 30 seconds and forget those that nobody uses."""
        now = asyncio.get_running_loop().time()
        for topic, entry in list(self._entries.items()):
            if now - entry.used_at > _FORGET_SECONDS and entry.fetching is None:
                del self._entries[topic]
            elif entry.route is not None and now - max(entry.fetched_at, entry.tried_at) >= REFRESH_SECONDS:
                self._refresh(topic, entry)

    def addresses(self, *, masters_only: bool) -> set[str]:
        """Return the addresses of all brokers of the routes."""
        return {
            address
            for entry in self._entries.values()
            if entry.route is not None
            for brokers in entry.route.brokers.values()
            for number, address in brokers.items()
            if number == 0 or not masters_only
        }

    async def close(self) -> None:
        """End what is being fetched."""
        tasks = [entry.fetching for entry in self._entries.values() if entry.fetching is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _refresh(self, topic: str, entry: _Entry) -> asyncio.Task[TopicRoute]:
        if entry.fetching is None:
            loop = asyncio.get_running_loop()
            entry.tried_at = loop.time()
            entry.fetching = loop.create_task(self._load(topic, entry), name=f"rocketmq.route[{topic}]")
            entry.fetching.add_done_callback(_note_failure)
        return entry.fetching

    async def _load(self, topic: str, entry: _Entry) -> TopicRoute:
        try:
            route = await self._fetch(topic)
            if entry.route is not None and route != entry.route:
                logger.info("the route of %s has changed", topic)
            entry.route = route
            entry.fetched_at = asyncio.get_running_loop().time()
        finally:
            entry.fetching = None
        return route


def _note_failure(task: asyncio.Task[TopicRoute]) -> None:
    # Nobody awaits a background refresh: its error would be reported by the event loop as never retrieved.
    if not task.cancelled():
        error = task.exception()
        if isinstance(error, RocketMQError):
            logger.debug("%s: %s", task.get_name(), error)
        elif error is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)
