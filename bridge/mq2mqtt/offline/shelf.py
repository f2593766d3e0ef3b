"""The kept messages: into the store and out of it, counted, with a receipt for whoever asked for one."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from loguru import logger

from mq2mqtt import expiry
from mq2mqtt.errors import StoreError, UnstorableError
from mq2mqtt.host import DropReason, Outcome
from mq2mqtt.message import MqttMessage
from mq2mqtt.offline.ledger import Ledger
from mq2mqtt.settings import OfflineSettings
from mq2mqtt.store import MessageHead, MessageKind, OfflineStore, StoredMessage
from mq2mqtt.telemetry import Ending, Telemetry

__all__ = ["Receipts", "Shelf", "message_of"]

_RETRY_SECONDS = 0.5
# Refused messages that are tried before devices get their turn: about 5 ms.
_AT_ONCE = 200
_PAGE_MESSAGES = 300

Kept = Callable[[StoredMessage | UnstorableError], None]
"""Called with the message when it is kept for good, or with why it never can be."""


class _Read(Protocol):
    """Reads one page of messages, by rising ids."""

    async def __call__(self, *, after: int, limit: int) -> list[MessageHead]: ...


class Receipts(Protocol):
    """Where receipts go."""

    def tell(self, rule_id: str, outcome: Outcome, receipt: str, *, client_id: str, topic: str) -> None:
        """Let the sender of a message know of its outcome; `receipt` is what it was kept with."""


class Shelf:
    """All access to the kept messages. Before `open` there are none, and nothing may be put."""

    store: OfflineStore

    def __init__(self, settings: OfflineSettings, *, telemetry: Telemetry, receipts: Receipts) -> None:
        self.settings = settings
        self.ledger = Ledger()
        self._telemetry = telemetry
        self._receipts = receipts
        self.last_id = -1
        """Of the message that was put last."""
        # Bounded by whoever waits for `available`, and by what the relay reads ahead.
        self._refused: deque[tuple[StoredMessage, Kept]] = deque()  # bounded, see above
        self._retry: asyncio.TimerHandle | None = None
        self._takes = asyncio.Event()
        self._takes.set()
        self._closed = False
        self.on_kept: Callable[[str], None] = _nobody
        """Called with the client id when one more message is kept and counted."""

    async def open(self, store: OfflineStore) -> None:
        """Go by what is in `store`.

        Raises:
            StoreError: it cannot be read.
        """
        for client_id, count in (await store.counts()).items():
            self.ledger.add(client_id, count)
        self.last_id = await store.last_id()
        self._telemetry.offline.found(self.ledger.total)
        self.store = store

    def close(self) -> None:
        """Try nothing again. What is not kept stays with its sender."""
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()

    # -- in --

    def put(  # noqa: PLR0913 - the columns of a kept message
        self,
        client_id: str,
        message: MqttMessage,
        kept: Kept,
        *,
        kind: MessageKind,
        rule_id: str,
        expires_ms: int | None,
        receipt: str | None,
    ) -> None:
        """Keep `message` for the client; `expires_ms` is its sender's wish, and retention ends it at the latest."""
        now_ns = time.time_ns()
        now_ms = now_ns // 1_000_000
        # Also where the clock was set back since the last one.
        self.last_id = max(now_ns // 1000, self.last_id + 1)
        retained_until = now_ms + self.settings.retention * 1000
        # What is left of its own time goes by `stored_ms`: the row's end may be that of the retention.
        properties = expiry.aged(message, expires_ms, now_ms).properties
        stored = StoredMessage(
            self.last_id,
            client_id,
            kind,
            rule_id,
            message.topic,
            message.payload,
            message.qos,
            now_ms,
            retained_until if expires_ms is None else min(expires_ms, retained_until),
            properties,
            receipt,
        )
        self.ledger.write(stored.id, client_id)
        # None overtakes those that were refused.
        if self._refused or not self._write(stored, kept):
            self._write_later(stored, kept)

    async def available(self) -> None:
        """Return when the store takes messages: one from RocketMQ may be kept for many thousands of sessions."""
        await self._takes.wait()

    def _write(self, message: StoredMessage, kept: Kept) -> bool:
        """Have the store keep it; return false where that takes nothing now."""
        future = self.store.add(message)
        if future.done() and _is_refused(future):
            return False
        future.add_done_callback(partial(self._written, message, kept))
        return True

    def _written(self, message: StoredMessage, kept: Kept, future: asyncio.Future[None]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is None and not future.cancelled():
            self.ledger.written(message.id)
            self.ledger.add(message.client_id)
            self._telemetry.offline.stored()
            kept(message)
            self.on_kept(message.client_id)
        elif isinstance(error, UnstorableError):
            self.ledger.written(message.id)
            logger.error("rule {}: a message for {} cannot be kept: {}", message.rule, message.client_id, error)
            kept(error)
        elif not self._closed:
            if not isinstance(error, StoreError):
                logger.opt(exception=error).error("unexpected error while keeping a message, trying again")
            self._write_later(message, kept)

    def _write_later(self, message: StoredMessage, kept: Kept) -> None:
        self._refused.append((message, kept))
        self._takes.clear()
        self._try_again_in(_RETRY_SECONDS)

    def _try_again_in(self, seconds: float) -> None:
        if self._retry is None and not self._closed:
            self._retry = asyncio.get_running_loop().call_later(seconds, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        for _ in range(_AT_ONCE):
            if not self._refused:
                self._takes.set()
                return
            if not self._write(*self._refused[0]):
                self._try_again_in(_RETRY_SECONDS)
                return
            self._refused.popleft()
        self._try_again_in(0)

    # -- out --

    async def oldest(self, client_id: str, limit: int, *, after: int = -1) -> list[MessageHead]:
        """Return the client's oldest messages that wait, at most `limit`, those with higher ids than `after`.

        That they wait is true until somebody else has a turn, and can be asked again while the ledger is `reading`.

        Raises:
            StoreError: the store cannot be read now.
        """
        return await self._waiting(partial(self.store.oldest, client_id), limit, after)

    async def oldest_overall(self, limit: int) -> list[MessageHead]:
        """Return the oldest messages that wait, of whatever client; see `oldest`."""
        return await self._waiting(self.store.oldest_overall, limit, -1)

    async def _waiting(self, read: _Read, limit: int, after: int) -> list[MessageHead]:
        """Return the first messages that wait: in pages, because thousands may be under way before them."""
        found: list[MessageHead] = []
        size = limit
        with self.ledger.reading():
            while True:
                page = await read(after=after, limit=size)
                found += page
                found = [message for message in found if self.ledger.waits(message.id)]
                if len(found) >= limit or len(page) < size:
                    return found[:limit]
                after, size = page[-1].id, _PAGE_MESSAGES

    async def end_session(self, client_id: str, *, upto: int) -> None:
        """Drop what the client's session missed, up to this id, and has not got.

        Raises:
            StoreError: the store cannot be read now.
        """
        after = -1
        while True:
            with self.ledger.reading():
                page = await self.store.missed(client_id, upto=upto, after=after, limit=_PAGE_MESSAGES)
                for message in page:
                    if self.ledger.waits(message.id):
                        self.leave(message, Ending.DROPPED, reason=DropReason.SESSION_ENDED)
            if len(page) < _PAGE_MESSAGES:
                return
            after = page[-1].id

    async def expired(self, limit: int) -> list[MessageHead]:
        """Return messages that wait and whose time is over; see `oldest`."""
        with self.ledger.reading():
            page = await self.store.expired(time.time_ns() // 1_000_000, limit)
            return [message for message in page if self.ledger.waits(message.id)]

    def leave(
        self,
        message: StoredMessage | MessageHead,
        ending: Ending,
        *,
        reason: DropReason | None = None,
        queued: bool = True,
    ) -> asyncio.Future[None]:
        """A message is done with; `reason` is why it was dropped. Return what is done when its row is deleted.

        `queued`: its sender knows that it is kept, and would wait for ever if it heard no more.
        """
        self.ledger.leave(message.id, message.client_id)
        self._telemetry.offline.left(ending)
        rule = self._telemetry.rules.get(message.rule)
        # The rule may be gone by now, and its counters with it.
        if reason is not None and rule is not None:
            rule.dropped(reason)
        if ending is Ending.DELIVERED:
            self.tell(message, Outcome.DELIVERED)
        elif queued:
            # Whatever ended it: it will never come, and that is all a sender can go by.
            self.tell(message, Outcome.EXPIRED)
        future = self.store.remove([message.id])
        future.add_done_callback(partial(self._removed, message.id))
        return future

    def _removed(self, message_id: int, future: asyncio.Future[None]) -> None:
        # Else the store is being closed, and the row stays.
        if not future.cancelled() and future.exception() is None:
            self.ledger.deleted([message_id])

    def tell(self, message: StoredMessage | MessageHead, outcome: Outcome) -> None:
        """Send a receipt, where one was asked for."""
        if message.receipt is not None:
            self._receipts.tell(
                message.rule, outcome, message.receipt, client_id=message.client_id, topic=message.topic
            )


def message_of(stored: StoredMessage, now_ms: int) -> MqttMessage:
    """Return a kept message as it is handed over now."""
    message = MqttMessage(stored.topic, stored.payload, stored.qos, clean_session=False, properties=stored.properties)
    properties = stored.properties
    if properties is None or properties.expiry_seconds is None:
        return message
    left = expiry.seconds_left(stored.stored_ms + properties.expiry_seconds * 1000, now_ms)
    return replace(message, properties=replace(properties, expiry_seconds=left))


def _is_refused(future: asyncio.Future[None]) -> bool:
    error = None if future.cancelled() else future.exception()
    return isinstance(error, StoreError) and not isinstance(error, UnstorableError)


def _nobody(_client_id: str) -> None:
    """Nobody listens."""
