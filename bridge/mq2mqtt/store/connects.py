"""The table `connects`: past and present connections."""

from typing import Final

from sqlalchemy import bindparam, select

from mq2mqtt.store import CONNECTS_PER_CLIENT, Connect
from mq2mqtt.store.checks import unstorable
from mq2mqtt.store.database import Database
from mq2mqtt.store.tables import connects
from mq2mqtt.store.writer import Writer

__all__ = ["CONNECTS_KEPT", "SqlConnectStore"]

CONNECTS_KEPT: Final = 1_000_000
"""Of all clients of a node: ids that never come back would fill the disk."""
_TRIM_EVERY: Final = 1000

_OF_CLIENT: Final = (
    select(*(column for column in connects.c if column.name != "node"))
    .where(connects.c.node == bindparam("node"), connects.c.client_id == bindparam("client"))
    .order_by(connects.c.connected_ms.desc())
    .limit(bindparam("limit"))
)


class SqlConnectStore:
    """See `mq2mqtt.store.ConnectStore`."""

    def __init__(self, database: Database, writer: Writer, *, node: str) -> None:
        self._database = database
        self._writer = writer
        self._node = node
        # With the first: a bridge may never live to see so many.
        self._until_trim = 1

    def began(self, connect: Connect) -> None:
        """See the protocol."""
        values = (connect.client_id, connect.channel_id)
        if unstorable(keys=values, texts=(connect.client_ip, connect.reason)) is None:
            self._writer.note(lambda batch: batch.connects.began(connect))
        self._until_trim -= 1
        if self._until_trim == 0:
            self._until_trim = _TRIM_EVERY
            self._writer.note(lambda batch: batch.connects.trim(CONNECTS_KEPT))

    def ended(self, client_id: str, channel_id: str, *, ended_ms: int, reason: str) -> None:
        """See the protocol."""
        if unstorable(keys=(client_id, channel_id), texts=(reason,)) is None:
            self._writer.note(lambda batch: batch.connects.ended(client_id, channel_id, ended_ms, reason))

    async def of(self, client_id: str, *, limit: int = CONNECTS_PER_CLIENT) -> list[Connect]:
        """See the protocol."""
        rows = await self._database.read(_OF_CLIENT, node=self._node, client=client_id, limit=limit)
        return [Connect(*row) for row in rows]
