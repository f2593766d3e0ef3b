"""One topic consumed in one group: long polls, and what is out until RocketMQ knows that it is done."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from loguru import logger

from mq2mqtt.errors import BridgeError
from mq2mqtt.link import GroupMember, Subscription
from mq2mqtt.link.grpc import client
from mq2mqtt.link.grpc.reader import HIDDEN_SECONDS, Reader
from mq2mqtt.message import ReceivedMessage

if TYPE_CHECKING:
    from mq2mqtt.link.grpc.incoming import GrpcMessage

__all__ = ["GrpcSubscription"]

_RENEW_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_ROUTE_SECONDS = 5.0
_CLOSE_SECONDS = 3.0
_READY_BATCHES = 64

# A broker that has nothing answers after 5 s; now and then at once, about messages of another tag.
_HASTY_SECONDS = 0.5
_HASTY_ANSWERS = 5
_HASTY = (
    "the broker does not wait for messages, it answers that there are none: RocketMQ 5.3.3 does so with "
    "authorizationEnabled in the broker; leave that to the proxy"
)


@dataclass(slots=True)
class _Out:
    """A message that was handed out, until RocketMQ knows that it is done."""

    incoming: client.Incoming
    renew_at: float
    """By the loop's clock, as `until`."""
    until: float = 0.0
    """Once it is settled: when it comes again unless it is acknowledged."""


class GrpcSubscription(Subscription):
    """See `Subscription`. RocketMQ bounds what is out: 32 messages of each queue.

    Args:
        reader: not connected yet; this owns it.
        name: of the one member that is known.
        left: called when the group may be joined again.
    """

    def __init__(self, reader: Reader, *, name: str, left: Callable[[], object]) -> None:
        self._reader = reader
        self._name = name
        self._left = left
        self._loop = asyncio.get_running_loop()
        self._problem: str | None = "not connected yet"
        self._troubles: dict[str, str] = {}
        """By task: `poll.` and its broker, `renew`, `acknowledge`."""
        self._batches: deque[list[GrpcMessage]] = deque()  # bounded by `_hand_out`
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._out: dict[tuple[str, int, int], _Out] = {}
        """By place: what is not settled."""
        self._settled: dict[tuple[str, int, int], _Out] = {}
        """What is, and not acknowledged yet."""
        self._settling = asyncio.Event()
        self._unreadable = 0
        self._closed = False
        self._closing: asyncio.Task[None] | None = None
        self._polls: dict[str, asyncio.Task[None]] = {}
        self._tasks = [
            self._task(self._run(), "run"),
            self._task(self._keep("renew", self._renew), "renew"),
            self._task(self._keep("acknowledge", self._acknowledge), "acknowledge"),
        ]

    def _task(self, coroutine: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        return asyncio.create_task(coroutine, name=f"mq2mqtt.grpc.{what}[{self._reader.group}]")

    @property
    def problem(self) -> str | None:
        """Why nothing can be received now (Subscription)."""
        if self._closed:
            return "closed"
        return self._problem or next(iter(self._troubles.values()), None)

    @property
    def lag(self) -> None:
        """The client does not tell what waits in RocketMQ (Subscription)."""

    @property
    def unreadable(self) -> int:
        """Messages so far that could not be decoded (Subscription)."""
        return self._unreadable

    async def members(self) -> tuple[GroupMember, ...]:
        """Return this one alone: the client does not tell of others (Subscription)."""
        return (GroupMember(self._name, ours=True),)

    def __aiter__(self) -> AsyncIterator[Sequence[ReceivedMessage]]:
        """Yield batches (Subscription)."""
        return self

    async def __anext__(self) -> Sequence[ReceivedMessage]:
        """Return the next batch."""
        while not self._closed:
            if self._batches:
                self._room.set()
                return self._batches.popleft()
            self._arrived.clear()
            await self._arrived.wait()
        raise StopAsyncIteration

    def settle(self, message: ReceivedMessage) -> None:
        """Acknowledge `message` (Subscription)."""
        place = message.broker, message.queue_id, message.offset
        out = self._out.get(place)
        if out is None or out.incoming.message is not message or self._closed:
            return
        del self._out[place]
        self._done(place, out)

    def _done(self, place: tuple[str, int, int], out: _Out) -> None:
        out.until = self._loop.time() + HIDDEN_SECONDS
        self._settled[place] = out
        self._settling.set()

    async def close(self) -> None:
        """Leave the group; give back at once what is not settled (Subscription). Takes up to 5 s: the last poll."""
        if self._closing is None:
            self._closed = True
            self._arrived.set()
            self._room.set()
            self._closing = self._task(self._leave(), "leave")
        await asyncio.shield(self._closing)

    # Receiving

    async def _run(self) -> None:
        """Stay in the group, and poll each broker that has queues."""
        while True:
            try:
                queues = await self._reader.connect()
                self._problem = None
                await self._keep_polling(queues)
            except BridgeError as error:
                self._problem = str(error)
            except Exception as error:  # noqa: BLE001 - a task's top edge: one rule's bug must not stop the others
                self._problem = self._unexpected(error, self._problem)
            await asyncio.sleep(_RETRY_SECONDS)

    async def _keep(self, task: str, step: Callable[[], Awaitable[None]]) -> None:
        """Do `step` again and again, whatever it raises."""
        while True:
            try:
                await step()
                self._troubles.pop(task, None)
            except Exception as error:  # noqa: BLE001 - a task's top edge: it would end unseen
                self._troubles[task] = self._unexpected(error, self._troubles.get(task))
                await asyncio.sleep(_RETRY_SECONDS)

    def _unexpected(self, error: Exception, told: str | None) -> str:
        """Return the problem that a bug is; log it unless that was `told` last."""
        problem = f"internal error, see the log: {type(error).__name__}"
        if problem != told:
            logger.opt(exception=error).error("consumer group {}: unexpected error, trying again", self._reader.group)
        return problem

    async def _keep_polling(self, queues: dict[str, Any]) -> None:
        while True:
            for broker in queues.keys() - self._polls.keys():
                self._polls[broker] = self._task(self._poll(broker, queues[broker]), f"poll.{broker}")
            for broker in self._polls.keys() - queues.keys():
                self._polls.pop(broker).cancel()
                self._troubles.pop(f"poll.{broker}", None)
            await asyncio.sleep(_ROUTE_SECONDS)
            queues = self._reader.consumer.queues()

    async def _poll(self, broker: str, queue: Any) -> None:  # noqa: ANN401
        """Receive from one broker; what goes wrong there is its trouble alone."""
        task = f"poll.{broker}"
        known = True
        hasty = 0
        while not self._closed:
            started = self._loop.time()
            try:
                if not known:
                    await self._reader.require_order(queue)
                    known = True
                received = await self._reader.take(queue)
                hasty = 0 if received or self._loop.time() - started > _HASTY_SECONDS else hasty + 1
                if hasty < _HASTY_ANSWERS:
                    self._troubles.pop(task, None)
                    await self._hand_out(received)
                    continue
                trouble = _HASTY
            except BridgeError as error:
                trouble = str(error)
                known = False
            except Exception as error:  # noqa: BLE001 - a task's top edge: it would end unseen
                trouble = self._unexpected(error, self._troubles.get(task))
                known = False
            self._troubles[task] = trouble
            await asyncio.sleep(_RETRY_SECONDS)

    async def _hand_out(self, received: list[client.Incoming]) -> None:
        """Queue what is new, in batches of one queue each; wait while too much is queued."""
        fresh = [incoming.message for incoming in received if self._is_new(incoming)]
        for _, batch in groupby(fresh, key=lambda message: message.queue_id):
            self._batches.append(list(batch))
        self._arrived.set()
        while len(self._batches) > _READY_BATCHES and not self._closed:
            self._room.clear()
            await self._room.wait()

    def _is_new(self, incoming: client.Incoming) -> bool:
        message = incoming.message
        # What came again because the proxy was away is under way: only the new receipt counts.
        if known := self._out.get(message.place):
            known.incoming.receipt = incoming.receipt
            return False
        if message.place in self._settled:
            # Not the one that is there: that may be on its way with the old receipt.
            self._done(message.place, _Out(incoming, renew_at=0.0))
            return False
        out = _Out(incoming, renew_at=self._loop.time() + _RENEW_SECONDS)
        if incoming.problem is not None:
            self._unreadable += 1
            where = "/".join(map(str, message.place))
            logger.error("topic {}: message {} left out: {}", message.topic, where, incoming.problem)
            self._done(message.place, out)
            return False
        self._out[message.place] = out
        return True

    # What is out

    async def _renew(self) -> None:
        """Keep what is out hidden from the group: one round."""
        await asyncio.sleep(_RENEW_SECONDS / 5)
        now = self._loop.time()
        due = [out for out in self._out.values() if out.renew_at <= now]
        await self._hide(due, HIDDEN_SECONDS)
        for out in due:
            out.renew_at = now + _RENEW_SECONDS

    async def _hide(self, out: Sequence[_Out], seconds: int) -> None:
        # What fails comes again in its time.
        results = await asyncio.gather(
            *(self._reader.hide(one.incoming, seconds) for one in out), return_exceptions=True
        )
        for result in results:
            if result is not None and not isinstance(result, BridgeError):
                raise result

    async def _acknowledge(self) -> None:
        """Acknowledge what is settled: one round, once there is something."""
        if not self._settled:
            self._settling.clear()
            await self._settling.wait()
        if not await self._acknowledge_some():
            await asyncio.sleep(_RETRY_SECONDS)

    async def _acknowledge_some(self) -> bool:
        """Acknowledge the first of what is settled, of one broker; return whether that was taken."""
        now = self._loop.time()
        places = list(islice(self._settled, client.RECEIVE_MESSAGES))
        broker = places[0][0]
        batch = {place: self._settled[place] for place in places if place[0] == broker}
        problem: BridgeError | None = None
        refused = {one.place for one in (out.incoming.message for out in batch.values())}
        try:
            answers = await self._reader.acknowledge([out.incoming for out in batch.values()])
            refused = {incoming.message.place for incoming, _ in answers}
            problem = answers[0][1] if answers else None
        except BridgeError as error:
            problem = error
        for place, out in batch.items():
            # Not what came again meanwhile: RocketMQ waits for the new receipt, whatever it says of the old one.
            if self._settled.get(place) is out and (place not in refused or out.until < now):
                del self._settled[place]
        if problem is not None:
            logger.warning("consumer group {}: messages may come again: {}", self._reader.group, problem)
        return problem is None

    async def _leave(self) -> None:
        """Acknowledge what is settled, give back what is not, and leave."""
        staying, *others = self._tasks
        staying.cancel()
        answered = await self._end_polls()
        for task in others:
            task.cancel()
        await asyncio.gather(staying, *others, return_exceptions=True)
        try:
            if not (answered and await self._give_back()):
                logger.warning("consumer group {}: left without an answer, messages may come again", self._reader.group)
        finally:
            self._out.clear()
            self._settled.clear()
            self._batches.clear()
            await self._reader.close()
            # Whatever went wrong: the group may be joined again.
            self._left()

    async def _end_polls(self) -> bool:
        """Wait for the last answer of each poll; return whether all have come.

        What comes after a poll was cancelled would be hidden from everybody for 20 s.
        """
        polls = self._polls.values()
        if not polls:
            return True
        _, waiting = await asyncio.wait(polls, timeout=client.POLL_AT_MOST_SECONDS + 0.5)
        for poll in waiting:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
        return not waiting

    async def _give_back(self) -> bool:
        """Acknowledge what is settled, let others have what is not; return whether that was taken."""
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                while self._settled:
                    if not await self._acknowledge_some():
                        return False
                await self._hide(list(self._out.values()), 0)
        except TimeoutError:
            return False
        return True
