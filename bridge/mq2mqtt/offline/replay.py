"""Kept messages to those who are back: in batches, oldest first, while live messages go on."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from loguru import logger

from mq2mqtt import expiry
from mq2mqtt.errors import StoreError
from mq2mqtt.host import LATE_SECONDS, Delivery, DropReason, MqttHost, Outcome
from mq2mqtt.offline.pacing import BATCH_MESSAGES, Pacer, Turns
from mq2mqtt.offline.shelf import Shelf, message_of
from mq2mqtt.store import MessageHead, MessageKind, StoredMessage
from mq2mqtt.telemetry import Ending

__all__ = ["AWAY", "Replay"]

AWAY: Final = frozenset((DropReason.NOT_PERSISTENT, DropReason.SLOW_DEVICE, DropReason.DISCONNECTED))
"""Drops that another attempt may mend; what is dropped for another reason can never be delivered."""

CONFIRM_SECONDS: Final = 5.0
"""Where nobody sees a device's acknowledgement: for so long its connection has to last after a message."""

_STANDSTILL_SECONDS = 1.0
"""A loop that was so late, because the process was stopped or starved, may not have been told yet who has gone."""
# Messages confirmed before devices get their turn: about 5 ms.
_CONFIRMED_AT_ONCE = 200

_READERS = 4
# Of a batch, before others get their turn: each reader has one, and each message takes about 0.2 ms.
_HANDED_AT_ONCE = 10
_FULL_MESSAGES = 10_000
_FULL_BYTES = 64 << 20
"""So much of all clients is handed over at a time: where all come back at once, more would only wait in the host, and
not be acknowledged in its time."""
_BATCH_BYTES = _FULL_BYTES // _READERS
"""Of payloads in one batch, or the one message that is longer: readers do not see what the others are reading."""
_RETRY_SECONDS = 1.0


class _Flight:
    """A kept message that the host has: `channel_id` is the connection that it is for."""

    __slots__ = ("batch", "channel_id", "landed", "message", "told")

    def __init__(
        self, message: StoredMessage, channel_id: str, batch: "_Batch | None", told: Callable[[Delivery], None] | None
    ) -> None:
        self.message = message
        self.channel_id = channel_id
        self.batch = batch
        self.told = told
        self.landed = False


class _Batch:
    """Messages of one client that are handed over together, up to the one with `last_id`.

    `flying` of them have not landed. `acknowledged`: some are, or are done with otherwise.
    """

    __slots__ = ("acknowledged", "flying", "last_id")

    def __init__(self, flying: int, last_id: int) -> None:
        self.flying = flying
        self.last_id = last_id
        self.acknowledged = False


class Replay:
    """Hands kept messages over to clients that are connected.

    A message leaves the store when its client has acknowledged it. On a host that does not see that, it leaves when
    the connection that it was handed to is still the same `CONFIRM_SECONDS` later, and the broker is there to tell.
    """

    def __init__(self, shelf: Shelf, host: MqttHost) -> None:
        self._shelf = shelf
        self._host = host
        self._pacer = Pacer()
        self._turns = Turns()
        self._channels: dict[str, str] = {}
        # Of clients that gave their session up: the last message that can be of that session.
        self._given_up: dict[str, int] = {}
        self._busy: set[str] = set()
        # In the order of the time at which they are confirmed; bounded by what is handed over in that time.
        self._unconfirmed: deque[tuple[float, _Flight]] = deque()  # bounded, see above
        self._unconfirmed_of: dict[str, dict[int, _Flight]] = {}
        self._confirming: asyncio.TimerHandle | None = None
        self._confirm_from = 0.0
        self._wake = asyncio.Event()
        self._landed_one = asyncio.Event()
        # What the host has said nothing about yet.
        self._handed = 0
        self._handed_bytes = 0
        self._finishing = False

    # -- who is there --

    def came(self, client_id: str, channel_id: str, *, clean_session: bool = False) -> None:
        """A client is connected. With `clean_session` it has given up what its session before missed."""
        self._channels[client_id] = channel_id
        if not self._shelf.ledger.knows(client_id):
            self._given_up.pop(client_id, None)
            self._turns.begin_anew(client_id)
        elif clean_session:
            self._given_up[client_id] = self._shelf.last_id
        self.news(client_id)

    def gone(self, client_id: str, channel_id: str) -> None:
        """A connection has ended. What it was handed and may not have got waits again."""
        if self._channels.get(client_id) == channel_id:
            del self._channels[client_id]
            self._pacer.forget(client_id)
        had = -1
        for flight in list(self._unconfirmed_of.get(client_id, {}).values()):
            if flight.channel_id == channel_id:
                had = max(had, -1 if flight.batch is None else flight.message.id)
                self._back(flight)
        if had >= 0:
            self._turns.left(client_id, last_id=had)
        elif client_id not in self._channels:
            self._turns.begin_anew(client_id)

    def news(self, client_id: str) -> None:
        """Something may wait for this client."""
        if client_id in self._channels and client_id not in self._busy and self._shelf.ledger.waiting(client_id):
            self._want(client_id)

    def _want(self, client_id: str) -> None:
        self._pacer.want(client_id, time.monotonic())
        self._wake.set()

    # -- batches --

    async def run(self) -> None:
        """Hand over until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(_READERS):
                group.create_task(self._serve(), name=f"mq2mqtt.offline.replay[{number}]")

    async def _serve(self) -> None:
        while True:
            client_id = None if self._rests else self._pacer.take_due(time.monotonic())
            if client_id is None:
                await self._pause()
            elif client_id not in self._busy:
                await self._serve_safely(client_id)

    async def _serve_safely(self, client_id: str) -> None:
        self._busy.add(client_id)
        try:
            flying = await self._hand_batch(client_id)
        except StoreError as error:
            logger.debug("kept messages cannot be read: {}", error)
            self._try_later(client_id)
        except Exception:  # noqa: BLE001 - a task's top edge: the other clients get theirs
            logger.exception("unexpected error while handing over kept messages, trying again")
            self._try_later(client_id)
        else:
            if not flying:
                self._end_batch(client_id)

    def _try_later(self, client_id: str) -> None:
        self._busy.discard(client_id)
        if client_id in self._channels:
            self._pacer.retry(client_id, time.monotonic(), delay=_RETRY_SECONDS)
        else:
            self._pacer.forget(client_id)

    def _end_batch(self, client_id: str) -> None:
        self._busy.discard(client_id)
        if client_id not in self._channels:
            self._pacer.forget(client_id)
        self.news(client_id)

    @property
    def _rests(self) -> bool:
        return self._finishing or self._handed >= _FULL_MESSAGES or self._handed_bytes >= _FULL_BYTES

    async def _pause(self) -> None:
        self._wake.clear()
        at = None if self._rests else self._pacer.next_at
        try:
            async with asyncio.timeout(None if at is None else max(0.0, at - time.monotonic())):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _hand_batch(self, client_id: str) -> bool:
        """Hand the next batch to a client; return whether there is one, that ends when all of it has landed."""
        await self._host.available()
        channel_id = self._channels.get(client_id)
        if channel_id is None:
            return False
        if (upto := self._given_up.get(client_id)) is not None:
            finds_all = not self._shelf.ledger.has_under_way(client_id)
            await self._shelf.end_session(client_id, upto=upto)
            if finds_all and self._given_up.get(client_id) == upto:
                del self._given_up[client_id]
        # In all that time messages may leave: the ledger has to know of them to the end.
        with self._shelf.ledger.reading():
            heads = await self._next(client_id)
            chosen = _first_of(heads)
            messages = await self._shelf.store.read([head.id for head in chosen]) if chosen else []
            if self._finishing or self._channels.get(client_id) != channel_id:
                return False
            if len(heads) < BATCH_MESSAGES and len(chosen) == len(heads):
                self._turns.begin_anew(client_id)
            if not messages:
                return False
            batch = _Batch(1, messages[0].id)
            await self._hand_all(messages, batch, client_id=client_id, channel_id=channel_id)
        # Some may have landed by now, with others still to come.
        self._one_landed(client_id, batch)
        return batch.flying > 0

    async def _hand_all(self, messages: list[StoredMessage], batch: _Batch, *, client_id: str, channel_id: str) -> None:
        given_up = self._given_up.get(client_id, -1)
        for number, message in enumerate(messages, 1):
            batch.last_id = message.id
            if not self._shelf.ledger.waits(message.id):
                pass  # it has left meanwhile
            elif message.kind is MessageKind.SESSION and message.id <= given_up:
                self._shelf.leave(message, Ending.DROPPED, reason=DropReason.SESSION_ENDED)
            elif expiry.is_over(message.expires_ms, time.time_ns() // 1_000_000):
                self._shelf.leave(message, Ending.EXPIRED)
            else:
                batch.flying += 1
                self._fly(_Flight(message, channel_id, batch, None))
            if number % _HANDED_AT_ONCE == 0:
                await asyncio.sleep(0)
                if self._finishing or self._channels.get(client_id) != channel_id:
                    return

    async def _next(self, client_id: str) -> list[MessageHead]:
        heads = await self._shelf.oldest(client_id, BATCH_MESSAGES, after=self._turns.after(client_id))
        if not heads and self._turns.after(client_id) >= 0:
            self._turns.begin_anew(client_id)
            heads = await self._shelf.oldest(client_id, BATCH_MESSAGES)
        return heads

    def _one_landed(self, client_id: str, batch: _Batch) -> None:
        batch.flying -= 1
        if not batch.flying:
            self._turns.ended(client_id, last_id=batch.last_id, acknowledged=batch.acknowledged)

    # -- messages --

    def hand_live(self, message: StoredMessage, told: Callable[[Delivery], None]) -> bool:
        """Hand over a message that was just kept, beside the batches; false if its client is away.

        `told` gets the outcome when the host has it: delivered, dropped for good, or queued.
        """
        channel_id = self._channels.get(message.client_id)
        if channel_id is None or self._finishing:
            return False
        self._fly(_Flight(message, channel_id, None, told))
        return True

    def _fly(self, flight: _Flight) -> None:
        message = flight.message
        self._shelf.ledger.fly(message.id, message.client_id)
        self._handed += 1
        self._handed_bytes += len(message.payload)
        now_ms = time.time_ns() // 1_000_000
        self._host.deliver(
            message.client_id, message_of(message, now_ms), partial(self._settled, flight), handed=_nothing
        )

    def _settled(self, flight: _Flight, delivery: Delivery) -> None:
        rested = self._rests
        self._handed -= 1
        self._handed_bytes -= len(flight.message.payload)
        if rested:
            self._wake.set()
        if delivery.outcome is Outcome.DELIVERED:
            if flight.told is not None:
                flight.told(delivery)
            if self._host.sees_acknowledgements:
                self._leave(flight, Ending.DELIVERED)
            elif self._channels.get(flight.message.client_id) == flight.channel_id:
                self._wait_for_confirmation(flight)
            else:
                self._back(flight)
        elif delivery.reason is None or delivery.reason in AWAY:
            self._back(flight)
            if flight.told is not None:
                flight.told(Delivery(Outcome.QUEUED))
        else:
            self._leave(flight, Ending.DROPPED, reason=delivery.reason)
            if flight.told is not None:
                flight.told(delivery)

    def _wait_for_confirmation(self, flight: _Flight) -> None:
        at = asyncio.get_running_loop().time() + CONFIRM_SECONDS
        self._unconfirmed.append((at, flight))
        self._unconfirmed_of.setdefault(flight.message.client_id, {})[flight.message.id] = flight
        self._landed_one.set()
        if self._confirming is None:
            self._confirm_at(at)

    def _confirm_at(self, at: float) -> None:
        self._confirming = asyncio.get_running_loop().call_at(at, self._confirm, at)

    def _confirm(self, due: float) -> None:
        now = asyncio.get_running_loop().time()
        self._confirming = None
        stood_still = now - due > _STANDSTILL_SECONDS
        if self._unconfirmed and (stood_still or self._host.problem is not None):
            # Which connections have ended is told when the broker is there again, or this process.
            self._confirm_from = now + CONFIRM_SECONDS
            self._confirm_at(now + CONFIRM_SECONDS / 5)
            return
        # It may have ended, and nobody has said so yet.
        late = LATE_SECONDS if self._host.hears_late else 0.0
        for _ in range(_CONFIRMED_AT_ONCE):
            if not self._unconfirmed:
                return
            at, flight = self._unconfirmed[0]
            at = max(at, self._confirm_from) + late
            if not flight.landed and at > now:
                self._confirm_at(min(at, now + CONFIRM_SECONDS))
                return
            self._unconfirmed.popleft()
            if not flight.landed:
                self._leave(flight, Ending.DELIVERED)
        self._confirm_at(now)

    def _leave(self, flight: _Flight, ending: Ending, *, reason: DropReason | None = None) -> None:
        # One that was never told to be kept is dropped as if it had not been.
        self._shelf.leave(flight.message, ending, reason=reason, queued=flight.told is None)
        if flight.batch is not None:
            flight.batch.acknowledged = True
        self._land(flight)

    def _back(self, flight: _Flight) -> None:
        """It was not delivered: it waits again."""
        self._shelf.ledger.land(flight.message.id)
        if flight.told is not None:
            self._shelf.tell(flight.message, Outcome.QUEUED)
        self._land(flight)

    def _land(self, flight: _Flight) -> None:
        flight.landed = True
        client_id, batch = flight.message.client_id, flight.batch
        unconfirmed = self._unconfirmed_of.get(client_id)
        if unconfirmed is not None:
            unconfirmed.pop(flight.message.id, None)
            if not unconfirmed:
                del self._unconfirmed_of[client_id]
        if batch is not None:
            self._one_landed(client_id, batch)
            if not batch.flying:
                self._end_batch(client_id)
        else:
            self.news(client_id)
        self._landed_one.set()

    # -- the end --

    def finish(self) -> None:
        """Hand nothing more over. Idempotent."""
        self._finishing = True
        self._wake.set()

    async def landed(self) -> None:
        """Return when the hosts have said what became of everything that they were handed."""
        while self._handed:
            self._landed_one.clear()
            await self._landed_one.wait()

    def close(self) -> None:
        """Confirm nothing more: what is not confirmed is handed over again after the next start."""
        if self._confirming is not None:
            self._confirming.cancel()


def _first_of(heads: list[MessageHead]) -> list[MessageHead]:
    """Return the first of them: those whose payloads have `_BATCH_BYTES` together, and at least one."""
    size = 0
    for number, head in enumerate(heads):
        size += head.size
        if size > _BATCH_BYTES and number > 0:
            return heads[:number]
    return heads


def _nothing() -> None:
    """Latency is that of live messages."""
