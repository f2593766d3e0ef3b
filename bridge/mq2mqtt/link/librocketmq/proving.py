"""Brokers prove that they answer, by a pull that transfers nothing."""

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from mq2mqtt.errors import NotConnectedError
from mq2mqtt.link import Queue
from mq2mqtt.link.librocketmq.clients import Consumer, PullStatus
from mq2mqtt.link.librocketmq.reading import FAR

__all__ = ["PROVING_GROUP", "Prover", "no_answer"]

PROVING_GROUP: Final = "TOOLS_CONSUMER"
"""RocketMQ's own tools pull in it: brokers have it without anybody making it."""

_ANSWER_SECONDS: Final = 2.0


class Prover:
    """Pulls in one thread, because the library's consumer is not made for more.

    The library waits 10 s for a pull. Whoever waits for that broker is told after 2 s, and who asks later, at once;
    who asks for another broker waits for the thread.

    Args:
        consumer: in the group `PROVING_GROUP`, started; this does not close it.
    """

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="librocketmq-prove")
        self._asked: deque[tuple[Queue, asyncio.Future[bool]]] = deque()  # bounded by those who wait, each for its own
        self._silent: str | None = None
        """The broker that lets the thread wait for so long."""
        self._ends: dict[Queue, int] = {}
        self._pulling: asyncio.Task[None] | None = None
        self._closed = False

    async def prove(self, queue: Queue) -> None:
        """Return when the broker of `queue` answers.

        Raises:
            NotConnectedError: it does not, or does not let the queue be read; or this is closed.
        """
        if queue.broker == self._silent:
            raise no_answer(queue)
        answered = asyncio.get_running_loop().create_future()
        self._asked.append((queue, answered))
        if self._pulling is None:
            self._pulling = asyncio.create_task(self._pull_all(), name="mq2mqtt.librocketmq.prove")
        if not await answered:
            raise NotConnectedError("the link is closed") if self._closed else no_answer(queue)

    async def _pull_all(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while (asked := self._next()) is not None:
                queue, answered = asked
                timer = loop.call_later(_ANSWER_SECONDS, self._is_silent, queue.broker)
                # At its end a queue has nothing to transfer.
                end = self._ends.get(queue, FAR)
                pulled = await loop.run_in_executor(self._thread, self._consumer.pull, queue, end)
                timer.cancel()
                self._silent = None
                if pulled.status is not PullStatus.NO_ANSWER:
                    self._ends[queue] = pulled.max_offset
                _tell(answered, answers=pulled.status is not PullStatus.NO_ANSWER)
        finally:
            self._pulling = None
            self._tell_all(None)

    def _next(self) -> tuple[Queue, asyncio.Future[bool]] | None:
        """Return what is asked first and still waited for; it stays there."""
        while self._asked and (self._closed or self._asked[0][1].done()):
            _tell(self._asked.popleft()[1], answers=False)
        return self._asked[0] if self._asked else None

    def _is_silent(self, broker: str) -> None:
        self._silent = broker
        self._tell_all(broker)

    def _tell_all(self, broker: str | None) -> None:
        """Tell those who wait for `broker`, or all, that it does not answer."""
        for queue, answered in self._asked:
            if broker in {None, queue.broker}:
                _tell(answered, answers=False)

    async def close(self) -> None:
        """Wait for the pull that is under way, and fail all others."""
        self._closed = True
        self._tell_all(None)
        if self._pulling is not None:
            await asyncio.wait([self._pulling])
        await asyncio.to_thread(self._thread.shutdown)


def no_answer(queue: Queue, group: str = PROVING_GROUP) -> NotConnectedError:
    """Return the error for a broker that does not answer a pull."""
    return NotConnectedError(
        f"broker {queue.broker} does not answer, or does not let topic {queue.topic} be read in group {group}"
    )


def _tell(answered: asyncio.Future[bool], *, answers: bool) -> None:
    if not answered.done():
        answered.set_result(answers)
