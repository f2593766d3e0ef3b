"""One connection to the broker, made again whenever it ends."""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Final

from loguru import logger

from mq2mqtt_mosquitto.client import Incoming, Login, MqttClient, MqttError
from mq2mqtt_mqtt.feed import Feed
from mq2mqtt_mqtt.outbox import Outbox

__all__ = ["Connection"]

_BACKOFF_FIRST: Final = 0.1
_BACKOFF_MAX: Final = 5.0


class Connection:
    """Publishes what is in `outbox` and fetches what `feed` subscribes to.

    `problem` says why it cannot, `reached` is set while it can. `subscribes` is called before the broker is asked to
    queue messages for the feed.
    """

    def __init__(self, login: Login, *, feed: Feed | None = None, subscribes: Callable[[], None] | None = None) -> None:
        self.login = login
        self.outbox = Outbox()
        self.problem: str | None = "the MQTT broker is not reached yet"
        self.reached = asyncio.Event()
        self.had_session = False
        """Whether the broker is known to keep a session for this client id."""
        self._feed = feed
        self._subscribes = subscribes
        self._client: MqttClient | None = None
        self._early: deque[Incoming] = deque()  # bounded by `Login.receive_maximum`, but for QoS 0
        self._task: asyncio.Task[None] | None = None

    @property
    def is_started(self) -> bool:
        """Whether `start` has been called."""
        return self._task is not None

    def start(self) -> None:
        """Connect, and stay connected."""
        self._task = asyncio.create_task(self._run(), name=f"mq2mqtt.mqtt[{self.login.client_id}]")

    async def stop(self) -> None:
        """Close the connection; the broker keeps the session. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        delay = _BACKOFF_FIRST
        while True:
            try:
                await self._serve()
            except TimeoutError:
                reason = "it does not answer; it has to speak MQTT 5"
            except (OSError, MqttError) as error:
                reason = getattr(error, "strerror", None) or str(error)
            except Exception:  # noqa: BLE001 - a task's top edge: the connection must come back
                logger.exception("unexpected error with connection {}, connecting again", self.login.client_id)
                reason = "internal error, see the log"
            if self.reached.is_set():
                delay = _BACKOFF_FIRST
            self.reached.clear()
            problem = f"the MQTT broker {self.login.url} cannot be used: {reason}"
            if problem != self.problem:
                logger.warning("{}: {}", self.login.client_id, problem)
            self.problem = problem
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
            delay = min(2 * delay, _BACKOFF_MAX)

    async def _serve(self) -> None:
        """Connect and work until the connection ends; raises what ended it."""
        self._early.clear()
        client = await MqttClient.connect(self.login, received=self._received, room=self.outbox.flush)
        self._client = client
        try:
            self.outbox.connected(client)
            self.problem = None
            self.reached.set()
            logger.info("{}: connected to {}", self.login.client_id, self.login.url)
            if self._feed is not None:
                self._look_at_session(client)
                while self._early:
                    self._feed.take(client, self._early.popleft())
                await self._subscribe(client, self._feed)
            raise MqttError(await client.closed)
        finally:
            self._client = None
            self.outbox.disconnected()
            if self._feed is not None:
                self._feed.close()
            client.close()

    async def _subscribe(self, client: MqttClient, feed: Feed) -> None:
        """Subscribe; while the broker does not let us, ask again: an operator may change that."""
        if self._subscribes is not None:
            self._subscribes()
        while not client.closed.done():
            try:
                await feed.open(client)
            except MqttError as error:
                if feed.problem != str(error):
                    logger.warning("{}: {}", self.login.client_id, error)
                feed.problem = str(error)
                await asyncio.wait([client.closed], timeout=_BACKOFF_MAX)
            else:
                feed.problem = None
                self.had_session = True
                return

    def _look_at_session(self, client: MqttClient) -> None:
        if self.had_session and not client.session_present:
            logger.warning(
                "{}: the broker has lost its session: what was published since the last connection is not exported",
                self.login.client_id,
            )
        kept = client.limits.session_expiry
        if kept is not None and kept < self.login.session_expiry:
            logger.warning(
                "{}: the broker keeps the session for {} s only: a longer absence loses what is published meanwhile",
                self.login.client_id,
                kept,
            )

    def _received(self, message: Incoming) -> None:
        if self._feed is None:
            return
        if self._client is None:
            # What a kept session holds comes right behind the answer to CONNECT.
            self._early.append(message)
        else:
            self._feed.take(self._client, message)
