"""From a rule's lane into RocketMQ: at least once, in order per client, one rule never waiting for another.

Order: a client's messages go to one queue (a hash of the client id over the route's sorted queues), and a queue has one
batch in flight. When the route changes, nothing moves before what is in flight is settled (design section 2). Of a
publish whose client nobody knows, the MQTT topic takes the client id's place.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final, Literal
from zlib import crc32

from loguru import logger

from mq2mqtt.errors import BridgeError, LaneError, LinkError, MessageRejectedError, UnmappableMessageError
from mq2mqtt.link import Queue, RocketLink
from mq2mqtt.mapping import OutboundMapper
from mq2mqtt.message import RocketBatch
from mq2mqtt.spool.frame import Frame
from mq2mqtt.spool.parked import ParkedStore
from mq2mqtt.spool.reader import MAX_AHEAD, Entry, LaneReader, ReadableLane
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
# A send costs as much as 20 messages: where more than so many come in a while, each queue collects them for so long, or
# so many. Below that there is CPU enough, and collecting would only make each message late.
_CLOSE_MESSAGES = 200
_CLOSE_SECONDS = 0.1
_LINGER_SECONDS = 0.01
_ENOUGH_MESSAGES = 32
_BACKOFF_FIRST = 0.1
_BACKOFF_MAX = 2.0
_LANE: Final = "lane"

_Part = Queue | Literal["lane"] | None
"""What fails and recovers by itself: a queue, reading the lane, or (`None`) the topic as a whole."""


class _Backoff:
    """When to try again after failures in a row: jittered, doubling, at most `_BACKOFF_MAX` seconds."""

    __slots__ = ("_delay", "reason", "until")

    def __init__(self) -> None:
        self._delay = _BACKOFF_FIRST
        self.reason = ""
        self.until = 0.0

    def failed(self, reason: str) -> None:
        self.reason = reason
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
        lane: ReadableLane,
        reader: LaneReader,
        parked: ParkedStore,
        link: RocketLink,
        telemetry: RuleTelemetry,
    ) -> None:
        self.rule_id = telemetry.rule_id
        self.target = target
        self._mapper = OutboundMapper(node=node, rule_id=telemetry.rule_id)
        self._lane = lane
        self._reader = reader
        self._parked = parked
        self._link = link
        self._telemetry = telemetry
        self._queues: tuple[Queue, ...] = ()
        self._ready: dict[Queue, deque[Entry]] = {}
        self._ready_of: dict[str, deque[Entry]] = {}  # by client id, or topic
        self._ready_bytes = 0
        self._busy: dict[Queue, asyncio.Task[None]] = {}
        self._lingers_until: dict[Queue, float] = {}
        self._lingering_until: list[float] = []
        self._counted = 0  # messages sent since `_counts_since`
        self._counts_since = 0.0
        self._come_closely = False
        self._backoff: dict[_Part, _Backoff] = {}
        self._wake = asyncio.Event()
        self._probe: asyncio.Task[None] | None = None
        self._probe_at = 0.0
        self._finishing = False

    def retarget(self, target: str) -> None:
        """Send what waits to another RocketMQ topic, after what is in flight has its answer."""
        self.target = target
        self._backoff.pop(None, None)
        self._probe_at = 0.0
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
        self._lingering_until = []
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
        # With a backlog, batches are filled before they are sent: a batch costs as much as dozens of messages.
        self._dispatch(at_least=min(BATCH_MESSAGES, max(1, MAX_AHEAD // (2 * len(queues)))) if more else 1)
        self._probe_when_idle()
        return more

    async def _pause(self) -> None:
        """Wait for news from the lane or a batch, at most until something is due by time."""
        now = time.monotonic()
        due = [backoff.until for backoff in self._backoff.values() if backoff.until > now]
        # Also what fell due since `_dispatch` left it.
        due += self._lingering_until
        if not (self._busy or self._probe or self._waits(None)):
            due.append(max(self._probe_at, now + 0.05))
        # Batches and probes wake it when they end.
        timer = asyncio.get_running_loop().call_later(min(due, default=now + PROBE_SECONDS) - now, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

    def _fill(self) -> bool:
        """Read the next messages; return whether more may be waiting.

        A lane that cannot be read on holds up nothing that was read before.
        """
        if self._waits(_LANE):
            return False
        try:
            entries = self._reader.read(max_messages=STEP_MESSAGES, max_bytes=AHEAD_BYTES - self._ready_bytes)
        except LaneError as error:
            self._failed(_LANE, error)
            return False
        if entries or (self._reader.ahead < MAX_AHEAD and self._ready_bytes < AHEAD_BYTES):
            self._recovered(_LANE, proven=False)
        self._put(entries)
        return len(entries) == STEP_MESSAGES

    def _put(self, entries: Iterable[Entry]) -> None:
        """Have `entries` wait for their clients' queues."""
        ready_of = self._ready_of
        for entry in entries:
            name = entry.frame.client_id or entry.frame.topic
            ready = ready_of.get(name)
            if ready is None:
                if len(ready_of) >= MAX_AHEAD:
                    ready_of.clear()
                ready = ready_of[name] = self._ready[_queue_of(name, self._queues)]
            ready.append(entry)
            self._ready_bytes += len(entry.frame.payload) + _OVERHEAD_BYTES

    def _reroute(self, queues: tuple[Queue, ...]) -> None:
        """Spread what waits over the new queues, maybe of another topic; nothing is in flight."""
        waiting = sorted(entry for ready in self._ready.values() for entry in ready)
        self._queues = queues
        self._ready_of.clear()
        self._ready = {queue: deque() for queue in queues}  # bounded by the reader: MAX_AHEAD
        self._ready_bytes = 0
        self._backoff = {}
        self._lingers_until = {}
        self._put(waiting)

    def _dispatch(self, *, at_least: int) -> None:
        """Start a batch on every queue that has `at_least` so many messages, is idle and not in backoff."""
        now = time.monotonic()
        self._look_how_closely(now)
        self._lingering_until = []
        for queue, ready in self._ready.items():
            if len(ready) < at_least or queue in self._busy or self._waits(queue):
                continue
            until = self._lingers_until.get(queue, now)
            if len(ready) < _ENOUGH_MESSAGES and until > now:
                self._lingering_until.append(until)
                continue
            batch = self._take(ready)
            self._counted += len(batch)
            self._lingers_until[queue] = now + _LINGER_SECONDS if self._come_closely else now
            self._telemetry.in_flight += len(batch)
            task = asyncio.create_task(self._send(queue, batch), name=f"mq2mqtt.uplink[{self.rule_id}].send")
            self._busy[queue] = task

    def _look_how_closely(self, now: float) -> None:
        """Find out now and then whether messages come so closely that they are to wait for each other."""
        seconds = now - self._counts_since
        if seconds >= _CLOSE_SECONDS:
            self._come_closely = self._counted * _CLOSE_SECONDS > _CLOSE_MESSAGES * seconds
            self._counted, self._counts_since = 0, now

    def _take(self, ready: deque[Entry]) -> list[Entry]:
        batch = list(islice(ready, BATCH_MESSAGES))
        size = _weight(batch)
        while size > BATCH_BYTES and len(batch) > 1:
            size -= _weight([batch.pop()])
        for _ in batch:
            ready.popleft()
        self._ready_bytes -= size
        return batch

    async def _send(self, queue: Queue, batch: list[Entry]) -> None:
        """Send `batch` to `queue`; what is neither stored nor parked goes back to the head of the queue."""
        taken = len(batch)
        refused: list[tuple[Entry, str]] = []
        try:
            messages = self._map(queue.topic, batch, refused)
            await self._store(queue, batch, messages)
            while refused:
                self._park(*refused[-1])
                refused.pop()
            self._recovered(queue, proven=queue.topic == self.target)
        except BridgeError as error:
            self._failed(queue, error)
        except Exception:  # noqa: BLE001 - a task's top edge: one rule's bug must not stop the others
            logger.exception("rule {}: unexpected error while sending, trying again", self.rule_id)
            self._failed(queue, LinkError("internal error, see the log"))
        finally:
            self._telemetry.in_flight -= taken
            left = sorted([*batch, *(entry for entry, _ in refused)])
            self._ready[queue].extendleft(reversed(left))
            self._ready_bytes += _weight(left)
            self._busy.pop(queue, None)
            self._wake.set()

    def _map(self, topic: str, batch: list[Entry], refused: list[tuple[Entry, str]]) -> RocketBatch:
        """Map `batch`; move out of it into `refused`, with the reason, what RocketMQ cannot carry."""
        bodies: list[bytes] = []
        property_texts: list[str] = []
        to_wire = self._mapper.map
        for entry in batch:
            offset, frame = entry
            try:
                body, property_text = to_wire(frame, offset)
            except UnmappableMessageError as error:
                refused.append((entry, error.reason))
                continue
            bodies.append(body)
            property_texts.append(property_text)
        for entry, _ in refused:
            batch.remove(entry)
        return RocketBatch(topic, bodies, property_texts)

    async def _store(self, queue: Queue, batch: list[Entry], messages: RocketBatch) -> None:
        """Store `messages`, taking out of `batch` what is done; what is refused is halved to find the culprit."""
        size = len(batch)
        while batch:
            part = messages[:size]
            done = batch[: len(part)]
            try:
                await self._link.send(queue, part)
            except MessageRejectedError as error:
                if len(part) > 1:
                    size = len(part) // 2
                    continue
                self._park(done[0], str(error))
                size = len(batch)
            else:
                self._telemetry.sent([entry.frame.accepted_us for entry in done])
                self._reader.settle([entry.offset for entry in done])
            del batch[: len(part)]
            messages = messages[len(part) :]

    async def send_again(self, frame: Frame, offset: int) -> None:
        """Send one message that is in the lane no more, under the key that it had there; return when it is stored.

        Raises:
            UnmappableMessageError: RocketMQ cannot carry it.
            MessageRejectedError: RocketMQ calls it illegal.
            LinkError: try again later.
        """
        target = self.target
        body, property_text = self._mapper.map(frame, offset)
        queue = _queue_of(frame.client_id or frame.topic, await self._link.queues(target))
        await self._link.send(queue, RocketBatch(target, [body], [property_text]))

    def _park(self, entry: Entry, reason: str) -> None:
        evicted = self._parked.append(entry.frame, key=str(entry.offset), reason=reason)
        self._telemetry.parked(f"offset {entry.offset}", reason, evicted=evicted)
        self._reader.settle([entry.offset])

    def _waits(self, part: _Part) -> bool:
        backoff = self._backoff.get(part)
        return backoff is not None and backoff.until > time.monotonic()

    def _failed(self, part: _Part, error: BridgeError) -> None:
        backoff = self._backoff.setdefault(part, _Backoff())
        reason = str(error)
        if isinstance(error, LaneError) and reason != backoff.reason:
            logger.error("rule {}: {}", self.rule_id, reason)
        backoff.failed(reason)
        # A batch that is late says nothing of the topic that messages go to by now.
        if not isinstance(part, Queue) or part.topic == self.target:
            self._telemetry.rule_down(Trouble.LINK, reason)

    def _recovered(self, part: _Part, *, proven: bool) -> None:
        self._backoff.pop(part, None)
        if proven and not self._backoff:
            self._probe_at = time.monotonic() + PROBE_SECONDS
            self._telemetry.rule_up(Trouble.LINK)

    def _probe_when_idle(self) -> None:
        """An idle rule proves itself every 2 s (design section 7.4); one with messages does by sending them."""
        if self._busy or self._probe is not None or time.monotonic() < self._probe_at:
            return
        self._probe = asyncio.create_task(self._prove(), name=f"mq2mqtt.uplink[{self.rule_id}].probe")

    async def _prove(self) -> None:
        target = self.target
        problem: BridgeError | None = None
        try:
            await self._link.probe(target)
        except BridgeError as error:
            problem = error
        finally:
            self._probe = None
            self._wake.set()
            if target == self.target:
                self._probe_at = time.monotonic() + PROBE_SECONDS
        if target != self.target:
            # It says nothing of the topic that messages go to by now.
            return
        if problem is not None:
            self._failed(None, problem)
        else:
            self._recovered(None, proven=True)


def _queue_of(name: str, queues: Sequence[Queue]) -> Queue:
    """Return the queue of the client, or topic, with this name."""
    return queues[crc32(name.encode("utf-8", "surrogateescape")) % len(queues)]


def _weight(entries: list[Entry]) -> int:
    """Return about how many bytes `entries` take on their way."""
    return sum([len(entry.frame.payload) for entry in entries]) + _OVERHEAD_BYTES * len(entries)
