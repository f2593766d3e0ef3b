"""The tables, as one migration after another makes them. A migration that was released is never changed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, text

from mq2mqtt.errors import ConfigError

__all__ = ["MIGRATIONS", "Migration", "migrate"]

# Any number will do, as long as every version of the bridge uses the same.
_MIGRATING: Final = 0x6D71_326D_7174_74


@dataclass(frozen=True, slots=True)
class _Types:
    """What the databases call differently."""

    blob: str
    # Client ids are compared byte by byte: a language's order is slower, and differs between servers.
    key: str


_TYPES: Final = {"sqlite": _Types(blob="BLOB", key="TEXT"), "postgresql": _Types(blob="BYTEA", key='TEXT COLLATE "C"')}

Migration = Callable[[Connection], None]
"""Brings the tables from one version to the next, inside a transaction."""


def _first_tables(connection: Connection) -> None:
    types = _TYPES[connection.dialect.name]
    _run(
        connection,
        f"""CREATE TABLE offline (
            node {types.key} NOT NULL,
            id BIGINT NOT NULL,
            client_id {types.key} NOT NULL,
            kind TEXT NOT NULL,
            rule TEXT NOT NULL,
            topic TEXT NOT NULL,
            payload {types.blob} NOT NULL,
            qos SMALLINT NOT NULL,
            stored_ms BIGINT NOT NULL,
            expires_ms BIGINT,
            properties TEXT,
            receipt TEXT,
            PRIMARY KEY (node, id)
        )""",
        "CREATE INDEX offline_of_client ON offline (node, client_id, id)",
        "CREATE INDEX offline_expiry ON offline (node, expires_ms) WHERE expires_ms IS NOT NULL",
        f"""CREATE TABLE subscriptions (
            node {types.key} NOT NULL,
            client_id {types.key} NOT NULL,
            filter {types.key} NOT NULL,
            qos SMALLINT NOT NULL,
            username TEXT,
            PRIMARY KEY (node, client_id, filter)
        )""",
        f"""CREATE TABLE connects (
            node {types.key} NOT NULL,
            client_id {types.key} NOT NULL,
            channel_id {types.key} NOT NULL,
            client_ip TEXT NOT NULL,
            clean_session BOOLEAN NOT NULL,
            connected_ms BIGINT NOT NULL,
            ended_ms BIGINT,
            reason TEXT NOT NULL,
            PRIMARY KEY (node, client_id, channel_id)
        )""",
        "CREATE INDEX connects_of_client ON connects (node, client_id, connected_ms)",
        "CREATE INDEX connects_by_time ON connects (node, connected_ms)",
    )


MIGRATIONS: Final[Sequence[Migration]] = (_first_tables,)
"""The first one makes version 1."""


def migrate(connection: Connection, migrations: Sequence[Migration]) -> bool:
    """Do the next migration, in the transaction that `connection` is in; return whether there was one to do.

    Bridges that start at once do it one after the other: the transaction holds a lock until it ends.

    Raises:
        ConfigError: a newer version of the bridge made the tables.
    """
    if connection.dialect.name == "postgresql":
        # SQLite's transaction is the only one that writes.
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATING})
    _run(connection, "CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL PRIMARY KEY)")
    version = connection.execute(text("SELECT max(version) FROM schema_version")).scalar() or 0
    if version > len(migrations):
        raise ConfigError(
            f"store.url: the database has schema version {version}, this mq2mqtt knows {len(migrations)}: a newer one "
            "made it; run that, or name another database"
        )
    if version == len(migrations):
        return False
    migrations[version](connection)
    connection.execute(text("INSERT INTO schema_version (version) VALUES (:version)"), {"version": version + 1})
    return True


def _run(connection: Connection, *statements: str) -> None:
    for statement in statements:
        connection.execute(text(statement))
