"""What ends kept messages beside their delivery: their time, and the quotas."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable

from loguru import logger

from mq2mqtt.errors import StoreError
from mq2mqtt.host import DropReason
from mq2mqtt.offline.shelf import Shelf
from mq2mqtt.store import StoredMessage
from mq2mqtt.telemetry import Ending

__all__ = ["Upkeep", "excess"]

_SWEEP_SECONDS = 1.0
_SWEEP_MESSAGES = 500
_EVICT_MESSAGES = 100
_CLIENTS_AT_ONCE = 20


def excess(count: int, quota: int) -> int:
    """Return how many of so many messages the quota does not allow."""
    return max(0, count - quota)


class Upkeep:
    """Ends messages whose time is over, and the oldest of those that are too many."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        # A plain dict looks for its first key behind all that were taken out.
        self._crowded: OrderedDict[str, None] = OrderedDict()
        self._is_crowded = asyncio.Event()

    def kept(self, client_id: str) -> None:
        """One more message is kept for this client: is there room for it?"""
        ledger, settings = self._shelf.ledger, self._shelf.settings
        if excess(ledger.counts[client_id], settings.per_client):
            self._crowded[client_id] = None
            self._is_crowded.set()
        elif excess(ledger.total, settings.total):
            self._is_crowded.set()

    async def run(self) -> None:
        """Work until cancelled."""
        # The quotas may be lower than when they were kept.
        for client_id in self._shelf.ledger.counts:
            self.kept(client_id)
        async with asyncio.TaskGroup() as group:
            group.create_task(_guarded(self._sweep), name="mq2mqtt.offline.sweep")
            group.create_task(_guarded(self._evict), name="mq2mqtt.offline.evict")

    async def _sweep(self) -> None:
        while await _done(self._end(await self._shelf.expired(_SWEEP_MESSAGES), Ending.EXPIRED, None)):
            pass

    async def _evict(self) -> None:
        await self._is_crowded.wait()
        self._is_crowded.clear()
        try:
            while await self._evict_some():
                pass
        except BaseException:
            self._is_crowded.set()
            raise

    async def _evict_some(self) -> bool:
        """Evict a page of some clients, and one of all: who is over a quota all the time holds up nobody."""
        shelf = self._shelf
        deleting: list[asyncio.Future[None]] = []
        for _ in range(min(len(self._crowded), _CLIENTS_AT_ONCE)):
            client_id = next(iter(self._crowded))
            too_many = excess(shelf.ledger.counts[client_id], shelf.settings.per_client)
            messages = await shelf.oldest(client_id, min(too_many, _EVICT_MESSAGES)) if too_many else []
            if messages:
                self._crowded.move_to_end(client_id)
                deleting += self._end(messages, Ending.EVICTED, DropReason.OFFLINE_QUOTA)
            else:
                # Where all of them are under way, the next one that is kept asks again.
                del self._crowded[client_id]
        if too_many := excess(shelf.ledger.total, shelf.settings.total):
            messages = await shelf.oldest_overall(min(too_many, _EVICT_MESSAGES))
            deleting += self._end(messages, Ending.EVICTED, DropReason.OFFLINE_QUOTA)
        return await _done(deleting)

    def _end(
        self, messages: Iterable[StoredMessage], ending: Ending, reason: DropReason | None
    ) -> list[asyncio.Future[None]]:
        return [self._shelf.leave(message, ending, reason=reason) for message in messages]


async def _done(deleting: list[asyncio.Future[None]]) -> bool:
    """Return, once these rows are deleted, whether there were any."""
    if deleting:
        await asyncio.wait(deleting)
    return bool(deleting)


async def _guarded(step: Callable[[], Awaitable[None]]) -> None:
    """Do `step` again and again, whatever it raises."""
    while True:
        try:
            await step()
        except StoreError as error:
            # What is wrong is told by the rules that have something to keep.
            logger.debug("kept messages cannot be looked through: {}", error)
        except Exception:  # noqa: BLE001 - a task's top edge: kept messages must not pile up
            logger.exception("unexpected error while looking through kept messages, going on")
        await asyncio.sleep(_SWEEP_SECONDS)
