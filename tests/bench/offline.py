"""Messages for clients that are away: how fast they are kept, and come back from where they are kept."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from mq2mqtt.message import RocketMessage
from mq2mqtt.store import MessageKind, StoredMessage
from mq2mqtt.store.sql import SqlStore
from tests.bench.experiment import Bench, Experiment, Measurement
from tests.bench.hosts import AMQTT, MOSQUITTO, Host
from tests.bench.rocketmq_client import batches_of, target
from tests.bench.servers import BridgeServer, Load, cpu_measurements, cpu_of, cpu_since
from tests.watched_loop import core_waits, waited_since

MESSAGES = 100_000
CLIENTS = 1000
AT_ONCE = 500
BATCH = 30
"""What a client that comes back is handed at once."""
_IN_FLIGHT = 5000
_AT_ONCE_ADDED = 100
"""As many as a bridge takes from RocketMQ at once, more or less."""
_BODY = b"x" * 64
_TOPIC = "devices/p2p/GID_come_back@@@00000"
_MONITOR_SECONDS = 0.005
_SECONDS = 300.0
_TABLE = (
    "CREATE TABLE offline (node TEXT, id INTEGER, client_id TEXT, kind TEXT, rule TEXT, topic TEXT, payload BLOB, "
    "qos INTEGER, stored_ms INTEGER, expires_ms INTEGER, PRIMARY KEY (node, id))"
)
_INDEX = "CREATE INDEX offline_client ON offline (node, client_id, id)"
_INSERT = "INSERT INTO offline VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_OLDEST = "SELECT * FROM offline WHERE node = ? AND client_id = ? ORDER BY id LIMIT ?"
_DELETE = "DELETE FROM offline WHERE node = ? AND id = ?"


def _client(number: int) -> str:
    return f"GID_come_back@@@{number % CLIENTS:05d}"


def _message(number: int) -> StoredMessage:
    client_id, now = _client(number), time.time_ns() // 1_000_000
    return StoredMessage(
        number,
        client_id,
        MessageKind.P2P,
        "bench-in",
        f"devices/p2p/{client_id}",
        _BODY,
        qos=1,
        stored_ms=now,
        expires_ms=now + 259_200_000,
    )


def _row(number: int) -> tuple[object, ...]:
    client_id, now = _client(number), time.time_ns() // 1_000_000
    topic = f"devices/p2p/{client_id}"
    return ("bench", number, client_id, "p2p", "bench-in", topic, _BODY, 1, now, now + 259_200_000)


class _Pauses:
    """How long the event loop was held up at most, without the time in which the system ran others."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        while True:
            before, due = core_waits(), time.perf_counter() + _MONITOR_SECONDS
            await asyncio.sleep(_MONITOR_SECONDS)
            self.longest = max(self.longest, time.perf_counter() - due - waited_since(before))


@asynccontextmanager
async def _watched() -> AsyncIterator[_Pauses]:
    pauses = _Pauses()
    task = asyncio.create_task(pauses.watch(), name="watch")
    try:
        yield pauses
    finally:
        task.cancel()


@asynccontextmanager
async def _store(bench: Bench) -> AsyncIterator[SqlStore]:
    path = bench.directory / f"store-{time.time_ns()}" / "mq2mqtt.db"
    store = await SqlStore.open(f"sqlite+aiosqlite:///{path}", node="bench")
    try:
        yield store
    finally:
        await store.close()


async def _add(store: SqlStore, count: int) -> None:
    waiting: list[asyncio.Future[None]] = []
    for number in range(count):
        waiting.append(store.offline.add(_message(number)))
        if len(waiting) == _IN_FLIGHT:
            await waiting[_AT_ONCE_ADDED - 1]
            del waiting[:_AT_ONCE_ADDED]
    for added in waiting:
        await added


def _plain(path: Path, count: int, *, replay: bool) -> float:
    """Do the same with bare statements, `AT_ONCE` rows in each transaction; return messages per second."""
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL", _TABLE, _INDEX):
        connection.execute(statement)
    begin = time.perf_counter()
    for first in range(0, count, AT_ONCE):
        _transaction(connection, _INSERT, [_row(number) for number in range(first, min(first + AT_ONCE, count))])
    if replay:
        begin = time.perf_counter()
        for client in range(min(CLIENTS, count)):
            while rows := connection.execute(_OLDEST, ("bench", _client(client), BATCH)).fetchall():
                _transaction(connection, _DELETE, [("bench", row[1]) for row in rows])
    rate = count / (time.perf_counter() - begin)
    connection.close()
    return rate


def _transaction(connection: sqlite3.Connection, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(statement, rows)
    connection.execute("COMMIT")


def _plain_path(bench: Bench) -> Path:
    return bench.directory / f"plain-{time.time_ns()}.db"


async def offline_store(bench: Bench) -> list[Measurement]:
    """Keep messages, and wait until they are; baseline: `executemany` by the bare module, 500 in each transaction."""
    count = bench.scaled(MESSAGES)

    async def ours() -> tuple[float, float]:
        async with _store(bench) as store, _watched() as pauses:
            begin = time.perf_counter()
            await _add(store, count)
            return count / (time.perf_counter() - begin), pauses.longest

    plain = partial(asyncio.to_thread, _plain, _plain_path(bench), count, replay=False)
    (rate, pause), baseline = await bench.interleaved(ours, plain)
    return [Measurement("stored", rate, "msg/s", baseline), Measurement("loop held up, at most", pause * 1000, "ms")]


async def offline_replay(bench: Bench) -> list[Measurement]:
    """Read 30 messages of a client, forget them, and so on, client by client; baseline: the same by the bare module."""
    count = bench.scaled(MESSAGES)

    async def one(store: SqlStore, client_id: str) -> None:
        while heads := await store.offline.oldest(client_id, limit=BATCH):
            messages = await store.offline.read([head.id for head in heads])
            await store.offline.remove([message.id for message in messages])

    async def ours() -> tuple[float, float]:
        async with _store(bench) as store:
            await _add(store, count)
            async with _watched() as pauses:
                begin = time.perf_counter()
                await asyncio.gather(*(one(store, _client(number)) for number in range(min(CLIENTS, count))))
                return count / (time.perf_counter() - begin), pauses.longest

    plain = partial(asyncio.to_thread, _plain, _plain_path(bench), count, replay=True)
    (rate, pause), baseline = await bench.interleaved(ours, plain)
    return [
        Measurement("read and removed", rate, "msg/s", baseline),
        Measurement("loop held up, at most", pause * 1000, "ms"),
    ]


def _kept(topic: str, number: int, *, clients: int) -> RocketMessage:
    second = f"/p2p/{_client(number % clients)}"
    flags = {"qoslevel": "1", "cleansessionflag": "false"}
    return RocketMessage(topic, _BODY, {"TAGS": "MQ2MQTT", "mqttSecondTopic": second, **flags})


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(_SECONDS):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.02)


async def _away_and_back(bench: Bench, host: Host) -> list[Measurement]:
    server = await host.keep_inbound(bench)
    clients = bench.scaled(CLIENTS)
    count = clients * BATCH
    kept = await _keep(bench, server, count, clients=clients)
    before = cpu_of(server)
    load = await Load.start("come_back", server, clients=clients, topic=_TOPIC, messages=count)
    back = await load.result()
    replayed = cpu_since(before, server, messages=count)
    await _until(lambda: server.bridge.metric("mq2mqtt_offline_messages") == 0)
    return [*kept, Measurement("replayed", back.rate, "msg/s"), *cpu_measurements(replayed, of=", replayed")]


async def _keep(bench: Bench, server: BridgeServer, count: int, *, clients: int) -> list[Measurement]:
    metric = server.bridge.metric
    async with target(bench, server.topic) as rocketmq:
        async with server.paused():
            end = await rocketmq.shown() + count
            await rocketmq.fill(batches_of(server.topic, count, partial(_kept, clients=clients)))
            await rocketmq.wait_shown(end)
            before = cpu_of(server)
        begin = time.perf_counter()
        await _until(lambda: metric("mq2mqtt_offline_messages") >= count)
        rate = count / (time.perf_counter() - begin)
    used = cpu_since(before, server, messages=count)
    return [Measurement("kept", rate, "msg/s"), *cpu_measurements(used, of=", kept")]


EXPERIMENTS = {
    "offline-store": Experiment(offline_store),
    "offline-replay": Experiment(offline_replay),
    "offline-amqtt": Experiment(partial(_away_and_back, host=AMQTT)),
    "offline-mosquitto": Experiment(partial(_away_and_back, host=MOSQUITTO)),
}
