"""The subscriptions of persistent sessions, in the bridge's store: amqtt has them in memory only."""

import asyncio
import gc
import math
import time
import weakref
from collections.abc import Collection
from functools import partial
from itertools import groupby
from typing import Any, Final

from amqtt.broker import Broker
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.session import Session
from loguru import logger

from mq2mqtt.errors import UnstorableError
from mq2mqtt.store import Subscription, SubscriptionStore
from mq2mqtt_amqtt.roles import is_kept
from mq2mqtt_amqtt.subscriptions import Subscriptions

__all__ = ["KeptSessions"]

_RESTORED_AT_ONCE: Final = 200
_QUEUES: Final = ("retained_messages", "delivered_message_queue")
"""Of amqtt's `Session`: what it missed, and what the client has published."""


class KeptSessions:
    """Saves each subscription of a session that amqtt keeps, and brings them all back when the broker starts.

    A session without subscriptions has nothing to lose, so nothing is saved of it. Before `restore` nothing is saved.
    """

    def __init__(self, broker: Broker, subscriptions: Subscriptions) -> None:
        self._broker = broker
        self._subscriptions = subscriptions
        self._store: SubscriptionStore | None = None
        # `None`: what the store has of it, if anything, is not what it should have.
        self._saved: dict[str, dict[str, Subscription | None]] = {}
        self._writing: dict[str, set[asyncio.Future[None]]] = {}
        subscriptions.watcher = self

    async def restore(self, store: SubscriptionStore) -> None:
        """Make the sessions that `store` knows, and save there from now on. No client may be connected yet.

        Raises:
            StoreError: it cannot be read.
        """
        # None of them has a connection to be handled.
        handler = BrokerProtocolHandler(self._broker.plugins_manager)
        sessions = self._broker.sessions
        for client_id, subscriptions in groupby(await store.all(), key=lambda found: found.client_id):
            session = _RestoredSession(client_id)
            sessions[client_id] = (session, handler)
            saved = self._saved[client_id] = {}
            for subscription in subscriptions:
                session.username = subscription.username
                self._subscriptions.restore(session, subscription.filter, subscription.qos)
                saved[subscription.filter] = subscription
            if len(self._saved) % _RESTORED_AT_ONCE == 0:
                await asyncio.sleep(0)
        self._store = store
        if self._saved:
            # They stay: a full look for cycles in 100 000 of them would hold the loop for a second.
            gc.freeze()
            logger.info("{} persistent sessions are restored with their subscriptions", len(self._saved))

    def close(self) -> None:
        """Save nothing more: what amqtt removes when it stops is to be there when it starts."""
        self._store = None

    def writing(self, client_id: str) -> Collection["asyncio.Future[None]"]:
        """Return what of a client's subscriptions is being written. Do not cancel it."""
        return tuple(self._writing.get(client_id, ()))

    # See `Watcher`.

    def added(self, session: Session, topic_filter: str, qos: int) -> None:
        """A session subscribes, maybe again."""
        if self._store is None or not is_kept(session):
            return
        client_id = session.client_id or ""
        saved = self._saved.setdefault(client_id, {})
        subscription = Subscription(client_id, topic_filter, qos, session.username)
        if saved.get(topic_filter) != subscription:
            saved[topic_filter] = subscription
            written = self._store.save(subscription)
            written.add_done_callback(partial(self._saved_or_not, subscription))
            self._track(client_id, written)

    def removed(self, session: Session, topic_filter: str) -> None:
        """A session subscribes to this no more."""
        client_id = session.client_id or ""
        saved = self._saved.get(client_id)
        if self._store is None or saved is None or topic_filter not in saved:
            return
        del saved[topic_filter]
        if not saved:
            del self._saved[client_id]
        self._track(client_id, self._store.remove(client_id, topic_filter))

    def forgotten(self, session: Session) -> None:
        """A session has ended."""
        client_id = session.client_id or ""
        if self._store is not None and self._saved.pop(client_id, None) is not None:
            self._track(client_id, self._store.forget(client_id))

    def _saved_or_not(self, subscription: Subscription, written: "asyncio.Future[None]") -> None:
        if written.cancelled() or (error := written.exception()) is None:
            return
        if isinstance(error, UnstorableError):
            logger.warning("client {}: a subscription will not outlive the broker: {}", subscription.client_id, error)
            return
        # The next time it subscribes it is tried again; what was saved before is still there to be removed.
        saved = self._saved.get(subscription.client_id)
        if saved is not None and saved.get(subscription.filter) is subscription:
            saved[subscription.filter] = None

    def _track(self, client_id: str, written: "asyncio.Future[None]") -> None:
        self._writing.setdefault(client_id, set()).add(written)
        written.add_done_callback(partial(self._written, client_id))

    def _written(self, client_id: str, written: "asyncio.Future[None]") -> None:
        writing = self._writing[client_id]
        writing.discard(written)
        if not writing:
            del self._writing[client_id]
        if not written.cancelled():
            written.exception()  # whoever waits for it has its own look


class _RestoredSession(Session):
    """A session whose client has not been here since the broker started: what plugins noted in it is gone.

    amqtt's state machine takes half a millisecond and 20 KB to be made, which many thousands of sessions would wait
    for at the start; its two queues take 6 KB, and are made when they are asked for.
    """

    def __init__(self, client_id: str) -> None:
        super().__init__()
        self.client_id = client_id
        self.clean_session = False
        self.last_disconnect_time = math.floor(time.time())

        for name in _QUEUES:
            delattr(self, name)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - see `_QUEUES`
        if name not in _QUEUES:
            raise AttributeError(name)
        queue: asyncio.Queue[Any] = asyncio.Queue()  # unbounded, as amqtt makes it
        setattr(self, name, queue)
        return queue

    def clear_queues(self) -> None:
        """Forget what they hold."""
        for name in _QUEUES:
            self.__dict__.pop(name, None)

    def _init_states(self) -> None:
        self.transitions = _States(self)  # type: ignore[assignment]  # no `Machine`: see the class


class _States:
    """What amqtt's broker uses of `Session.transitions`."""

    def __init__(self, session: Session) -> None:
        # No cycle, which nobody would look for.
        self._session = weakref.proxy(session)
        self.state = "disconnected"

    def is_connected(self) -> bool:
        return self.state == "connected"

    def connect(self) -> None:
        if self.is_connected():
            raise ValueError("the session is connected already")
        self.state = "connected"
        self._session._on_enter_connected()  # noqa: SLF001 - as the state machine does

    def disconnect(self) -> None:
        self.state = "disconnected"
        self._session._on_enter_disconnected()  # noqa: SLF001 - as the state machine does
