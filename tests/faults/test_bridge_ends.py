"""The bridge ends under traffic in both directions, at random by `kill -9`, and in order by SIGTERM."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import SharedRocketMQ
from tests.faults.lives import Lives
from tests.faults.random_moments import random_moments
from tests.faults.report import FaultTable
from tests.mosquitto_bridge import MosquittoBridge
from tests.rocket_peer import RocketPeer
from tests.waiting import PATIENCE

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

Begin = Callable[..., Awaitable[Lives]]
"""`await begin("process")`: a bridge of that durability with its streams; lines for `mosquitto.conf` may follow."""

_KILLS = 20
_PART_ENDS = 10
_STOPS = 3
_STOP_DEADLINE = 10.0 * PATIENCE


@pytest.fixture(scope="module")
def peer(rocketmq: SharedRocketMQ) -> Iterator[RocketPeer]:
    with RocketPeer(rocketmq.namesrv) as peer:
        yield peer


@pytest.fixture
async def begin(rocketmq: SharedRocketMQ, peer: RocketPeer, tmp_path: Path) -> AsyncIterator[Begin]:
    """Start a bridge with its streams; whatever the test comes to, they end with it."""
    begun: list[Lives] = []

    async def begin(durability: str, *mosquitto_options: str) -> Lives:
        lives = Lives(rocketmq, peer, tmp_path / durability, durability=durability)
        if mosquitto_options:
            _mosquitto(lives).broker.options = mosquitto_options
        begun.append(lives)
        await lives.start()
        return lives

    yield begin
    for lives in begun:
        await lives.end()


async def _kill_at_random(lives: Lives, moments: random.Random, *, times: int, end: Callable[[], object]) -> None:
    """Have `end` end the bridge, or a part of it, and start what has ended."""
    for _ in range(times):
        counting = asyncio.create_task(lives.count_away(), name="count away")
        await asyncio.sleep(moments.uniform(0.0, 1.6))
        await asyncio.to_thread(end)
        counting.cancel()
        await lives.next_life()
        if moments.random() < 0.2:
            # Once more, while it starts: most of that is before it touches its files.
            lives.bridge.launch()
            await asyncio.sleep(moments.uniform(0.3, 1.5))
            await asyncio.to_thread(end)
            await lives.next_life()
        await asyncio.to_thread(lives.bridge.start, ready=False)
    await lives.count_away()


def _mosquitto(lives: Lives) -> MosquittoBridge:
    assert isinstance(lives.bridge, MosquittoBridge)
    return lives.bridge


async def test_killed_20_times_at_random_moments(begin: Begin, fault_table: FaultTable) -> None:
    both = {durability: await begin(durability) for durability in ("process", "power")}
    await asyncio.gather(
        *(
            _kill_at_random(lives, random_moments(durability), times=_KILLS, end=lives.bridge.kill)
            for durability, lives in both.items()
        )
    )
    for durability, lives in both.items():
        await lives.finish(fault_table, fault=f"bridge killed {_KILLS} times at random, durability: {durability}")
        assert await asyncio.to_thread(lives.bridge.stop) == 0


@pytest.mark.mosquitto
async def test_one_of_the_two_ends_at_random_moments(begin: Begin, fault_table: FaultTable) -> None:
    mosquitto, sidecar = await begin("process"), await begin("power", "plugin_opt_sync_ms 20")
    moments = random_moments("one of the two")
    broker = _mosquitto(mosquitto).broker

    def end_mosquitto() -> None:
        broker.stop() if moments.random() < 0.5 else broker.kill()

    await asyncio.gather(
        _kill_at_random(mosquitto, moments, times=_PART_ENDS, end=end_mosquitto),
        _kill_at_random(sidecar, moments, times=_PART_ENDS, end=_mosquitto(sidecar).kill_sidecar),
    )
    await mosquitto.finish(fault_table, fault=f"Mosquitto ended {_PART_ENDS} times at random, by SIGKILL or SIGTERM")
    await sidecar.finish(
        fault_table, fault=f"sidecar killed {_PART_ENDS} times at random, durability: power, sync_ms: 20"
    )


async def test_sigterm_under_load(begin: Begin, fault_table: FaultTable) -> None:
    lives = await begin("process")
    for _ in range(_STOPS):
        await lives.count_away()
        acknowledged = len(lives.streams[0].acknowledged)
        while len(lives.streams[0].acknowledged) < acknowledged + 50:
            await asyncio.sleep(0.02)
        began = time.monotonic()
        assert await asyncio.to_thread(lives.bridge.stop) == 0
        assert time.monotonic() - began < _STOP_DEADLINE
        await lives.next_life()
        await asyncio.to_thread(lives.bridge.start, ready=False)
    await lives.count_away()
    await lives.finish(fault_table, fault=f"bridge stopped by SIGTERM {_STOPS} times")
    assert await asyncio.to_thread(lives.bridge.stop) == 0
