"""Sending to each broker in threads of its own: one that hangs holds up no other."""

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from mq2mqtt.errors import NotConnectedError
from mq2mqtt.link.librocketmq.clients import SEND_MILLISECONDS, Producer
from mq2mqtt.message import RocketMessage

__all__ = ["Senders"]

_SENDERS: Final = 8
_SILENCE_SECONDS: Final = 0.9 * SEND_MILLISECONDS / 1000


class Senders:
    """Threads that send to one broker.

    What waits for a thread while the broker lets a message time out fails with it: each would take as long in its turn.

    Args:
        broker: its name.
        producer: that is started; its `send` may be called from several threads.
        stopping: set when nothing more is to be sent.
    """

    def __init__(self, broker: str, *, producer: Producer, stopping: threading.Event) -> None:
        self._broker = broker
        self._producer = producer
        self._stopping = stopping
        # What waits for a thread is bounded by the callers, who each wait for their own.
        self._threads = ThreadPoolExecutor(_SENDERS, thread_name_prefix="librocketmq-send")
        self._timed_out_at = 0.0

    async def send(self, messages: Sequence[RocketMessage], index: int) -> str | None:
        """Store `messages` one after another in the queue of `index`; return `None`, or what was wrong with one.

        Raises:
            NotConnectedError: the broker does not answer.
        """
        asked_at = time.monotonic()
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._send, messages, index, asked_at)

    def _send(self, messages: Sequence[RocketMessage], index: int, asked_at: float) -> str | None:
        if self._timed_out_at > asked_at:
            raise self._silence()
        for message in messages:
            if self._stopping.is_set():
                return "the link is closed"
            began = time.monotonic()
            if problem := self._producer.send(message, index):
                if time.monotonic() - began > _SILENCE_SECONDS:
                    self._timed_out_at = time.monotonic()
                    raise self._silence()
                return problem
        return None

    def _silence(self) -> NotConnectedError:
        # The library calls it "No route info of this topic".
        return NotConnectedError(f"broker {self._broker} does not answer within {SEND_MILLISECONDS / 1000:g} s")

    def close(self) -> None:
        """Wait for the threads, once `stopping` is set; blocks."""
        self._threads.shutdown()
