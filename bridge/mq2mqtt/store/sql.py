"""The store in a SQL database: SQLite or PostgreSQL, whichever the URL names."""

from mq2mqtt.store.connects import SqlConnectStore
from mq2mqtt.store.database import Database
from mq2mqtt.store.offline import SqlOfflineStore
from mq2mqtt.store.subscriptions import SqlSubscriptionStore
from mq2mqtt.store.writer import Writer

__all__ = ["SqlStore", "reach"]


class SqlStore:
    """See `mq2mqtt.store.Store`; made by `open`."""

    def __init__(self, database: Database, *, node: str) -> None:
        self._database = database
        self._writer = Writer(database, node=node)
        self.offline = SqlOfflineStore(database, self._writer, node=node)
        self.subscriptions = SqlSubscriptionStore(database, self._writer, node=node)
        self.connects = SqlConnectStore(database, self._writer, node=node)

    @classmethod
    async def open(cls, url: str, *, node: str, power: bool = False) -> "SqlStore":
        """Connect, make or migrate the tables, and start the task that writes.

        `power`: what is reported stored survives a loss of power too, with SQLite; PostgreSQL decides that itself.

        Raises:
            ConfigError: the operator has to change something first.
            StoreError: the database is away, or busy.
        """
        database = Database(url, node=node, power=power)
        await database.open()
        return cls(database, node=node)

    @property
    def problem(self) -> str | None:
        """See the protocol."""
        return self._writer.problem or self._database.read_problem

    async def close(self, *, seconds: float = 3.0) -> None:
        """See the protocol."""
        await self._writer.close(seconds=seconds)
        await self._database.close()


async def reach(url: str, *, node: str) -> str | None:
    """Connect to the server at `url`, if it names one; return its name, `None` for a file, which is not looked at.

    Raises:
        ConfigError: the operator has to change something first.
        StoreError: the database is away, or busy.
    """
    database = Database(url, node=node, power=False)
    if database.dialect == "sqlite":
        return None
    try:
        await database.reach()
    finally:
        await database.close()
    return database.place
