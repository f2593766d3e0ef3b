"""What one connection is to receive from the bridge: queue, window, packet identifiers, timeouts.

amqtt's `mqtt_publish` costs a task and a timer for each message, and a device that does not acknowledge holds them
for 5 s each. Here a message costs one entry, and a connection one timer.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Final, cast

from amqtt.session import Session

from mq2mqtt.host import DELIVERY_TIMEOUT, DropReason, Outcome
from mq2mqtt_amqtt.fanout import Parcel
from mq2mqtt_amqtt.packets import PUBREL, acknowledgement
from mq2mqtt_amqtt.wire import BUFFER_HIGH, Wire

__all__ = ["Outbox"]

WINDOW: Final = 100
"""Unacknowledged QoS 1 and 2 messages on a connection.

More would only wait in the device's socket. One that timed out keeps its place until the device acknowledges it, or one
that was sent later: then it is left out. And where all of them timed out, the next one takes the place of the oldest.
"""

MAX_LEFT_OUT: Final = 10_000
"""Messages that a device has left out: it acknowledges those before and after them. They may be too long for it.

They keep their packet identifiers until the connection ends, which is at once where there are more: the device may
still acknowledge them, and another message under the same identifier would be taken for acknowledged.
"""

MAX_UNSETTLED: Final = 10_000
"""Entries of a connection's queue; they share their payloads with those of other receivers."""

STUCK_UNSETTLED: Final = 250
"""A quarter of the 1000 messages of a RocketMQ queue that the bridge holds unsettled (design section 2).

Each message to a device that has stopped reading would hold its place there for 5 s, and a few hundred of them the
messages for everybody else. So a device with more than this, and without an acknowledgement or a byte taken for
`STUCK_SECONDS`, keeps that many and gets nothing more queued until it moves again. What the store can keep for it goes
there, all of it and in its order: what is older has to be there before what is newer.
"""

STUCK_SECONDS: Final = 1.0

_LOOKS: Final = 4
"""So many looks in `STUCK_SECONDS`: where the machine holds up the bridge itself, for however long, that is one."""


class Outbox:
    """Sends parcels in the order of `send`, and settles each at the latest `DELIVERY_TIMEOUT` after it.

    Its unacknowledged packet identifiers stand in `session.inflight_out` too, where amqtt looks for free ones;
    `close` takes them out again, so that amqtt never sends anything of ours a second time.
    """

    def __init__(self, *, wire: Wire, session: Session, client_id: str, fail: Callable[[str], None]) -> None:
        self._wire = wire
        self._session = session
        self._client_id = client_id
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Parcel] = deque()  # bounded by MAX_UNSETTLED; dead entries leave from its head
        self._unsettled: OrderedDict[Parcel, None] = OrderedDict()  # in the order of their deadlines
        # In the order in which they were written; `_alive` of them have not timed out.
        self._in_flight: dict[int, tuple[Parcel, int]] = {}
        self._alive = 0
        self._left_out: dict[int, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._look_timer: asyncio.TimerHandle | None = None
        self._draining: asyncio.Task[None] | None = None
        self._written = 0
        self._drained_mark = 0
        self._looks_in_vain = 0
        self._refuses_kept_until = 0.0
        self._closed = False

    def send(self, parcel: Parcel) -> None:
        """Queue `parcel`, or settle it at once when the connection is closed or stuck."""
        if self._closed:
            parcel.settle(Outcome.DROPPED, DropReason.DISCONNECTED)
            return
        if parcel.ready and not self._queue and self._may_pass(parcel):
            self._write(parcel)
            return
        if self._refuses(parcel):
            parcel.settle(Outcome.DROPPED, DropReason.SLOW_DEVICE)
            return
        parcel.deadline = self._loop.time() + DELIVERY_TIMEOUT
        self._unsettled[parcel] = None
        self._queue.append(parcel)
        if self._timer is None:
            self._timer = self._loop.call_at(parcel.deadline, self._expire)
        if len(self._unsettled) > STUCK_UNSETTLED and self._look_timer is None:
            self._look_later()
        self.pump()

    def _refuses(self, parcel: Parcel) -> bool:
        """Whether there is no room for `parcel`. No older one that is kept then waits any more."""
        if parcel.kept and self._loop.time() < self._refuses_kept_until and self._stuck():
            return True
        waiting = len(self._unsettled)
        if waiting < MAX_UNSETTLED and (waiting < STUCK_UNSETTLED or not self._stuck()):
            return False
        if parcel.kept:
            self._give_up_kept()
        return True

    def _may_pass(self, parcel: Parcel) -> bool:
        """Whether a message that nobody acknowledges can be written without being queued."""
        frame = parcel.frame
        return frame is not None and not frame.qos and self._draining is None and self._wire.buffered <= BUFFER_HIGH

    def discard(self, parcel: Parcel, reason: DropReason) -> None:
        """Settle a parcel that must not be sent after all."""
        self._unsettled.pop(parcel, None)
        parcel.settle(Outcome.DROPPED, reason)
        self.pump()

    def pump(self) -> None:
        """Write what may be written now."""
        queue = self._queue
        while queue:
            parcel = queue[0]
            if parcel.frame is None:
                queue.popleft()
                continue
            if not parcel.ready or self._draining is not None:
                return
            full = parcel.frame.qos > 0 and len(self._in_flight) >= WINDOW
            if full and self._alive:
                return
            if self._wire.buffered > BUFFER_HIGH:
                self._draining = asyncio.create_task(self._drain(), name=f"mq2mqtt.drain[{self._client_id}]")
                return
            queue.popleft()
            if full:
                self._leave_out(next(iter(self._in_flight)))
            self._write(parcel)

    def _write(self, parcel: Parcel) -> None:
        frame = parcel.frame
        assert frame is not None  # noqa: S101 - only live parcels come here
        number = 0
        if frame.qos:
            number = self._session.next_packet_id
            self._in_flight[number] = (parcel, frame.qos)
            self._alive += 1
            parcel.written = True
            # amqtt only ever looks at the keys, unless it finds entries there when a session resumes: see `close`.
            self._session.inflight_out[number] = cast("Any", parcel)
        data = frame.encode(number)
        self._wire.write(data)
        self._written += len(data)
        parcel.fanout.handed()
        if not frame.qos:
            self._unsettled.pop(parcel, None)
            parcel.settle(Outcome.DELIVERED)

    async def _drain(self) -> None:
        await self._wire.drained()
        self._draining = None
        self._progress()
        self.pump()

    def acknowledged(self, number: int, *, qos: int) -> bool:
        """PUBACK (`qos` 1) or PUBCOMP (`qos` 2) came; false when the packet identifier is none of ours."""
        if self._left_out.get(number) == qos:
            del self._left_out[number]
            self._session.inflight_out.pop(number, None)
            return True
        entry = self._in_flight.get(number)
        if entry is None or entry[1] != qos:
            return False
        parcel = entry[0]
        self._leave_out_before(number)
        del self._in_flight[number]
        self._session.inflight_out.pop(number, None)
        if not parcel.settled:
            self._alive -= 1
        self._unsettled.pop(parcel, None)
        self._progress()
        parcel.settle(Outcome.DELIVERED)
        self.pump()
        return True

    def _leave_out_before(self, number: int) -> None:
        """Leave out what has timed out and was written before this one (MQTT-4.6.0-2: devices answer in order)."""
        while (other := next(iter(self._in_flight))) != number and self._in_flight[other][0].settled:
            self._leave_out(other)

    def _leave_out(self, number: int) -> None:
        _, self._left_out[number] = self._in_flight.pop(number)
        # Nothing of the message is to stay in memory.
        self._session.inflight_out[number] = cast("Any", None)
        if len(self._left_out) > MAX_LEFT_OUT:
            self._fail(f"it has not acknowledged {len(self._left_out)} messages")

    def received(self, number: int) -> bool:
        """PUBREC came: answer PUBREL, also for a message that has timed out; false when it is none of ours."""
        entry = self._in_flight.get(number)
        qos = self._left_out.get(number) if entry is None else entry[1]
        if qos is None or qos == 1:
            return False
        self._progress()
        self._wire.write(acknowledgement(PUBREL, number))
        return True

    def _progress(self) -> None:
        self._looks_in_vain = 0
        self._refuses_kept_until = 0.0

    def _stuck(self) -> bool:
        """Whether nothing has moved for a while, as seen by acknowledgements and by the write buffer.

        A device that was idle is not stuck: what has just been written to it, and taken, counts.
        """
        drained = self._written - self._wire.buffered
        if drained > self._drained_mark:
            self._drained_mark = drained
            self._progress()
        return self._looks_in_vain > _LOOKS

    def _look_later(self) -> None:
        self._look_timer = self._loop.call_later(STUCK_SECONDS / _LOOKS, self._look)

    def _look(self) -> None:
        """Look whether the device is stuck; then shed what there is too much of.

        A burst fills the window of each RocketMQ queue sooner than that shows.
        """
        self._look_timer = None
        if len(self._unsettled) <= STUCK_UNSETTLED:
            return
        self._looks_in_vain += 1
        if self._stuck():
            self._shed()
        else:
            self._look_later()

    def _shed(self) -> None:
        """Give up what is kept, and what was queued beyond `STUCK_UNSETTLED` before that showed."""
        self._give_up_kept()
        while len(self._unsettled) > STUCK_UNSETTLED:
            # The newest: they are behind the window, so no packet identifier is theirs.
            parcel, _ = self._unsettled.popitem()
            parcel.settle(Outcome.DROPPED, DropReason.SLOW_DEVICE)
        self._drop_dead()

    def _give_up_kept(self) -> None:
        """Settle, oldest first, what is kept for the device when it does not get it: the store goes by that order.

        Until the device moves, or another attempt is due, newer ones follow at once.
        """
        for parcel in [parcel for parcel in self._unsettled if parcel.kept]:
            del self._unsettled[parcel]
            if parcel.written:
                self._alive -= 1
            parcel.settle(Outcome.DROPPED, DropReason.SLOW_DEVICE)
        self._drop_dead()
        self._refuses_kept_until = self._loop.time() + DELIVERY_TIMEOUT

    def _drop_dead(self) -> None:
        self._queue = deque(parcel for parcel in self._queue if parcel.frame is not None)  # bounded: shrinks

    def _expire(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._unsettled:
            parcel = next(iter(self._unsettled))
            if parcel.deadline > now:
                self._timer = self._loop.call_at(parcel.deadline, self._expire)
                break
            del self._unsettled[parcel]
            if parcel.written:
                self._alive -= 1
            parcel.settle(Outcome.DROPPED, DropReason.SLOW_DEVICE)
        self.pump()

    def close(self) -> None:
        """Settle everything as `disconnected` and free the packet identifiers. Idempotent."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._look_timer is not None:
            self._look_timer.cancel()
        if self._draining is not None:
            self._draining.cancel()
        for number in (*self._in_flight, *self._left_out):
            self._session.inflight_out.pop(number, None)
        self._in_flight.clear()
        self._left_out.clear()
        self._queue.clear()
        while self._unsettled:
            parcel, _ = self._unsettled.popitem(last=False)
            parcel.settle(Outcome.DROPPED, DropReason.DISCONNECTED)
