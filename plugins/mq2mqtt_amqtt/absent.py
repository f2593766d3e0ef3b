"""Persistent sessions whose client is away when a message comes: each has it kept, some at a time.

To keep a message for one session takes 20 us, and thousands may subscribe to its topic.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from amqtt.broker import Broker
from amqtt.session import Session
from loguru import logger

from mq2mqtt.host import DropReason, Outcome
from mq2mqtt_amqtt.fanout import Fanout

__all__ = ["Absent"]

_AT_ONCE: Final = 200
"""Sessions before devices get their turn: about 5 ms."""


class Absent:
    """Has messages kept, in the order in which they came."""

    def __init__(self, broker: Broker) -> None:
        self._sessions = broker.sessions
        # Bounded by whoever waits for `done`.
        self._waiting: deque[tuple[Fanout, Iterator[tuple[Session, int]]]] = deque()  # bounded, see above
        self._done = asyncio.Event()
        self._done.set()
        self._later: asyncio.Handle | None = None

    def miss(self, fanout: Fanout, away: Iterable[tuple[Session, int]]) -> None:
        """Have the message of `fanout` kept for these sessions, with the QoS beside each; they are receivers of it."""
        self._waiting.append((fanout, iter(away)))
        if self._done.is_set():
            self._done.clear()
            self._go_on()

    async def done(self) -> None:
        """Return when nothing waits."""
        await self._done.wait()

    def _go_on(self) -> None:
        self._later = None
        for _ in range(_AT_ONCE):
            if not self._waiting:
                self._done.set()
                return
            fanout, away = self._waiting[0]
            following = next(away, None)
            if following is None:
                self._waiting.popleft()
            else:
                self._miss_safely(fanout, *following)
        self._later = asyncio.get_running_loop().call_soon(self._go_on)

    def _miss_safely(self, fanout: Fanout, session: Session, qos: int) -> None:
        try:
            self._miss(fanout, session, qos)
        except Exception:  # noqa: BLE001 - the loop's own call: what waits behind it has to go on
            logger.exception("client {}: unexpected error while a message is kept for it, dropped", session.client_id)
            fanout.done(Outcome.DROPPED, DropReason.NOT_STORABLE)

    def _miss(self, fanout: Fanout, session: Session, qos: int) -> None:
        client_id = session.client_id or ""
        now, _ = self._sessions.get(client_id, (None, None))
        if now is session:
            fanout.missed(client_id, qos, DropReason.NOT_PERSISTENT)
        else:
            fanout.done(Outcome.DROPPED, DropReason.SESSION_ENDED)

    def close(self) -> None:
        """Have nothing more kept: what waits is never settled."""
        self._waiting.clear()
        if self._later is not None:
            self._later.cancel()
            self._later = None
