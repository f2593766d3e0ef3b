"""Whether brokers answer, for all who wait at them.

A long poll says nothing for up to 20 seconds (15, and the broker looks at those it holds every 5), so a broker that
hangs would go unnoticed that long. Shorter polls would cost every queue a request each few seconds; instead one
heartbeat each second is sent to each broker, however many queues are polled there. It names no groups: brokers
answer it without touching their tables, and it needs no permission but a valid key.
"""

import asyncio
import json
import logging
from typing import Final

from mq2mqtt.rocketmq.client import Client
from mq2mqtt.rocketmq.codes import RequestCode, ResponseCode
from mq2mqtt.rocketmq.errors import RocketMQError, for_code

__all__ = ["Liveness"]

logger = logging.getLogger(__name__)

# A rule is to be told down within 5 s of its broker's silence: interval, timeout, and a second until somebody looks
# leave a second and a half for a busy machine.
_INTERVAL: Final = 1.0
_TIMEOUT: Final = 1.5
_STALE: Final = _INTERVAL + _TIMEOUT + 1.0


class _Watch:
    __slots__ = ("answered_at", "answering", "doubted", "problem", "task", "users")

    def __init__(self) -> None:
        self.users = 0
        self.problem: str | None = "not asked yet"
        self.answered_at = float("-inf")
        self.answering = asyncio.Event()
        self.doubted = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Liveness:
    """One for each client; what it learns of a broker is shared."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._body = json.dumps(
            {"clientID": client.client_id, "consumerDataSet": [], "producerDataSet": []}, separators=(",", ":")
        ).encode()
        self._watches: dict[str, _Watch] = {}
        self._checks: dict[str, tuple[float, asyncio.Task[None]]] = {}

    def watch(self, address: str) -> None:
        """Ask the broker at `address` from now on, until `unwatch` was called as often."""
        watch = self._watches.get(address)
        if watch is None:
            watch = self._watches[address] = _Watch()
            watch.task = asyncio.create_task(self._ask_on(address, watch), name=f"rocketmq.liveness[{address}]")
        watch.users += 1

    def unwatch(self, address: str) -> None:
        """Take back one `watch`."""
        watch = self._watches[address]
        watch.users -= 1
        if not watch.users:
            del self._watches[address]
            watch.answering.set()  # who waits has another address now
            if watch.task is not None:
                watch.task.cancel()

    def problem(self, address: str) -> str | None:
        """Say why the watched broker at `address` cannot be relied on; `None` after a recent answer."""
        watch = self._watches[address]
        silence = asyncio.get_running_loop().time() - watch.answered_at
        if watch.problem is None and silence > _STALE:
            return f"broker {address} has not answered for {silence:.0f} s"
        return watch.problem

    async def until_answering(self, address: str) -> None:
        """A request to the watched broker failed: ask it now, and return when it answers."""
        watch = self._watches[address]
        watch.answering.clear()
        watch.doubted.set()
        await watch.answering.wait()

    async def check(self, address: str, *, max_age: float = 2.0) -> None:
        """Return when the broker answered a heartbeat sent at most `max_age` seconds ago; callers share it.

        Raises:
            RocketMQError: it did not answer, or refused.
        """
        now = asyncio.get_running_loop().time()
        sent_at, task = self._checks.get(address, (float("-inf"), None))
        if task is None or now - sent_at > max_age:
            task = asyncio.create_task(self._ask(address), name=f"rocketmq.check[{address}]")
            task.add_done_callback(_retrieve)
            self._checks[address] = (now, task)
        await asyncio.shield(task)

    async def close(self) -> None:
        """End every watch."""
        tasks = [watch.task for watch in self._watches.values() if watch.task is not None]
        tasks += [task for _, task in self._checks.values()]
        self._watches.clear()
        self._checks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, address: str) -> None:
        response = await self._client.call(address, RequestCode.HEART_BEAT, {}, self._body, timeout=_TIMEOUT)
        if response.code != ResponseCode.SUCCESS:
            raise for_code(response.code, response.remark, address=address)

    async def _ask_on(self, address: str, watch: _Watch) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self._ask(address)
            except RocketMQError as error:
                watch.problem = str(error)
                watch.answering.clear()
            else:
                watch.problem = None
                watch.answered_at = loop.time()
                watch.answering.set()
                watch.doubted.clear()
            try:
                async with asyncio.timeout(_INTERVAL):
                    # While it is known to be in trouble, more doubt does not hasten anything.
                    await (watch.doubted.wait() if watch.problem is None else asyncio.Event().wait())
            except TimeoutError:
                continue


def _retrieve(task: asyncio.Task[None]) -> None:
    # A check that nobody waits for any more must not be reported as never retrieved.
    if not task.cancelled():
        task.exception()
