"""The tables' columns, for the statements; `migrations.py` makes them."""

from typing import Final

from sqlalchemy import BigInteger, Boolean, Column, LargeBinary, MetaData, SmallInteger, Table, Text

__all__ = ["connects", "offline", "subscriptions"]

_METADATA: Final = MetaData()

offline: Final = Table(
    "offline",
    _METADATA,
    Column("node", Text, primary_key=True),
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("client_id", Text),
    Column("kind", Text),
    Column("rule", Text),
    Column("topic", Text),
    Column("payload", LargeBinary),
    Column("qos", SmallInteger),
    Column("stored_ms", BigInteger),
    Column("expires_ms", BigInteger),
    Column("properties", Text),
    Column("receipt", Text),
)

subscriptions: Final = Table(
    "subscriptions",
    _METADATA,
    Column("node", Text, primary_key=True),
    Column("client_id", Text, primary_key=True),
    Column("filter", Text, primary_key=True),
    Column("qos", SmallInteger),
    Column("username", Text),
)

connects: Final = Table(
    "connects",
    _METADATA,
    Column("node", Text, primary_key=True),
    Column("client_id", Text, primary_key=True),
    Column("channel_id", Text, primary_key=True),
    Column("client_ip", Text),
    Column("clean_session", Boolean),
    Column("connected_ms", BigInteger),
    Column("ended_ms", BigInteger),
    Column("reason", Text),
)
