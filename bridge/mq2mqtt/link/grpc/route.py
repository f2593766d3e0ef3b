"""What the proxy says of topics, kept for a while."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mq2mqtt.errors import LinkError, NotAuthorizedError, NotConnectedError, TopicNotFoundError
from mq2mqtt.link import Queue
from mq2mqtt.link.grpc.groups import group_names

__all__ = ["Route", "Routes"]

_REFRESH_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Route:
    """A topic's route."""

    topic: str
    queues: tuple[Queue, ...]
    """Writable, sorted."""
    readable: bool
    ordered: bool
    """Whether messages of a group can be written."""

    def require_writable(self) -> None:
        """Return when messages can be sent in order.

        Raises:
            NotAuthorizedError: no queue is writable.
            LinkError: the topic is of another type than FIFO.
        """
        if not self.queues:
            raise NotAuthorizedError(f"topic {self.topic} is not writable")
        if not self.ordered:
            raise LinkError(
                f"topic {self.topic} does not keep messages in order by way of the proxy, its type must be FIFO: "
                f"mqadmin updateTopic -n NAMESRV -c CLUSTER -t {self.topic} -a +message.type=FIFO"
            )

    def require_readable(self) -> None:
        """Return when messages can be received.

        Raises:
            NotAuthorizedError: no queue is readable.
        """
        if not self.readable:
            raise NotAuthorizedError(f"topic {self.topic} is not readable")

    def group(self, queue: Queue) -> str:
        """Return the message group of what is sent to `queue`.

        Raises:
            LinkError: the topic has it no more.
        """
        try:
            return group_names(len(self.queues))[self.queues.index(queue)]
        except ValueError:
            raise LinkError(f"topic {self.topic} has no queue {queue.queue_id} on {queue.broker} any more") from None


class _Known:
    """A route that was answered."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.at = time.monotonic()
        self.refresh_at = self.at + _REFRESH_SECONDS


class Routes:
    """The routes of topics that were asked for: a few, the targets of rules.

    Args:
        ask: gets a route from the proxy; raises `BridgeError`.
    """

    def __init__(self, ask: Callable[[str], Awaitable[Route]]) -> None:
        self._ask = ask
        self._known: dict[str, _Known] = {}
        self._asking: dict[str, asyncio.Task[Route]] = {}

    async def get(self, topic: str, *, max_age: float = float("inf")) -> Route:
        """Return the route, at most `max_age` seconds old; one that is older than 5 s is refreshed beside this.

        Raises:
            BridgeError: what `ask` raises.
        """
        known = self._known.get(topic)
        now = time.monotonic()
        if known is None or now - known.at > max_age:
            return await self._answer(topic)
        if now > known.refresh_at:
            known.refresh_at = now + _REFRESH_SECONDS
            self._task(topic)
        return known.route

    async def _answer(self, topic: str) -> Route:
        task = self._task(topic)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            waiter = asyncio.current_task()
            if task.cancelled() and not (waiter and waiter.cancelling()):
                raise NotConnectedError("the link is closed") from None
            raise

    def forget(self, topic: str) -> None:
        """Have the next `get` ask."""
        self._known.pop(topic, None)

    async def close(self) -> None:
        """End all questions."""
        for task in (tasks := list(self._asking.values())):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _task(self, topic: str) -> asyncio.Task[Route]:
        task = self._asking.get(topic)
        if task is None:
            task = asyncio.create_task(self._refresh(topic), name=f"mq2mqtt.grpc.route[{topic}]")
            self._asking[topic] = task
            task.add_done_callback(lambda done: self._asked(topic, done))
        return task

    async def _refresh(self, topic: str) -> Route:
        try:
            route = await self._ask(topic)
        except TopicNotFoundError:
            self.forget(topic)
            raise
        self._known[topic] = _Known(route)
        return route

    def _asked(self, topic: str, task: asyncio.Task[Route]) -> None:
        del self._asking[topic]
        if not task.cancelled():
            # Where nobody waited for it, the next send tells what is wrong.
            task.exception()
