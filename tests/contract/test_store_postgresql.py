"""A PostgreSQL that ends, is silent or refuses: nothing reported stored is lost, and the store recovers by itself."""

import asyncio
from collections.abc import Iterator

import pytest
from loguru import logger

from mq2mqtt.errors import ConfigError, StoreError
from mq2mqtt.store import MessageKind, StoredMessage, database, writer
from mq2mqtt.store.sql import SqlStore, reach
from tests.postgresql import PostgreSQL
from tests.tcp_proxy import TcpProxy
from tests.waiting import until


def message(number: int) -> StoredMessage:
    return StoredMessage(number, "c", MessageKind.P2P, "r", "t", b"x" * 100, 1, 0)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged."""
    found: list[str] = []
    sink = logger.add(lambda line: found.append(line.record["message"]), level="INFO")
    yield found
    logger.remove(sink)


def assert_outages(lines: list[str], count: int) -> None:
    """One line at the beginning of each, one at its end."""
    assert len(lines) == 2 * count
    assert all(line.startswith("store: ") and line.endswith("; trying again until it works") for line in lines[::2])
    assert all(line.startswith("store: writes again, after ") for line in lines[1::2])


async def test_a_restart_under_load_loses_nothing(postgresql: PostgreSQL, lines: list[str]) -> None:
    store = await SqlStore.open(await postgresql.new_database(), node="one")
    reported: set[int] = set()
    enough = asyncio.Event()

    async def store_all() -> int:
        number = 0
        window = asyncio.Semaphore(600)

        def stored(future: asyncio.Future[None], number: int) -> None:
            window.release()
            future.result()
            reported.add(number)

        while not enough.is_set():
            await window.acquire()
            store.offline.add(message(number)).add_done_callback(lambda future, number=number: stored(future, number))  # type: ignore[misc]
            number += 1
        return number

    storing = asyncio.create_task(store_all(), name="storing")
    for _ in range(2):
        before = len(reported)
        await until(lambda before=before: len(reported) > before + 1_000)  # type: ignore[misc]
        postgresql.stop()
        await until(lambda: store.problem is not None)
        with pytest.raises(StoreError):
            await store.offline.counts()
        at_the_end = len(reported)
        postgresql.start()
        await until(lambda at_the_end=at_the_end: len(reported) > at_the_end)  # type: ignore[misc]
    enough.set()
    count = await storing
    await until(lambda: len(reported) == count)
    messages = await store.offline.oldest("c", limit=count + 1)
    await store.close()

    assert [each.id for each in messages] == list(range(count))
    assert store.problem is None
    assert_outages(lines, 2)


async def test_a_server_that_is_silent_shows_as_a_problem(
    postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(writer, "_SLOW_SECONDS", 0.2)
    monkeypatch.setattr(database, "_COMMAND_SECONDS", 3)
    monkeypatch.setattr(database, "_CONNECT_SECONDS", 3)
    url = await postgresql.new_database()
    with TcpProxy() as proxy:
        address = proxy.listen(f"127.0.0.1:{postgresql.port}")
        store = await SqlStore.open(url.replace(f"127.0.0.1:{postgresql.port}", address), node="one")
        await store.offline.add(message(1))
        proxy.swallow()
        future = store.offline.add(message(2))
        await until(lambda: str(store.problem).startswith("store: a write has taken "))
        await until(lambda: lines)
        assert not future.done()
        proxy.mend()
        async with asyncio.timeout(60):
            await future
        assert await store.offline.counts() == {"c": 2}
        await store.close()
    assert_outages(lines, 1)


async def test_the_same_node_elsewhere_waits_until_this_one_has_gone(postgresql: PostgreSQL, lines: list[str]) -> None:
    url = await postgresql.new_database()
    mine = await SqlStore.open(url, node="one")
    # Each within 30 s: then its lock is free.
    await postgresql.execute(
        "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    )
    other = await SqlStore.open(url, node="one")
    future = mine.offline.add(message(1))
    await until(lambda: str(mine.problem).startswith("store: another bridge uses node one in this database"))
    await other.close()
    async with asyncio.timeout(60):
        await future
    await mine.close()
    assert len(lines) == 2


async def test_a_new_bridge_waits_until_a_killed_one_has_gone(postgresql: PostgreSQL, lines: list[str]) -> None:
    url = await postgresql.new_database()
    old = await SqlStore.open(url, node="one")
    opening = asyncio.create_task(SqlStore.open(url, node="one"), name="opening")
    await until(lambda: lines)
    assert not opening.done()
    await old.close()
    async with asyncio.timeout(60):
        await (await opening).close()
    assert len(lines) == 1
    assert lines[0].startswith("store: another bridge uses node one in this database: ")
    assert lines[0].endswith("; waiting for 40 s at most")


async def test_a_server_that_is_away_is_one_line(postgresql: PostgreSQL, free_port: int) -> None:
    url = postgresql.url().replace(str(postgresql.port), str(free_port)).replace("@", ":secret@")
    with pytest.raises(StoreError) as caught:
        await SqlStore.open(url, node="one")
    assert str(caught.value) == (
        f"store.url: postgresql+asyncpg://mq2mqtt:***@127.0.0.1:{free_port}/postgres: Connect call failed "
        f"('127.0.0.1', {free_port})"
    )


async def test_what_the_server_refuses_is_one_line(postgresql: PostgreSQL) -> None:
    url = await postgresql.new_database()
    await postgresql.execute("DO $$ BEGIN CREATE ROLE poor LOGIN; EXCEPTION WHEN duplicate_object THEN END $$")
    poor = url.replace("mq2mqtt@", "poor@")
    for wrong, words in (
        (postgresql.url("nothing"), 'database "nothing" does not exist'),
        (postgresql.url(user="nobody"), 'role "nobody" does not exist'),
        (poor, "permission denied for schema public"),
    ):
        with pytest.raises(ConfigError) as caught:
            await SqlStore.open(wrong, node="one")
        assert str(caught.value) == f"store.url: {wrong}: {words}"


async def test_a_server_is_looked_for_without_making_tables(postgresql: PostgreSQL) -> None:
    url = await postgresql.new_database()
    assert await reach(url.replace("@", ":secret@"), node="one") == url.replace("@", ":***@")
    await postgresql.execute("CREATE TABLE schema_version (a INTEGER)", url=url)
    with pytest.raises(ConfigError) as caught:
        await reach(postgresql.url("nothing"), node="one")
    assert str(caught.value) == f'store.url: {postgresql.url("nothing")}: database "nothing" does not exist'
