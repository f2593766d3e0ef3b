"""From a rule's lane into RocketMQ: at least once, in order per client, one rule never waiting for another.

Order: a client's messages go to one queue (a hash of the client id over the route's sorted queues), and a queue has one
batch in flight. When the route changes, nothing moves before what is in flight is settled (design section 2).
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

from loguru import logger

from mq2mqtt.errors import BridgeError, LaneError, LinkError, MessageRejectedError, UnmappableMessageError
from mq2mqtt.link import Queue, RocketLink
from mq2mqtt.mapping import to_rocketmq
from mq2mqtt.message import RocketMessage
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.parked import ParkedStore
from mq2mqtt.spool.reader import MAX_AHEAD, Entry, LaneReader
from mq2mqtt.telemetry import RuleTelemetry, Trouble

__all__ = ["Uplink"]

AHEAD_BYTES = 32 * 1024 * 1024
# One step reads and maps this many messages, then lets the loop run: about 2 ms.
STEP_MESSAGES = 256
BATCH_MESSAGES = 512
BATCH_BYTES = 512 * 1024
# What a stored message needs besides its body: the five properties, the key, the record's own fields.
_OVERHEAD_BYTES = 400
PROBE_SECONDS = 2.0
_BACKOFF_FIRST = 0.1
_BACKOFF_MAX = 2.0


class _Item(NamedTuple):
    """A frame on its way: `message`, or why it can't be one."""

    entry: Entry
    message: RocketMessage | None
    refusal: str = ""


class _Backoff:
    """When to try again after failures in a row: jittered, doubling, at most `_BACKOFF_MAX` seconds."""

    __slots__ = ("_delay", "until")

    def __init__(self) -> None:
        self._delay = _BACKOFF_FIRST
        self.until = 0.0

    def failed(self) -> None:
        self.until = time.monotonic() + self._delay * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
        self._delay = min(self._delay * 2, _BACKOFF_MAX)


class Uplink:
    """Sends one rule's lane to the RocketMQ topic `target`.

    `run` ends after `finish`, once nothing is in flight.
    """

    def __init__(  # noqa: PLR0913 - the composition root names each
        self,
        *,
        target: str,
        node: str,
        lane: Lane,
        reader: LaneReader,
        parked: ParkedStore,
        link: RocketLink,
        telemetry: RuleTelemetry,
    ) -> None:
        self.rule_id = telemetry.rule_id
        self.target = target
        self._node = node
        self._lane = lane
        self._reader = reader
        self._parked = parked
        self._link = link
        self._telemetry = telemetry
        self._queues: tuple[Queue, ...] = ()
        self._queue_of: dict[str, Queue] = {}
        self._ready: dict[Queue, deque[_Item]] = {}
        self._ready_bytes = 0
        self._busy: dict[Queue, asyncio.Task[None]] = {}
        self._backoff: dict[Queue | None, _Backoff] = {}
        self._wake = asyncio.Event()
        self._probe: asyncio.Task[None] | None = None
        self._probe_at = 0.0
        self._finishing = False

    def retarget(self, target: str) -> None:
        """Send what waits to another RocketMQ topic, after what is in flight has its answer."""
        self.target = target
        self._backoff.pop(None, None)
        self._wake.set()

    def finish(self) -> None:
        """Send nothing new; `run` ends when the batches in flight have their answers. Idempotent."""
        self._finishing = True
        self._wake.set()

    async def run(self) -> None:
        """Send until `finish`; on cancellation what is in flight is abandoned and will be sent again."""
        self._lane.watch(self._wake.set)
        try:
            while not (self._finishing and not self._busy):
                self._wake.clear()
                try:
                    more = await self._step()
                except BridgeError as error:
                    self._failed(None, error)
                    more = False
                except Exception:  # noqa: BLE001 - a task's top edge: one rule's bug must not stop the others
                    logger.exception("rule {}: unexpected error, trying again", self.rule_id)
                    self._failed(None, LinkError("internal error, see the log"))
                    more = False
                await (asyncio.sleep(0) if more else self._pause())
        finally:
            self._lane.watch(None)
            for task in (*self._busy.values(), *([self._probe] if self._probe else ())):
                task.cancel()

    async def _step(self) -> bool:
        """Do what can be done now; return whether there is more to do at once."""
        if self._finishing or self._waits(None):
            return False
        target = self.target
        queues = await self._link.queues(target)
        if queues != self._queues and self._busy:
            await asyncio.wait(self._busy.values())
        if target != self.target:
            return True
        if queues != self._queues:
            self._reroute(queues)
        self._recovered(None, proven=False)
        more = self._fill()
        self._dispatch()
        self._probe_when_idle()
        return more

    async def _pause(self) -> None:
        """Wait for news from the lane or a batch, at most until something is due by time."""
        now = time.monotonic()
        due = [backoff.until for backoff in self._backoff.values() if backoff.until > now]
        due.append(max(self._probe_at, now + 0.05))
        timer = asyncio.get_running_loop().call_later(min(due) - now, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

    def _fill(self) -> bool:
        """Read and map the next messages; return whether more may be waiting."""
        entries = self._reader.read(max_messages=STEP_MESSAGES, max_bytes=AHEAD_BYTES - self._ready_bytes)
        for entry in entries:
            self._put(self._map(entry))
        return len(entries) == STEP_MESSAGES

    def _map(self, entry: Entry) -> _Item:
        try:
            message = to_rocketmq(
                entry.frame, node=self._node, rule_id=self.rule_id, offset=entry.offset, topic=self.target
            )
        except UnmappableMessageError as error:
            return _Item(entry, None, error.reason)
        return _Item(entry, message)

    def _put(self, item: _Item) -> None:
        client_id = item.entry.frame.client_id
        queue = self._queue_of.get(client_id)
        if queue is None:
            if len(self._queue_of) >= MAX_AHEAD:
                self._queue_of.clear()
            queue = self._queues[crc32(client_id.encode("utf-8", "surrogateescape")) % len(self._queues)]
            self._queue_of[client_id] = queue
        self._ready[queue].append(item)
        self._ready_bytes += len(item.entry.frame.payload) + _OVERHEAD_BYTES

    def _reroute(self, queues: tuple[Queue, ...]) -> None:
        """Spread what waits over the new queues, maybe of another topic; nothing is in flight."""
        waiting = sorted((item for items in self._ready.values() for item in items), key=lambda item: item.entry.offset)
        self._queues = queues
        self._queue_of.clear()
        self._ready = {queue: deque() for queue in queues}  # bounded by the reader: MAX_AHEAD
        self._ready_bytes = 0
        self._backoff = {}
        for item in waiting:
            self._put(self._map(item.entry))

    def _dispatch(self) -> None:
        """Start a batch on every queue that has messages, is idle and not in backoff."""
        for queue, items in self._ready.items():
            if items and queue not in self._busy and not self._waits(queue):
                batch = self._take(items)
                self._telemetry.in_flight += len(batch)
                task = asyncio.create_task(self._send(queue, batch), name=f"mq2mqtt.uplink[{self.rule_id}].send")
                self._busy[queue] = task

    def _take(self, items: deque[_Item]) -> list[_Item]:
        batch: list[_Item] = []
        size = 0
        while items and len(batch) < BATCH_MESSAGES:
            needs = len(items[0].entry.frame.payload) + _OVERHEAD_BYTES
            if batch and (size + needs > BATCH_BYTES or items[0].message is None or batch[-1].message is None):
                break
            size += needs
            batch.append(items.popleft())
        self._ready_bytes -= size
        return batch

    async def _send(self, queue: Queue, batch: list[_Item]) -> None:
        """Send `batch` to `queue`; what is neither stored nor parked goes back to the head of the queue."""
        taken = len(batch)
        try:
            await self._store(queue, batch)
            self._recovered(queue, proven=True)
        except BridgeError as error:
            self._failed(queue, error)
        except Exception:  # noqa: BLE001 - a task's top edge: one rule's bug must not stop the others
            logger.exception("rule {}: unexpected error while sending, trying again", self.rule_id)
            self._failed(queue, LinkError("internal error, see the log"))
        finally:
            self._telemetry.in_flight -= taken
            self._ready[queue].extendleft(reversed(batch))
            self._ready_bytes += sum(len(item.entry.frame.payload) + _OVERHEAD_BYTES for item in batch)
            self._busy.pop(queue, None)
            self._wake.set()

    async def _store(self, queue: Queue, items: list[_Item]) -> None:
        """Store `items`, taking out of the list what is done; a batch that is refused is halved to find the culprit."""
        size = len(items)
        while items:
            part = items[:size]
            try:
                await self._store_part(queue, part)
            except MessageRejectedError as error:
                if len(part) > 1:
                    size = len(part) // 2
                    continue
                self._park(part[0], str(error))
                size = len(items)
            del items[: len(part)]

    async def _store_part(self, queue: Queue, part: Sequence[_Item]) -> None:
        messages = [item.message for item in part if item.message is not None]
        if not messages:
            self._park(part[0], part[0].refusal)
            return
        await self._link.send(queue, messages)
        self._telemetry.sent([item.entry.frame.accepted_us for item in part])
        self._reader.settle([item.entry.offset for item in part])

    def _park(self, item: _Item, reason: str) -> None:
        evicted = self._parked.append(item.entry.frame, key=str(item.entry.offset), reason=reason)
        self._telemetry.parked(f"offset {item.entry.offset}", reason, evicted=evicted)
        self._reader.settle([item.entry.offset])

    def _waits(self, queue: Queue | None) -> bool:
        backoff = self._backoff.get(queue)
        return backoff is not None and backoff.until > time.monotonic()

    def _failed(self, queue: Queue | None, error: BridgeError) -> None:
        self._backoff.setdefault(queue, _Backoff()).failed()
        self._telemetry.rule_down(Trouble.LINK, str(error))
        if isinstance(error, LaneError):
            logger.error("rule {}: {}", self.rule_id, error)

    def _recovered(self, queue: Queue | None, *, proven: bool) -> None:
        self._backoff.pop(queue, None)
        if proven and not self._backoff:
            self._probe_at = time.monotonic() + PROBE_SECONDS
            self._telemetry.rule_up(Trouble.LINK)

    def _probe_when_idle(self) -> None:
        """An idle rule proves itself every 2 s (design section 7.4); one with messages does by sending them."""
        if self._busy or self._probe is not None or time.monotonic() < self._probe_at:
            return
        self._probe = asyncio.create_task(self._prove(), name=f"mq2mqtt.uplink[{self.rule_id}].probe")

    async def _prove(self) -> None:
        try:
            await self._link.probe(self.target)
        except BridgeError as error:
            self._failed(None, error)
        else:
            self._recovered(None, proven=True)
        finally:
            self._probe_at = time.monotonic() + PROBE_SECONDS
            self._probe = None
