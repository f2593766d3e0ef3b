"""The connections to the database: one that writes, some that read; a foreign error becomes one of ours here."""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from loguru import logger
from sqlalchemy import URL, Select, event, make_url, text
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from mq2mqtt.errors import ConfigError, StoreError, UnstorableError
from mq2mqtt.store.migrations import MIGRATIONS, Migration, migrate

__all__ = ["Database"]

_DRIVERS: Final = ("sqlite+aiosqlite", "postgresql+asyncpg")
_READERS: Final = 4
_BUSY_SECONDS: Final = 2.0
"""How long SQLite waits for another process that writes, before it says that the database is locked."""
_CONNECT_SECONDS: Final = 10
_COMMAND_SECONDS: Final = 30
_TAKEN_SECONDS: Final = 40.0
"""How long a bridge that was killed may keep its node, until PostgreSQL has seen that it has gone."""
_START_PAUSE: Final = 0.2
_BUSY_AT_START_SECONDS: Final = 10.0
"""How long others may make the tables. Where one switches to the write-ahead log SQLite does not wait by itself."""
# It sees it in 30 s when a machine or a network went without a word.
_KEEP_ALIVE: Final = {"tcp_keepalives_idle": "15", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3"}
# Classes of SQLSTATE: data exception, integrity constraint violation.
_UNSTORABLE: Final = ("22", "23")
# Connection exception, insufficient resources, operator intervention (it is starting, or stopping).
_AWAY: Final = ("08", "53", "57")


class _NodeTakenError(StoreError):
    """Another process writes the rows of this node."""


class _BusyError(StoreError):
    """Another process has locked SQLite's file just now."""


class Database:
    """A database whose tables are there. `dialect` is `sqlite` or `postgresql`, `node` whose rows these are."""

    def __init__(self, url: str, *, node: str, power: bool) -> None:
        """Read `url`; connects to nothing.

        Raises:
            ConfigError: it is no URL of a database that can be used.
        """
        self._url = _parsed(url)
        self._node = node
        self._power = power
        self._lock: int | None = None
        self._reading = asyncio.Semaphore(_READERS)
        self.read_problem: str | None = None
        """Why the last read failed; `None` when it did not."""
        self.dialect = self._url.get_backend_name()
        self.place = self._url.render_as_string(hide_password=True)
        """The URL, for people."""
        try:
            self._writer = self._engine(pool_size=1)
            self._reader = self._engine(pool_size=_READERS, isolation_level="AUTOCOMMIT", pool_reset_on_return=None)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"store.url: {error.name} is not installed; in mq2mqtt's sources: pip install '.[postgresql]'"
            ) from error
        event.listen(self._writer.sync_engine, "connect", self._prepare_writer)
        event.listen(self._reader.sync_engine, "connect", self._prepare_reader)
        if self.dialect == "sqlite":
            event.listen(self._writer.sync_engine, "begin", _begin_to_write)

    def _engine(self, **options: Any) -> AsyncEngine:  # noqa: ANN401 - as `create_async_engine`
        if self.dialect == "sqlite":
            # The module would begin transactions by itself, and only before some statements.
            arguments: dict[str, object] = {"isolation_level": None, "timeout": _BUSY_SECONDS}
        else:
            arguments = {
                "timeout": _CONNECT_SECONDS,
                "command_timeout": _COMMAND_SECONDS,
                "server_settings": {"application_name": f"mq2mqtt {self._node}", **_KEEP_ALIVE},
            }
        return create_async_engine(
            self._url,
            connect_args=arguments,
            max_overflow=0,
            # A connection that a restart of the server has ended is found before it is used.
            pool_pre_ping=self.dialect == "postgresql",
            hide_parameters=True,
            **options,
        )

    async def open(self, migrations: Sequence[Migration] = MIGRATIONS) -> None:
        """Make the database ready: its directory, its tables.

        Raises:
            ConfigError: somebody has to change something first.
            StoreError: it is away, or busy.
        """
        try:
            if self.dialect == "sqlite":
                self._lock = _own_file(Path(str(self._url.database)), self._node)
            await self._make_tables(migrations)
        except BaseException:
            await self.close()
            raise

    async def reach(self) -> None:
        """Connect and ask something, changing nothing. For PostgreSQL: SQLite would make a file.

        Raises:
            ConfigError: as `open`.
            StoreError: as `open`.
        """
        with self._at_start():
            async with self._reader.connect() as connection:
                await connection.execute(text("SELECT 1"))

    async def _make_tables(self, migrations: Sequence[Migration]) -> None:
        began = time.monotonic()
        said = False
        while True:
            try:
                while await self._migrate(migrations):
                    pass
            except _BusyError:
                if time.monotonic() > began + _BUSY_AT_START_SECONDS:
                    raise
            except _NodeTakenError as error:
                if time.monotonic() > began + _TAKEN_SECONDS:
                    raise ConfigError(f"store.url: {_taken(self._node)}") from error
                if not said:
                    said = True
                    logger.warning("{}; waiting for {:.0f} s at most", error, _TAKEN_SECONDS)
            else:
                return
            # Not all at once again.
            await asyncio.sleep(_START_PAUSE * random.uniform(0.1, 1.0))  # noqa: S311 - no secret

    async def _migrate(self, migrations: Sequence[Migration]) -> bool:
        with self._at_start():
            async with self._writer.begin() as connection:
                return await connection.run_sync(migrate, migrations)

    @contextlib.contextmanager
    def _at_start(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            raise _kind_at_start(error)(f"store.url: {self.place}: {_words(error)}") from error

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Give the connection that writes; what is done with it is committed at the end.

        Raises:
            UnstorableError: the database can never hold one of the values.
            StoreError: it did not do it.
        """
        with _translating():
            async with self._writer.begin() as connection:
                yield connection

    async def read(self, statement: Select[Any], **values: object) -> Sequence[Any]:
        """Return the rows that are found.

        Raises:
            StoreError: the database does not answer.
        """
        # Not the pool's queue: to get there takes a tenth of a millisecond, and a thousand clients may return at once.
        async with self._reading:
            try:
                with _translating():
                    async with self._reader.connect() as connection:
                        rows: Sequence[Any] = (await connection.execute(statement, values)).all()
            except StoreError as error:
                self.read_problem = str(error)
                raise
            self.read_problem = None
            return rows

    async def close(self) -> None:
        """End all connections. Idempotent."""
        await self._writer.dispose()
        await self._reader.dispose()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _prepare_writer(self, connection: Any, _record: object) -> None:  # noqa: ANN401 - SQLAlchemy's adapted one
        if self.dialect == "sqlite":
            _run(connection, "PRAGMA temp_store=MEMORY")
            _run(connection, "PRAGMA journal_mode=WAL")
            _run(connection, f"PRAGMA synchronous={'FULL' if self._power else 'NORMAL'}")
            # Or the log keeps the size that it once had.
            _run(connection, "PRAGMA journal_size_limit=67108864")
            return
        # Ends with the connection: whoever writes holds it.
        if not _run(connection, f"SELECT pg_try_advisory_lock({_lock_number(self._node)})"):
            connection.terminate()
            raise _NodeTakenError(f"store: {_taken(self._node)}")
        connection.commit()

    def _prepare_reader(self, connection: Any, _record: object) -> None:  # noqa: ANN401 - as above
        if self.dialect == "sqlite":
            _run(connection, "PRAGMA temp_store=MEMORY")
            _run(connection, "PRAGMA query_only=ON")


def _parsed(url: str) -> URL:
    # The text is never shown: it may hold a password.
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError("store.url: is no database URL") from None
    if parsed.drivername not in _DRIVERS:
        raise ConfigError(f"store.url: {parsed.drivername} is not supported: use {' or '.join(_DRIVERS)}")
    if parsed.drivername == "sqlite+aiosqlite" and parsed.database in {None, "", ":memory:"}:
        raise ConfigError("store.url: names no file, as sqlite+aiosqlite:///var/mq2mqtt.db does")
    return parsed


def _own_file(path: Path, node: str) -> int:
    """Make the database's directory, and see to it that no other bridge has the rows of `node`."""
    lock = path.with_name(f"{path.name}.{node}.lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # What devices are told is nobody else's business; SQLite's other files take their mode from this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"store.url: cannot use {error.filename}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(f"store.url: {_taken(node)}") from error
    return descriptor


def _taken(node: str) -> str:
    return (
        f"another bridge uses node {node} in this database: stop it, or give this one a node or a database of its own"
    )


def _lock_number(node: str) -> int:
    digest = hashlib.blake2b(f"mq2mqtt {node}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def _run(connection: Any, statement: str) -> Any:  # noqa: ANN401 - SQLAlchemy's adapted ones
    cursor = connection.cursor()
    cursor.execute(statement)
    row = cursor.fetchone() if cursor.description else None
    cursor.close()
    return row and row[0]


def _begin_to_write(connection: Any) -> None:  # noqa: ANN401 - sqlalchemy.Connection, which knows no types here
    # Another process that writes is waited for here; in the middle of a transaction SQLite would not wait.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextlib.contextmanager
def _translating() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        kind = UnstorableError if _is_unstorable(error) else StoreError
        raise kind(f"store: {_words(error)}") from error


def _is_unstorable(error: BaseException) -> bool:
    return isinstance(error, IntegrityError | DataError) or _state(error) in _UNSTORABLE


def _kind_at_start(error: BaseException) -> type[ConfigError | StoreError]:
    name = getattr(getattr(error, "orig", None), "sqlite_errorname", "")
    if name.startswith("SQLITE_BUSY"):
        return _BusyError
    away = isinstance(error, OSError) or _state(error) in _AWAY or name == "SQLITE_FULL"
    return StoreError if away else ConfigError


def _state(error: BaseException) -> str:
    """Return the class of the SQLSTATE that PostgreSQL gave."""
    return (getattr(getattr(error, "orig", None), "sqlstate", None) or "")[:2]


def _words(error: BaseException) -> str:
    """Return what went wrong in one line, without the statement and its values."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    words = (isinstance(error, OSError) and error.strerror) or str(error)
    return words.partition("\n")[0] or type(error).__name__
