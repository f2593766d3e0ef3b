"""What ends kept messages beside their delivery: their time, and the quotas."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial

from loguru import logger

from mq2mqtt.errors import StoreError
from mq2mqtt.host import DropReason
from mq2mqtt.offline.shelf import Shelf
from mq2mqtt.store import MessageHead
from mq2mqtt.telemetry import Ending

__all__ = ["Upkeep", "excess"]

_SWEEP_SECONDS = 1.0
_RETRY_SECONDS = 1.0
# Ended before devices get their turn: about 5 ms.
_SWEEP_MESSAGES = 300
_EVICT_MESSAGES = 300
_CLIENTS_AT_ONCE = 20
_DELETING = 1000
"""Rows that are being deleted: so many are waited for. Those who look for the oldest read past them."""


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
        self._deleting: set[asyncio.Future[None]] = set()

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
        while messages := await self._shelf.expired(_SWEEP_MESSAGES):
            # The next read begins with those that are not deleted yet.
            await asyncio.wait([self._shelf.leave(message, Ending.EXPIRED) for message in messages])
        await asyncio.sleep(_SWEEP_SECONDS)

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
        """Evict a page of some clients, and one of all: who is over a quota all the time holds up nobody.

        Return whether there was any. The time to commit it is not waited for: as fast as messages come, they go.
        """
        some = min(len(self._crowded), _CLIENTS_AT_ONCE)
        clients = [self._crowded.popitem(last=False)[0] for _ in range(some)]
        # What holds them up is the way to the database and back.
        found = await asyncio.gather(*map(self._evict_of, clients), return_exceptions=True)
        # Where all of a client's are under way, the next one that is kept asks again.
        self._crowded.update(dict.fromkeys(client_id for client_id, has in zip(clients, found, strict=True) if has))
        for error in found:
            if isinstance(error, BaseException):
                raise error
        return await self._evict_page(self._too_many, self._shelf.oldest_overall) or any(found)

    async def _evict_of(self, client_id: str) -> bool:
        return await self._evict_page(partial(self._too_many_of, client_id), partial(self._shelf.oldest, client_id))

    async def _evict_page(
        self, too_many: Callable[[], int], oldest: Callable[[int], Awaitable[list[MessageHead]]]
    ) -> bool:
        if not (wanted := min(too_many(), _EVICT_MESSAGES)):
            return False
        messages = await oldest(wanted)
        # Some may have been delivered in the time of the read: there is room for the others.
        messages = messages[: too_many()]
        for message in messages:
            deleted = self._shelf.leave(message, Ending.EVICTED, reason=DropReason.OFFLINE_QUOTA)
            self._deleting.add(deleted)
            deleted.add_done_callback(self._deleting.discard)
        if len(self._deleting) >= _DELETING:
            await asyncio.wait(self._deleting)
        return bool(messages)

    def _too_many_of(self, client_id: str) -> int:
        """Return how many of the client's messages have to go, and can: those under way cannot."""
        ledger = self._shelf.ledger
        return min(excess(ledger.counts[client_id], self._shelf.settings.per_client), ledger.waiting(client_id))

    def _too_many(self) -> int:
        ledger = self._shelf.ledger
        return min(excess(ledger.total, self._shelf.settings.total), ledger.waiting_overall)


async def _guarded(step: Callable[[], Awaitable[None]]) -> None:
    """Do `step` again and again, whatever it raises."""
    while True:
        try:
            await step()
            continue
        except StoreError as error:
            # What is wrong is told by the rules that have something to keep.
            logger.debug("kept messages cannot be looked through: {}", error)
        except Exception:  # noqa: BLE001 - a task's top edge: kept messages must not pile up
            logger.exception("unexpected error while looking through kept messages, going on")
        await asyncio.sleep(_RETRY_SECONDS)
