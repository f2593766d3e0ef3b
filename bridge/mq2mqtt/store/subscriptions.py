"""The table `subscriptions`: what persistent sessions are subscribed to."""

import asyncio
from typing import Final

from sqlalchemy import select, tuple_

from mq2mqtt.store import Subscription
from mq2mqtt.store.checks import unstorable
from mq2mqtt.store.database import Database
from mq2mqtt.store.tables import subscriptions
from mq2mqtt.store.writer import Writer

__all__ = ["SqlSubscriptionStore"]

_ROWS_AT_ONCE: Final = 1000
_SUBSCRIPTION: Final = (subscriptions.c.client_id, subscriptions.c.filter, subscriptions.c.qos)


class SqlSubscriptionStore:
    """See `mq2mqtt.store.SubscriptionStore`."""

    def __init__(self, database: Database, writer: Writer, *, node: str) -> None:
        self._database = database
        self._writer = writer
        self._own = subscriptions.c.node == node

    def save(self, subscription: Subscription) -> asyncio.Future[None]:
        """See the protocol."""
        error = unstorable(keys=(subscription.client_id, subscription.filter))
        if error is not None:
            return self._writer.refuse(error)
        return self._writer.submit(lambda batch: batch.subscriptions.save(subscription))

    def remove(self, client_id: str, topic_filter: str) -> asyncio.Future[None]:
        """See the protocol."""
        error = unstorable(keys=(client_id, topic_filter))
        if error is not None:
            return self._writer.refuse(error)
        return self._writer.submit(lambda batch: batch.subscriptions.remove(client_id, topic_filter))

    def forget(self, client_id: str) -> asyncio.Future[None]:
        """See the protocol."""
        error = unstorable(keys=(client_id,))
        if error is not None:
            return self._writer.refuse(error)
        return self._writer.submit(lambda batch: batch.subscriptions.forget(client_id))

    async def all(self) -> list[Subscription]:
        """See the protocol."""
        found: list[Subscription] = []
        key = tuple_(subscriptions.c.client_id, subscriptions.c.filter)
        last = ("", "")
        while True:
            page = select(*_SUBSCRIPTION).where(self._own, key > last).order_by(*_SUBSCRIPTION[:2]).limit(_ROWS_AT_ONCE)
            async with self._database.reading() as connection:
                rows = (await connection.execute(page)).all()
            found += [Subscription(client_id, topic_filter, qos) for client_id, topic_filter, qos in rows]
            if len(rows) < _ROWS_AT_ONCE:
                return found
            last = (rows[-1].client_id, rows[-1].filter)
