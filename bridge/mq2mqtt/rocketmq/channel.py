"""The way to one address: opens its connection when needed, and waits between attempts that fail."""

import asyncio
import logging
import random
import ssl
from collections.abc import Callable
from typing import Final

from mq2mqtt.rocketmq.connection import Connection, RequestHandler, open_connection
from mq2mqtt.rocketmq.errors import NotConnected

__all__ = ["Channel"]

logger = logging.getLogger(__name__)

_FIRST_DELAY: Final = 0.2
_MAX_DELAY: Final = 5.0
_MAX_DOUBLINGS: Final = 8


class Channel:
    """Keeps at most one connection to `target`, opened by the first caller who needs it.

    After a failed attempt, callers fail at once until a jittered delay (0.2 s doubling to 5 s) is over: a dead
    broker is not hammered, and nobody waits for it. A connection that ends without one well-formed frame is a
    failed attempt too.

    Attributes:
        address: as RocketMQ announces it.
        used_at: loop time of the last use.
    """

    def __init__(  # noqa: PLR0913 - keyword-only, all needed to connect
        self,
        address: str,
        *,
        target: str,
        ssl_context: ssl.SSLContext | None,
        connect_timeout: float,
        on_request: RequestHandler,
        on_connected: Callable[[str], None],
    ) -> None:
        self.address = address
        self.used_at = 0.0
        self._target = target
        self._ssl_context = ssl_context
        self._connect_timeout = connect_timeout
        self._on_request = on_request
        self._on_connected = on_connected
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._reason = "not tried yet"
        self._closed = False

    @property
    def is_connected(self) -> bool:
        """Whether there is an open connection now."""
        return self._connection is not None

    async def connection(self) -> Connection:
        """Return the open connection, or open it.

        Raises:
            NotConnected: it cannot be opened, or could not just now.
        """
        loop = asyncio.get_running_loop()
        self.used_at = loop.time()
        if self._connection is not None:
            return self._connection
        if self._closed:
            raise NotConnected(self._target, "this client is closed")
        if self._connecting is None:
            wait = self._retry_at - loop.time()
            if wait > 0:
                raise NotConnected(self._target, self._reason, retry_after=wait)
            self._connecting = loop.create_task(self._connect(), name=f"rocketmq.connect[{self._target}]")
        # All callers share one attempt: neither a cancelled caller ends it, nor does its end cancel a caller.
        await asyncio.wait([self._connecting])
        if self._connection is None:
            wait = max(0.0, self._retry_at - loop.time())
            raise NotConnected(self._target, self._reason, retry_after=wait)
        return self._connection

    async def close(self) -> None:
        """Close the connection for good. Idempotent."""
        self._closed = True
        self._reason = "this client is closed"
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        if self._connection is not None:
            self._connection.close("this client is closed")

    async def _connect(self) -> None:
        try:
            connection = await open_connection(
                self._target,
                ssl_context=self._ssl_context,
                on_request=self._on_request,
                on_lost=self._lost,
                timeout=self._connect_timeout,
            )
        except NotConnected as error:
            self._fail(error.reason)
            return
        finally:
            self._connecting = None
        if connection.is_lost:
            return
        self._connection = connection
        logger.debug("connected to %s", self._target)
        self._on_connected(self.address)

    def _lost(self, connection: Connection, reason: str) -> None:
        if connection is not self._connection and self._connection is not None:
            return
        self._connection = None
        if self._closed:
            return
        if connection.answered:
            self._failures = 0
            self._reason = reason
            logger.info("connection to %s lost: %s", self._target, reason)
        else:
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        ceiling = min(_MAX_DELAY, _FIRST_DELAY * 2 ** min(self._failures, _MAX_DOUBLINGS))
        delay = ceiling * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret
        if self._failures == 0:
            logger.warning("cannot connect to %s: %s", self._target, reason)
        self._failures += 1
        self._reason = reason
        self._retry_at = asyncio.get_running_loop().time() + delay
