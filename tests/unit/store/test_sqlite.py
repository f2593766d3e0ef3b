"""A SQLite file that is locked, full or foreign: nothing reported stored is lost, and the store recovers by itself."""

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from loguru import logger
from sqlalchemy import Executable, Select
from sqlalchemy.dialects import sqlite

from mq2mqtt.errors import ConfigError, StoreError
from mq2mqtt.store import Connect, MessageKind, StoredMessage, database, writer
from mq2mqtt.store.changes import Batch, Operation
from mq2mqtt.store.database import Database
from mq2mqtt.store.sql import SqlStore
from tests.faults.small_disk import SmallDisk
from tests.waiting import until


def message(number: int, *, payload: bytes = b"x") -> StoredMessage:
    return StoredMessage(number, "c", MessageKind.P2P, "r", "t", payload, 1, 0)


async def open_store(path: Path, *, power: bool = False) -> SqlStore:
    return await SqlStore.open(f"sqlite+aiosqlite:///{path}", node="one", power=power)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "var" / "db" / "store.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqlStore]:
    store = await open_store(path)
    yield store
    await store.close()


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged."""
    found: list[str] = []
    sink = logger.add(lambda line: found.append(line.record["message"]), level="INFO")
    yield found
    logger.remove(sink)


_LOCKING = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
connection.execute("ROLLBACK")
"""


async def test_a_database_that_another_process_locks_is_waited_for(
    path: Path, store: SqlStore, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_SLOW_SECONDS", 0.2)
    monkeypatch.setattr(writer, "_WAITING_OPERATIONS", 100)
    await store.offline.add(message(0))
    with subprocess.Popen(  # noqa: ASYNC220 - takes no time
        [sys.executable, "-c", _LOCKING, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as locking:
        assert locking.stdout is not None
        assert locking.stdout.readline() == b"locked\n"
        futures = [store.offline.add(message(number)) for number in range(1, 101)]
        removed = store.offline.remove([0])
        store.connects.began(Connect("c", "h", "", clean_session=True, connected_ms=0))
        # Before SQLite itself has an answer.
        await until(lambda: str(store.problem).startswith("store: a write has taken "))
        await until(lambda: store.problem == "store: database is locked")
        with pytest.raises(StoreError, match="database is locked"):
            await store.offline.add(message(101))
        # Reading goes on.
        assert [each.id for each in await store.offline.oldest("c", limit=9)] == [0]
        assert not any(future.done() for future in futures)
        locking.communicate()
    async with asyncio.timeout(60):
        await asyncio.gather(*futures, removed)

    assert store.problem is None
    assert await store.offline.counts() == {"c": 100}
    assert await store.connects.of("c") == []
    assert lines[0] == "store: database is locked; trying again until it works"
    assert lines[1].startswith("store: writes again, after ")
    assert len(lines) == 2


async def test_a_new_file_that_another_bridge_is_making_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.01)
    path.parent.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        opening = asyncio.create_task(open_store(path))
        await asyncio.sleep(0.5)
        assert not opening.done()
        other.execute("ROLLBACK")
    async with asyncio.timeout(60):
        await (await opening).close()


async def test_a_full_disk_is_waited_for(tmp_path: Path, lines: list[str]) -> None:
    with SmallDisk(tmp_path / "disk", megabytes=4) as disk:
        store = await open_store(disk.path / "store.db")
        try:
            await store.offline.add(message(0))
            disk.fill(spare_pages=20)
            futures = [store.offline.add(message(number, payload=b"x" * 900)) for number in range(1, 500)]
            await until(lambda: store.problem == "store: database or disk is full")
            assert not any(future.done() for future in futures)
            assert await store.offline.read(range(999)) == [message(0)]
            disk.free()
            async with asyncio.timeout(60):
                await asyncio.gather(*futures)
            assert await store.offline.counts() == {"c": 500}
            assert store.problem is None
        finally:
            await store.close()
    assert lines[0] == "store: database or disk is full; trying again until it works"
    assert len(lines) == 2


async def test_what_cannot_be_read_shows_as_a_problem_until_it_can(path: Path, store: SqlStore) -> None:
    with sqlite3.connect(path) as other:
        other.execute("ALTER TABLE offline RENAME TO away")
    with pytest.raises(StoreError):
        await store.offline.oldest("c", limit=1)
    assert store.problem == "store: no such table: offline"
    with sqlite3.connect(path) as other:
        other.execute("ALTER TABLE away RENAME TO offline")
    assert await store.offline.oldest("c", limit=1) == []
    assert store.problem is None


async def test_what_is_not_written_when_the_store_closes_has_failed(
    path: Path, store: SqlStore, lines: list[str]
) -> None:
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    futures = [store.offline.add(message(number)) for number in range(10)]
    abandoned = store.offline.add(message(10))
    abandoned.cancel()
    await store.close(seconds=0.1)
    blocker.close()

    for future in futures:
        with pytest.raises(StoreError, match="closed before"):
            await future
    assert lines[-1] == "store: closed with 11 changes not written"


async def test_more_than_may_wait_is_refused_but_removing_is_not(
    path: Path, store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_WAITING_BYTES", 1000)
    await store.offline.add(message(0, payload=b"x" * 5000))  # however large, the only one is taken
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    first, second = (store.offline.add(message(number, payload=b"x" * 500)) for number in (1, 2))
    with pytest.raises(StoreError, match="too much waits to be written") as caught:
        await store.offline.add(message(3))
    assert caught.value.retriable
    removed = store.offline.remove([0])
    blocker.execute("ROLLBACK")
    blocker.close()
    async with asyncio.timeout(60):
        await asyncio.gather(first, second, removed)
    await store.offline.add(message(4))

    assert [each.id for each in await store.offline.oldest_overall(limit=9)] == [1, 2, 4]


async def test_a_large_message_is_written_alone(store: SqlStore) -> None:
    futures = [store.offline.add(message(number, payload=b"x" * (3 << 20))) for number in range(4)]
    await futures[0]
    assert not futures[-1].done()
    await asyncio.gather(*futures)

    assert await store.offline.counts() == {"c": 4}


async def test_an_unexpected_error_is_logged_and_tried_again(
    store: SqlStore, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, fail = Batch.steps, [True, True]

    def failing(batch: Batch, node: str, dialect: str) -> object:
        if fail:
            fail.pop()
            raise KeyError("a bug")
        return steps(batch, node, dialect)

    monkeypatch.setattr(Batch, "steps", failing)
    async with asyncio.timeout(60):
        await store.offline.add(message(1))

    assert lines.count("store: unexpected error, trying again") == 2
    assert await store.offline.counts() == {"c": 1}


# What is there after all


@pytest.mark.parametrize(("power", "synchronous"), [(False, 1), (True, 2)])
async def test_the_log_is_written_ahead_and_synced_as_wished(
    path: Path,
    power: bool,  # noqa: FBT001
    synchronous: int,
) -> None:
    store = await open_store(path, power=power)
    async with store._database.transaction() as connection:  # noqa: SLF001 - nobody else can ask the connection that writes
        assert (await connection.exec_driver_sql("PRAGMA synchronous")).scalar() == synchronous
        assert (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar() == "wal"
    await store.close()


async def test_nobody_else_can_read_what_is_kept(path: Path, store: SqlStore) -> None:
    await store.offline.add(message(1))

    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
    assert {file.name for file in path.parent.iterdir()} >= {"store.db", "store.db-wal"}


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: path.write_bytes(b"something else" * 100), "file is not a database"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: sqlite3.connect(path).execute("CREATE TABLE offline (a)").connection.close(), "already exists"),
    ],
)
async def test_a_file_that_is_no_store_is_refused(path: Path, make: Callable[[Path], None], problem: str) -> None:
    path.parent.mkdir(parents=True)
    make(path)

    with pytest.raises(ConfigError, match=rf"^store\.url: .*store\.db: .*{problem}") as caught:
        await open_store(path)
    assert "\n" not in str(caught.value)


async def test_a_database_that_stays_locked_at_the_start_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.01)
    monkeypatch.setattr(database, "_BUSY_AT_START_SECONDS", 0.1)
    await (await open_store(path)).close()
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match=r"^store\.url: .*store\.db: database is locked$"):
        await open_store(path)
    blocker.close()


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match=r"^store\.url: cannot use .*/file: (Not a directory|File exists)$"):
        await open_store(tmp_path / "file" / "store.db")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("no url", "store.url: is no database URL"),
        ("postgresql+asyncpg://u:secret@h:port/db", "store.url: is no database URL"),
        (
            "mysql://u:secret@h/db",
            "store.url: mysql is not supported: use sqlite+aiosqlite or postgresql+asyncpg",
        ),
        ("sqlite+aiosqlite://", "store.url: names no file, as sqlite+aiosqlite:///var/mq2mqtt.db does"),
        ("sqlite+aiosqlite:///:memory:", "store.url: names no file, as sqlite+aiosqlite:///var/mq2mqtt.db does"),
    ],
)
async def test_a_url_that_leads_nowhere_is_one_line_without_the_password(url: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await SqlStore.open(url, node="one")
    assert str(caught.value) == problem


async def test_a_missing_driver_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)

    with pytest.raises(ConfigError) as caught:
        await SqlStore.open("postgresql+asyncpg://u@h/db", node="one")
    assert str(caught.value) == "store.url: asyncpg is not installed; in mq2mqtt's sources: pip install '.[postgresql]'"


@pytest.mark.parametrize(
    ("read", "plan"),
    [
        (lambda store: store.offline.oldest("c", limit=9), "node=? AND client_id=? AND id>?"),
        (lambda store: store.offline.oldest_overall(limit=9), "node=? AND id>?"),
        (lambda store: store.offline.expired(0, 9), "node=? AND expires_ms<?"),
        (lambda store: store.offline.missed("c", upto=9, limit=9), "node=? AND client_id=? AND id>? AND id<?"),
        (lambda store: store.offline.read([1, 2]), "node=? AND id=?"),
        (lambda store: store.offline.counts(), "node=? AND client_id>?"),
        (lambda store: store.offline.last_id(), "node=?"),
        (lambda store: store.subscriptions.all(), "node=? AND (client_id,filter)>(?,?)"),
        (lambda store: store.connects.of("c"), "node=? AND client_id=?"),
    ],
)
async def test_no_statement_reads_more_than_it_returns(
    path: Path,
    store: SqlStore,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[SqlStore], Awaitable[object]],
    plan: str,
) -> None:
    statements: list[Executable] = []
    really_read = Database.read

    async def note(database: Database, statement: Select[Any], **values: object) -> Sequence[Any]:
        statements.append(statement)
        return await really_read(database, statement, **values)

    monkeypatch.setattr(Database, "read", note)
    await read(store)

    assert [planned(path, statement) for statement in statements] == [[plan]]


@pytest.mark.parametrize(
    ("change", "plans"),
    [
        (lambda batch: batch.offline.remove([1]), ["node=? AND id=?"]),
        (lambda batch: batch.subscriptions.remove("c", "f"), ["node=? AND client_id=? AND filter=?"]),
        (lambda batch: batch.subscriptions.forget("c"), ["node=? AND client_id=?"]),
        (
            lambda batch: batch.connects.began(Connect("c", "h", "", clean_session=True, connected_ms=0)),
            ["node=? AND client_id=? AND connected_ms<?", "node=? AND client_id=?"],
        ),
        (lambda batch: batch.connects.ended("c", "h", 0, ""), ["node=? AND client_id=? AND channel_id=?"]),
        (lambda batch: batch.connects.trim(9), ["node=? AND connected_ms<?", "node=?"]),
    ],
)
async def test_no_statement_searches_more_than_it_changes(
    path: Path, store: SqlStore, change: Operation, plans: list[str]
) -> None:
    await store.offline.remove([])
    batch = Batch()
    change(batch)

    assert [plan for statement, _ in batch.steps("one", "sqlite") for plan in planned(path, statement)] == plans


def planned(path: Path, statement: Executable) -> list[str]:
    """Return by which columns of which index SQLite finds the rows; fail if it looks at all of them, or sorts."""
    text = str(statement.compile(dialect=sqlite.dialect()))  # type: ignore[attr-defined]
    # A list of values is put in when the statement is done.
    text = text.replace("__[POSTCOMPILE_ids]", "?, ?")
    connection = sqlite3.connect(path)
    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {text}", [None] * text.count("?"))]
    connection.close()
    assert not any("SCAN" in step or "TEMP B-TREE" in step for step in plan), plan
    return [step.partition("(")[2].removesuffix(")") for step in plan if "SEARCH" in step]
