"""Where what other clients publish waits while a device does not read.

amqtt keeps such messages in memory for as long as the connection lives, and behind the first of them the finished
tasks of all its routing. What comes from RocketMQ has its own place, `Outbox`.
"""

import asyncio
from typing import Final

from loguru import logger

from mq2mqtt_amqtt.wire import BUFFER_HIGH, Wire

__all__ = ["MAX_WAITING", "MAX_WAITING_BYTES", "WAIT_SECONDS", "Turnstile"]

WAIT_SECONDS: Final = 2.0
"""How long a message waits; amqtt keeps the finished tasks of all its routing for that time."""

MAX_WAITING: Final = 10_000
"""Messages that wait for a connection; each holds a task of amqtt's."""

MAX_WAITING_BYTES: Final = 8 * 1024 * 1024
"""Of payload; one message may always wait."""


class Turnstile:
    """Lets messages pass in their order as the device takes them, each within `WAIT_SECONDS` or never."""

    def __init__(self, wire: Wire, client_id: str) -> None:
        self._wire = wire
        self._client_id = client_id
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._bytes = 0
        self._stuck = False
        self._told = False

    def passes(self) -> bool:
        """Whether a message may pass without waiting."""
        if self._wire.buffered > BUFFER_HIGH:
            return False
        self._stuck = False
        return not self._waiting

    async def wait(self, size: int) -> bool:
        """Wait for the turn of a message with `size` bytes of payload; false if it must be dropped.

        Whoever gets true writes at once: before it next suspends itself.
        """
        room = self._waiting < MAX_WAITING and (not self._waiting or self._bytes + size <= MAX_WAITING_BYTES)
        if not self._stuck and room and await self._queue(size):
            return True
        if not self._told:
            self._told = True
            logger.warning("client {} does not read: messages of other clients to it are dropped", self._client_id)
        return False

    async def _queue(self, size: int) -> bool:
        self._waiting += 1
        self._bytes += size
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._turn:
                await self._wire.drained()
        except TimeoutError:
            # Until it takes something nobody waits in vain again.
            self._stuck = True
            return False
        finally:
            self._waiting -= 1
            self._bytes -= size
        return True
