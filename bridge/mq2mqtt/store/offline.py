"""The table `offline`: messages kept for clients."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Row, Select, func, select

from mq2mqtt.store import MessageKind, StoredMessage
from mq2mqtt.store.checks import unstorable
from mq2mqtt.store.database import Database
from mq2mqtt.store.properties import decode_properties
from mq2mqtt.store.tables import offline
from mq2mqtt.store.writer import Writer

__all__ = ["SqlOfflineStore"]

_CLIENTS_AT_ONCE: Final = 1000
_MESSAGE: Final = tuple(column for column in offline.c if column.name != "node")


class SqlOfflineStore:
    """See `mq2mqtt.store.OfflineStore`."""

    def __init__(self, database: Database, writer: Writer, *, node: str) -> None:
        self._database = database
        self._writer = writer
        self._own = offline.c.node == node

    def add(self, message: StoredMessage) -> asyncio.Future[None]:
        """See the protocol."""
        error = unstorable(
            keys=(message.client_id,),
            texts=(message.rule, message.topic, message.receipt),
            numbers=(message.id, message.stored_ms, message.expires_ms),
        )
        if error is not None:
            return self._writer.refuse(error)
        return self._writer.submit(lambda batch: batch.offline.add(message), size=len(message.payload))

    def remove(self, ids: Sequence[int]) -> asyncio.Future[None]:
        """See the protocol."""
        return self._writer.submit(lambda batch: batch.offline.remove(ids), always=True)

    async def oldest(self, client_id: str, *, after: int = -1, limit: int) -> list[StoredMessage]:
        """See the protocol."""
        of_client = (offline.c.client_id == client_id, offline.c.id > after)
        return await self._messages(select(*_MESSAGE).where(self._own, *of_client).order_by(offline.c.id).limit(limit))

    async def oldest_overall(self, limit: int) -> list[StoredMessage]:
        """See the protocol."""
        return await self._messages(select(*_MESSAGE).where(self._own).order_by(offline.c.id).limit(limit))

    async def expired(self, now_ms: int, limit: int) -> list[StoredMessage]:
        """See the protocol."""
        over = select(*_MESSAGE).where(self._own, offline.c.expires_ms <= now_ms)
        return await self._messages(over.order_by(offline.c.expires_ms).limit(limit))

    async def counts(self) -> dict[str, int]:
        """See the protocol."""
        counts: dict[str, int] = {}
        last = ""
        while True:
            page = (
                select(offline.c.client_id, func.count())
                .where(self._own, offline.c.client_id > last)
                .group_by(offline.c.client_id)
                .order_by(offline.c.client_id)
                .limit(_CLIENTS_AT_ONCE)
            )
            async with self._database.reading() as connection:
                rows = (await connection.execute(page)).all()
            counts.update((client_id, count) for client_id, count in rows)
            if len(rows) < _CLIENTS_AT_ONCE:
                return counts
            last = rows[-1][0]

    async def last_id(self) -> int:
        """See the protocol."""
        async with self._database.reading() as connection:
            found = await connection.scalar(select(func.max(offline.c.id)).where(self._own))
        return -1 if found is None else found

    async def _messages(self, statement: Select[Any]) -> list[StoredMessage]:
        async with self._database.reading() as connection:
            return [_message(row) for row in await connection.execute(statement)]


def _message(row: Row[Any]) -> StoredMessage:
    return StoredMessage(
        id=row.id,
        client_id=row.client_id,
        kind=MessageKind(row.kind),
        rule=row.rule,
        topic=row.topic,
        payload=row.payload,
        qos=row.qos,
        stored_ms=row.stored_ms,
        expires_ms=row.expires_ms,
        properties=None if row.properties is None else decode_properties(row.properties),
        receipt=row.receipt,
    )
