"""The table `subscriptions`: what persistent sessions are subscribed to."""

import asyncio
from typing import Final

from sqlalchemy import bindparam, select, tuple_

from mq2mqtt.store import Subscription
from mq2mqtt.store.checks import unstorable
from mq2mqtt.store.database import Database
from mq2mqtt.store.tables import subscriptions
from mq2mqtt.store.writer import Writer

__all__ = ["SqlSubscriptionStore"]

_ROWS_AT_ONCE: Final = 1000
_KEY: Final = (subscriptions.c.client_id, subscriptions.c.filter)
_PAGE: Final = (
    select(*_KEY, subscriptions.c.qos, subscriptions.c.username)
    .where(
        subscriptions.c.node == bindparam("node"),
        tuple_(*_KEY) > tuple_(bindparam("client"), bindparam("filter")),
    )
    .order_by(*_KEY)
    .limit(_ROWS_AT_ONCE)
)


class SqlSubscriptionStore:
    """See `mq2mqtt.store.SubscriptionStore`."""

    def __init__(self, database: Database, writer: Writer, *, node: str) -> None:
        self._database = database
        self._writer = writer
        self._node = node

    def save(self, subscription: Subscription) -> asyncio.Future[None]:
        """See the protocol."""
        error = unstorable(keys=(subscription.client_id, subscription.filter), texts=(subscription.username,))
        if error is not None:
            return self._writer.refuse(error)
        return self._writer.submit(lambda batch: batch.subscriptions.save(subscription))

    def remove(self, client_id: str, topic_filter: str) -> asyncio.Future[None]:
        """See the protocol."""
        error = unstorable(keys=(client_id, topic_filter))
        if error is not None:
            return self._writer.refuse(error)
        return self._writer.submit(lambda batch: batch.subscriptions.remove(client_id, topic_filter), always=True)

    def forget(self, client_id: str) -> asyncio.Future[None]:
        """See the protocol."""
        error = unstorable(keys=(client_id,))
        if error is not None:
            return self._writer.refuse(error)
        return self._writer.submit(lambda batch: batch.subscriptions.forget(client_id), always=True)

    async def all(self) -> list[Subscription]:
        """See the protocol."""
        found: list[Subscription] = []
        client_id = topic_filter = ""
        while True:
            rows = await self._database.read(_PAGE, node=self._node, client=client_id, filter=topic_filter)
            found += [Subscription(*row) for row in rows]
            if len(rows) < _ROWS_AT_ONCE:
                return found
            client_id, topic_filter, *_ = rows[-1]
