"""What every store does, shown on SQLite and on a real PostgreSQL."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from mq2mqtt.errors import ConfigError, StoreError, UnstorableError
from mq2mqtt.message import MqttProperties
from mq2mqtt.store import CONNECTS_PER_CLIENT, Connect, MessageHead, MessageKind, Store, StoredMessage, Subscription
from mq2mqtt.store.database import Database
from mq2mqtt.store.migrations import MIGRATIONS
from mq2mqtt.store.sql import SqlStore
from tests.postgresql import PostgreSQL

OpenStore = Callable[..., Awaitable[Store]]
"""`await open_store()`, or `open_store(node=...)`; closed at the end of the test."""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new database."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/var/store.db"
    server = request.getfixturevalue("postgresql")
    assert isinstance(server, PostgreSQL)
    return asyncio.run(server.new_database())


@pytest.fixture
async def open_store(url: str) -> AsyncIterator[OpenStore]:
    opened: list[Store] = []

    async def open_(node: str = "one") -> Store:
        store = await SqlStore.open(url, node=node)
        opened.append(store)
        return store

    yield open_
    for store in opened:
        await store.close()


@pytest.fixture
async def store(open_store: OpenStore) -> Store:
    return await open_store()


def message(number: int, client_id: str = "GID_dev@@@1", *, expires_ms: int | None = None) -> StoredMessage:
    return StoredMessage(
        id=number,
        client_id=client_id,
        kind=MessageKind.P2P,
        rule="commands-in",
        topic=f"devices/p2p/{client_id}",
        payload=b"%d" % number,
        qos=1,
        stored_ms=1_795_000_000_000 + number,
        expires_ms=expires_ms,
    )


async def add(store: Store, messages: Sequence[StoredMessage]) -> None:
    async with asyncio.timeout(60):
        await asyncio.gather(*(store.offline.add(each) for each in messages))


async def execute(url: str, *statements: str) -> None:
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))


def ids(messages: Sequence[StoredMessage | MessageHead]) -> list[int]:
    return [each.id for each in messages]


# Messages


async def test_messages_come_back_as_they_were(open_store: OpenStore) -> None:
    kept = [
        message(0),
        StoredMessage(
            id=2**62,
            client_id="GID_dev@@@ß'\"%\N{PILE OF POO}",
            kind=MessageKind.SESSION,
            rule="r",
            topic="a/ü//b",
            payload=bytes(range(256)) * 4096,
            qos=2,
            stored_ms=1,
            expires_ms=2**62,
            properties=MqttProperties("text/ü", 7, (("a", "1"), ("a", "\0\ud800"), ("", ""))),
            receipt='{"keys": "a b"}',
        ),
        replace(message(2**62 + 1), payload=b"", properties=MqttProperties()),
    ]
    first = await open_store()
    await add(first, kept)
    await first.close()

    second = await open_store()
    assert await second.offline.read([each.id for each in kept]) == kept
    assert await second.offline.read([kept[1].id, 1, kept[0].id]) == kept[:2]
    assert await second.offline.oldest_overall(limit=10) == [
        MessageHead(each.id, each.client_id, each.rule, each.topic, each.receipt, len(each.payload)) for each in kept
    ]


async def test_a_client_has_its_own_oldest_first_after_a_given_one(store: Store) -> None:
    await add(store, [message(number, f"c{number % 2}") for number in (3, 8, 5, 1, 6, 7)])

    assert ids(await store.offline.oldest("c1", limit=3)) == [1, 3, 5]
    assert ids(await store.offline.oldest("c1", after=3, limit=9)) == [5, 7]
    assert await store.offline.oldest("c1", after=7, limit=9) == []
    assert await store.offline.oldest("nobody", limit=9) == []
    assert ids(await store.offline.oldest_overall(limit=4)) == [1, 3, 5, 6]
    assert ids(await store.offline.oldest_overall(after=3, limit=2)) == [5, 6]
    assert await store.offline.last_id() == 8


async def test_what_a_session_missed_is_found_apart_from_what_is_for_the_client(store: Store) -> None:
    await add(store, [message(number) for number in range(3)])
    await add(store, [replace(message(number), kind=MessageKind.SESSION) for number in range(3, 9)])

    assert ids(await store.offline.missed("GID_dev@@@1", upto=7, limit=9)) == [3, 4, 5, 6, 7]
    assert ids(await store.offline.missed("GID_dev@@@1", upto=7, after=4, limit=2)) == [5, 6]
    assert await store.offline.missed("GID_dev@@@2", upto=7, limit=9) == []


async def test_clients_are_counted_however_many(store: Store) -> None:
    assert await store.offline.counts() == {}
    assert await store.offline.last_id() == -1
    clients = [f"client {number}" for number in range(2_100)]
    await add(store, [message(number, client) for number, client in enumerate([*clients, *clients[:50]])])

    assert await store.offline.counts() == dict.fromkeys(clients, 1) | dict.fromkeys(clients[:50], 2)


async def test_what_is_expired_is_shown_until_it_is_removed(store: Store) -> None:
    await add(store, [message(1, expires_ms=30), message(2), message(3, expires_ms=20), message(4, expires_ms=31)])

    assert ids(await store.offline.expired(30, 10)) == [3, 1]
    assert ids(await store.offline.expired(30, 1)) == [3]
    await store.offline.remove([3])
    assert ids(await store.offline.expired(30, 10)) == [1]
    assert await store.offline.expired(19, 10) == []


async def test_an_id_that_is_there_is_left_as_it_is(store: Store) -> None:
    await add(store, [message(1, "first")])
    await add(store, [message(1, "second")])
    await add(store, [message(2, "first"), message(2, "second")])

    assert await store.offline.counts() == {"first": 2}


async def test_removing_waits_for_nothing_that_is_to_be_added(store: Store) -> None:
    await add(store, [message(number) for number in range(1_000)])
    done: list[str] = []
    futures = [store.offline.add(message(number)) for number in range(1_000, 5_000)]
    for first in range(0, 1_000, 100):
        futures.append(store.offline.remove(range(first, first + 100)))
        futures[-1].add_done_callback(lambda _: done.append("removed"))
    futures[3_999].add_done_callback(lambda _: done.append("last added"))
    async with asyncio.timeout(60):
        await asyncio.gather(*futures)

    assert done == [*["removed"] * 10, "last added"]
    assert await store.offline.counts() == {"GID_dev@@@1": 4_000}


async def test_what_is_removed_can_be_added_again(store: Store) -> None:
    await store.offline.add(message(3))
    store.offline.remove([3, 99])
    await store.offline.add(message(3, "again"))

    assert await store.offline.read([3]) == [message(3, "again")]


@pytest.mark.parametrize("count", [0, 1, 500, 501, 1_700])
async def test_any_number_is_removed_at_once(store: Store, count: int) -> None:
    await add(store, [message(number) for number in range(count + 1)])
    async with asyncio.timeout(60):
        await store.offline.remove(range(count))

    assert ids(await store.offline.oldest_overall(limit=9)) == [count]


@pytest.mark.parametrize(
    "wrong",
    [
        replace(message(1), client_id="a\0"),
        replace(message(1), client_id="\ud800"),
        replace(message(1), client_id="x" * 1025),
        replace(message(1), client_id="ü" * 513),
        replace(message(1), topic="a\0"),
        replace(message(1), receipt="\udfff"),
        message(2**63),
        message(1, expires_ms=2**63),
    ],
    ids=range(8),
)
async def test_what_cannot_be_stored_harms_nobody_else(store: Store, wrong: StoredMessage) -> None:
    first, refused, last = map(store.offline.add, (message(4), wrong, message(6)))
    with pytest.raises(UnstorableError):
        await refused
    await asyncio.gather(first, last)

    assert ids(await store.offline.oldest_overall(limit=9)) == [4, 6]


async def test_what_the_database_alone_refuses_harms_nobody_else(url: str, store: Store) -> None:
    if url.startswith("sqlite"):
        body = "BEFORE INSERT ON offline WHEN NEW.topic = 'bad' BEGIN SELECT RAISE(ABORT, 'no bad ones here'); END"
        await execute(url, f"CREATE TRIGGER no_bad_ones {body}")
    else:
        await execute(url, "ALTER TABLE offline ADD CONSTRAINT no_bad_ones CHECK (topic <> 'bad')")
    futures = [store.offline.add(replace(message(n), topic="bad" if n in {5, 6, 90} else "t")) for n in range(100)]
    async with asyncio.timeout(60):
        outcomes = await asyncio.gather(*futures, return_exceptions=True)

    assert [number for number, outcome in enumerate(outcomes) if isinstance(outcome, UnstorableError)] == [5, 6, 90]
    assert await store.offline.counts() == {"GID_dev@@@1": 97}
    assert store.problem is None


# Subscriptions


async def test_subscriptions_are_saved_replaced_and_removed(store: Store) -> None:
    await store.subscriptions.save(Subscription("b", "x/#", 1))
    await store.subscriptions.save(Subscription("a", "x/#", 1))
    await store.subscriptions.save(Subscription("a", "x/+", 2))
    await store.subscriptions.save(Subscription("a", "x/#", 0, "me"))
    await store.subscriptions.remove("a", "nothing")
    assert await store.subscriptions.all() == [
        Subscription("a", "x/#", 0, "me"),
        Subscription("a", "x/+", 2),
        Subscription("b", "x/#", 1),
    ]

    await store.subscriptions.remove("a", "x/#")
    await store.subscriptions.forget("b")
    assert await store.subscriptions.all() == [Subscription("a", "x/+", 2)]


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        (["save", "remove"], False),
        (["save", "forget"], False),
        (["save", "remove", "save"], True),
        (["save", "forget", "save"], True),
        (["forget", "save"], True),
        (["remove", "save", "forget"], False),
    ],
)
@pytest.mark.parametrize("there", [False, True])
async def test_the_last_word_on_a_subscription_counts(
    store: Store,
    steps: list[str],
    left: bool,  # noqa: FBT001
    there: bool,  # noqa: FBT001
) -> None:
    if there:
        await store.subscriptions.save(Subscription("a", "f", 2))
    # All in one transaction.
    calls = {
        "save": lambda: store.subscriptions.save(Subscription("a", "f", 1)),
        "remove": lambda: store.subscriptions.remove("a", "f"),
        "forget": lambda: store.subscriptions.forget("a"),
    }
    await asyncio.gather(*(calls[step]() for step in steps))

    assert await store.subscriptions.all() == ([Subscription("a", "f", 1)] if left else [])


async def test_many_subscriptions_are_all_returned(store: Store) -> None:
    many = [Subscription(f"c{number // 1500:02}", f"f/{number:05}", 1) for number in range(3_100)]
    await asyncio.gather(*map(store.subscriptions.save, many))

    assert await store.subscriptions.all() == many


async def test_the_longest_subscription_is_kept_and_a_longer_one_refused(store: Store) -> None:
    # No two characters alike: what an index takes is counted after compression.
    name = "".join(chr(0x100 + number) for number in range(512))
    longest = Subscription(name, name[::-1], 1)
    await store.subscriptions.save(longest)
    for refused in (
        store.subscriptions.save(replace(longest, filter=f"{longest.filter}x")),
        store.subscriptions.remove("a\0", "b"),
        store.subscriptions.forget("a\0"),
    ):
        with pytest.raises(UnstorableError):
            await refused

    assert await store.subscriptions.all() == [longest]


# Connections


def connect(number: int, client_id: str = "c") -> Connect:
    return Connect(client_id, f"{number:032x}", "10.0.0.1", number % 2 == 0, 1_000 + number)


async def flush(store: Store) -> None:
    """Wait until everything before this call is written."""
    async with asyncio.timeout(60):
        await store.subscriptions.forget("nobody")


async def test_the_last_connections_of_a_client_are_kept(store: Store) -> None:
    store.connects.began(connect(7, "other"))
    for number in range(30):
        store.connects.began(connect(number))
        if number % 2:
            store.connects.ended("c", f"{number:032x}", ended_ms=5_000 + number, reason="kicked")
        if number % 7 == 0:
            await flush(store)
    store.connects.ended("c", "unknown", ended_ms=1, reason="")
    await flush(store)

    found = await store.connects.of("c")
    assert found == [
        replace(connect(n), ended_ms=5_000 + n, reason="kicked") if n % 2 else connect(n)
        for n in range(29, 29 - CONNECTS_PER_CLIENT, -1)
    ]
    assert await store.connects.of("c", limit=3) == found[:3]
    assert await store.connects.of("other") == [connect(7, "other")]
    assert await store.connects.of("nobody") == []


async def test_a_connection_that_is_noted_twice_stays_as_it_was(store: Store) -> None:
    store.connects.began(connect(1))
    store.connects.ended("c", connect(1).channel_id, ended_ms=9, reason="no heart")
    await flush(store)
    store.connects.began(connect(1))
    store.connects.began(connect(2, "a\0"))
    await flush(store)

    assert await store.connects.of("c") == [replace(connect(1), ended_ms=9, reason="no heart")]


async def test_clients_that_never_return_are_forgotten_in_the_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mq2mqtt.store.connects.CONNECTS_KEPT", 1_500)
    for number in range(2_001):
        store.connects.began(connect(number, f"c{number}"))
    await flush(store)

    assert await store.connects.of("c500") == []
    assert await store.connects.of("c501") == [connect(501, "c501")]


# Nodes, transactions, versions


async def test_nodes_do_not_see_each_other(open_store: OpenStore) -> None:
    one, two = await open_store("one"), await open_store("two")
    await add(one, [message(1, expires_ms=1)])
    await add(two, [message(1, "hers", expires_ms=1), message(2, "hers", expires_ms=1)])
    await asyncio.gather(*(each.subscriptions.save(Subscription("a", "f", 1)) for each in (one, two)))
    two.connects.began(connect(1))
    await flush(two)
    await one.offline.remove([2])
    await two.subscriptions.forget("a")

    assert await one.offline.counts() == {"GID_dev@@@1": 1}
    assert ids(await one.offline.expired(9, 9)) == ids(await one.offline.oldest_overall(limit=9)) == [1]
    assert await one.offline.oldest("hers", limit=9) == []
    assert await one.offline.last_id() == 1
    assert await two.offline.counts() == {"hers": 2}
    assert await one.subscriptions.all() == [Subscription("a", "f", 1)]
    assert await one.connects.of("c") == []


async def test_a_node_belongs_to_one_bridge(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq2mqtt.store.database._TAKEN_SECONDS", 0.3)
    first = await open_store("one")
    with pytest.raises(ConfigError, match=r"^store\.url: another bridge uses node one in this database: stop it, or "):
        await open_store("one")
    await first.close()
    await first.close()
    # PostgreSQL sees a moment later that it has gone.
    monkeypatch.undo()

    await open_store("one")


async def test_closing_writes_what_waits(open_store: OpenStore) -> None:
    first = await open_store()
    futures = [first.offline.add(message(number)) for number in range(2_000)]
    await first.close(seconds=60)
    assert all(future.done() for future in futures)
    with pytest.raises(StoreError, match="closed"):
        await first.offline.add(message(1))

    assert await (await open_store()).offline.counts() == {"GID_dev@@@1": 2_000}


async def test_bridges_that_start_at_once_make_the_tables_once(open_store: OpenStore) -> None:
    stores = await asyncio.gather(*(open_store(f"node{number}") for number in range(5)))

    await asyncio.gather(*(add(store, [message(1)]) for store in stores))


async def test_a_newer_schema_is_refused(url: str, open_store: OpenStore) -> None:
    await (await open_store()).close()
    newer = len(MIGRATIONS) + 1
    await execute(url, f"INSERT INTO schema_version (version) VALUES ({newer})")  # noqa: S608 - a number

    with pytest.raises(ConfigError) as caught:
        await open_store()
    assert str(caught.value) == (
        f"store.url: the database has schema version {newer}, this mq2mqtt knows {len(MIGRATIONS)}: a newer one made "
        "it; run that, or name another database"
    )


async def test_a_migration_is_done_whole_or_not_at_all(url: str, tmp_path: Path) -> None:
    def failing(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE half (a INTEGER)"))
        connection.execute(text("INSERT INTO nothing VALUES (1)"))

    def mended(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE half (a INTEGER)"))

    (tmp_path / "var").mkdir(exist_ok=True)
    database = Database(url, node="one", power=False)
    try:
        with pytest.raises(ConfigError, match="nothing"):
            await database.open((*MIGRATIONS, failing))
        await database.open((*MIGRATIONS, mended))
    finally:
        await database.close()


# Death


_STORING = """
import asyncio, os, sys
from mq2mqtt.store import MessageKind, StoredMessage
from mq2mqtt.store.sql import SqlStore

async def main(url, first):
    store = await SqlStore.open(url, node="one")
    window = asyncio.Semaphore(700)
    for number in range(first, first + 1_000_000):
        await window.acquire()
        message = StoredMessage(number, f"c{number % 9}", MessageKind.P2P, "r", "t", b"x" * (number % 700), 1, number)
        def stored(future, number=number):
            window.release()
            os.write(1, b"%d\\n" % number)
        store.offline.add(message).add_done_callback(stored)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.mark.parametrize("lines", [1, 3_333])
def test_what_was_reported_stored_survives_kill_9(url: str, lines: int) -> None:
    reported: set[int] = set()
    for first in (0, 1_000_000):
        process = subprocess.Popen([sys.executable, "-c", _STORING, url, str(first)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout as output:
            text_ = b"".join(output.readline() for _ in range(lines))
            process.send_signal(signal.SIGKILL)
            text_ += output.read()
            process.wait()
        new = {int(line) for line in text_[: text_.rfind(b"\n")].splitlines()}
        assert len(new) >= lines
        reported |= new

    assert reported <= asyncio.run(_stored(url))


async def _stored(url: str) -> set[int]:
    store = await SqlStore.open(url, node="one")
    messages = await store.offline.oldest_overall(limit=1_000_000)
    await store.close()
    assert all(each.size == each.id % 700 for each in messages)
    return set(ids(messages))
