"""The table `offline`: messages kept for clients."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from sqlalchemy import Row, Select, bindparam, func, select

from mq2mqtt.store import MessageHead, MessageKind, StoredMessage
from mq2mqtt.store.changes import Batch
from mq2mqtt.store.checks import unstorable
from mq2mqtt.store.database import Database
from mq2mqtt.store.properties import decode_properties
from mq2mqtt.store.tables import offline
from mq2mqtt.store.writer import BATCH_ROWS, Writer

__all__ = ["SqlOfflineStore"]

_CLIENTS_AT_ONCE: Final = 1000

# Made once: to make one takes longer than to do it.
_OWN: Final = offline.c.node == bindparam("node")
_HEADS: Final = (
    select(
        *(offline.c[name] for name in ("id", "client_id", "rule", "topic", "receipt")),
        func.length(offline.c.payload).label("size"),
    )
    .where(_OWN)
    .limit(bindparam("limit"))
)
_OLDEST_OVERALL: Final = _HEADS.where(offline.c.id > bindparam("after")).order_by(offline.c.id)
_OLDEST: Final = _OLDEST_OVERALL.where(offline.c.client_id == bindparam("client"))
_MISSED: Final = _OLDEST.where(offline.c.kind == MessageKind.SESSION.value, offline.c.id <= bindparam("upto"))
_EXPIRED: Final = _HEADS.where(offline.c.expires_ms <= bindparam("now")).order_by(offline.c.expires_ms)
_MESSAGES: Final = (
    select(*(column for column in offline.c if column.name != "node"))
    .where(_OWN, offline.c.id.in_(bindparam("ids", expanding=True)))
    .order_by(offline.c.id)
)
_COUNTS: Final = (
    select(offline.c.client_id, func.count())
    .where(_OWN, offline.c.client_id > bindparam("after"))
    .group_by(offline.c.client_id)
    .order_by(offline.c.client_id)
    .limit(_CLIENTS_AT_ONCE)
)
_LAST_ID: Final = select(func.max(offline.c.id)).where(_OWN)


class SqlOfflineStore:
    """See `mq2mqtt.store.OfflineStore`."""

    def __init__(self, database: Database, writer: Writer, *, node: str) -> None:
        self._database = database
        self._writer = writer
        self._node = node

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
        # They are done in this order, so the last one's future is that of all.
        for first in range(0, len(ids) - BATCH_ROWS, BATCH_ROWS):
            done = self._writer.submit_first(partial(_remove, ids[first : first + BATCH_ROWS]), rows=BATCH_ROWS)
            done.add_done_callback(lambda done: done.cancelled() or done.exception())
        last = ids[(len(ids) - 1) // BATCH_ROWS * BATCH_ROWS :]
        return self._writer.submit_first(partial(_remove, last), rows=len(last))

    async def oldest(self, client_id: str, *, after: int = -1, limit: int) -> list[MessageHead]:
        """See the protocol."""
        return await self._heads(_OLDEST, client=client_id, after=after, limit=limit)

    async def oldest_overall(self, *, after: int = -1, limit: int) -> list[MessageHead]:
        """See the protocol."""
        return await self._heads(_OLDEST_OVERALL, after=after, limit=limit)

    async def missed(self, client_id: str, *, upto: int, after: int = -1, limit: int) -> list[MessageHead]:
        """See the protocol."""
        return await self._heads(_MISSED, client=client_id, upto=upto, after=after, limit=limit)

    async def expired(self, now_ms: int, limit: int) -> list[MessageHead]:
        """See the protocol."""
        return await self._heads(_EXPIRED, now=now_ms, limit=limit)

    async def read(self, ids: Sequence[int]) -> list[StoredMessage]:
        """See the protocol."""
        return [_message(row) for row in await self._database.read(_MESSAGES, node=self._node, ids=ids)]

    async def counts(self) -> dict[str, int]:
        """See the protocol."""
        counts: dict[str, int] = {}
        last = ""
        while True:
            rows = await self._database.read(_COUNTS, node=self._node, after=last)
            counts.update((client_id, count) for client_id, count in rows)
            if len(rows) < _CLIENTS_AT_ONCE:
                return counts
            last = rows[-1][0]

    async def last_id(self) -> int:
        """See the protocol."""
        ((highest,),) = await self._database.read(_LAST_ID, node=self._node)
        return -1 if highest is None else highest

    async def _heads(self, statement: Select[Any], **values: object) -> list[MessageHead]:
        return [MessageHead(*row) for row in await self._database.read(statement, node=self._node, **values)]


def _remove(ids: Sequence[int], batch: Batch) -> None:
    batch.offline.remove(ids)


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
