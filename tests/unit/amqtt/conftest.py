from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.unit.amqtt.world import World

StartWorld = Callable[..., Awaitable[World]]


@pytest.fixture
async def start_world() -> AsyncIterator[StartWorld]:
    """Start brokers with plugins or listeners of the test's own; they are stopped after it."""
    worlds: list[World] = []

    async def start(**options: Any) -> World:  # noqa: ANN401 - those of World.start
        world = await World.start(**options)
        worlds.append(world)
        return world

    yield start
    for world in worlds:
        await world.stop()


@pytest.fixture
async def world(start_world: StartWorld) -> World:
    return await start_world()
