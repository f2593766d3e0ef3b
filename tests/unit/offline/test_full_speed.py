"""The quotas, with a real store that is written as fast as it can be."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mq2mqtt.host import Delivery, Outcome
from mq2mqtt.store.sql import SqlStore
from tests.unit.offline.world import World, until

MESSAGES = 20_000
KEPT = 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqlStore]:
    store = await SqlStore.open(f"sqlite+aiosqlite:///{path}", node="one")
    yield store
    await store.close()


async def keep(world: World, *, clients: int) -> None:
    """Have messages kept for clients that are away, as an inbound rule does that never waits for its source."""
    outcomes: list[list[Delivery]] = []
    for number in range(MESSAGES):
        await world.queue.available()
        outcomes.append(world.hand(f"away {number % clients}", b"x"))
        if number % 100 == 99:
            await asyncio.sleep(0)
    await until(lambda: all(outcomes))
    assert {outcome[0].outcome for outcome in outcomes} == {Outcome.QUEUED}


def rows_in(path: Path) -> int:
    connection = sqlite3.connect(path)
    ((count,),) = connection.execute("SELECT count(*) FROM offline").fetchall()
    connection.close()
    return int(count)


# What is over one quota goes with the transactions that bring more. Many clients have to be looked through.
@pytest.mark.parametrize(
    ("clients", "limits", "margin"),
    [(1, {"per_client": 1000}, 5000), (1000, {"total": 1000}, 5000), (200, {"per_client": 5}, 10_000)],
    ids=["one client", "total", "many clients"],
)
async def test_quotas_hold_while_messages_stream_in(
    path: Path, store: SqlStore, clients: int, limits: dict[str, int], margin: int
) -> None:
    async with World(store, **limits) as world:  # type: ignore[arg-type]  # what the queue uses of it
        most = most_rows = 0

        async def watch() -> None:
            nonlocal most, most_rows
            while True:
                most = max(most, world.telemetry.offline.messages)
                most_rows = max(most_rows, await asyncio.to_thread(rows_in, path))
                await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch(), name="watching")
        await keep(world, clients=clients)
        await until(lambda: world.telemetry.offline.messages == KEPT)
        watching.cancel()
        await asyncio.wait([watching])
        assert most < KEPT + margin
        assert most_rows < KEPT + margin + 2000  # those that are just being deleted, or were just added
        assert world.count("evicted") == MESSAGES - KEPT
