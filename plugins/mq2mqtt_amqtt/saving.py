"""SUBACK, UNSUBACK and CONNACK of one connection: sent when the store has what they acknowledge."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final

from mq2mqtt.errors import StoreError, UnstorableError

__all__ = ["FORGET_SECONDS", "Saving", "forgotten"]

FORGET_SECONDS: Final = 3.0
"""How long a client that gives its session up waits for the store to have forgotten it: where the database is away that
may take hours, and the client is to be served meanwhile."""

MAX_WAITING: Final = 1000
"""Acknowledgements that wait for the store; a device that has more is disconnected."""


class Saving:
    """Waits beside amqtt's loop for the client, which goes on routing what it publishes."""

    def __init__(self, client_id: str, fail: Callable[[str], None]) -> None:
        self._client_id = client_id
        self._fail = fail
        self._tasks: set[asyncio.Task[None]] = set()

    async def then(
        self, acknowledge: Callable[[], Awaitable[None]], writing: Collection["asyncio.Future[None]"]
    ) -> None:
        """Acknowledge when all of `writing` is done: at once, or later from a task."""
        if not writing:
            await acknowledge()
        elif len(self._tasks) >= MAX_WAITING:
            self._fail(f"more than {MAX_WAITING} of its SUBSCRIBE and UNSUBSCRIBE wait for the store")
        else:
            task = asyncio.create_task(self._wait(acknowledge, writing), name=f"mq2mqtt.save[{self._client_id}]")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _wait(
        self, acknowledge: Callable[[], Awaitable[None]], writing: Collection["asyncio.Future[None]"]
    ) -> None:
        try:
            await asyncio.wait(writing)
            for written in writing:
                _check(written)
        except StoreError as error:
            self._fail(f"its subscriptions cannot be saved: {error}")
        else:
            await acknowledge()

    def close(self) -> None:
        """Acknowledge nothing more."""
        for task in tuple(self._tasks):
            task.cancel()


async def forgotten(writing: Collection["asyncio.Future[None]"], ended: "asyncio.Future[Any]") -> None:
    """Return when all of `writing` is done, or the connection has `ended`; after `FORGET_SECONDS` at the latest."""
    pending: set[asyncio.Future[Any]] = set(writing)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FORGET_SECONDS):
            while pending and not ended.done():
                _, pending = await asyncio.wait({*pending, ended}, return_when=asyncio.FIRST_COMPLETED)
                pending.discard(ended)


def _check(written: "asyncio.Future[None]") -> None:
    # What can never be stored is logged, and works for as long as the broker lives.
    with contextlib.suppress(UnstorableError):
        written.result()
