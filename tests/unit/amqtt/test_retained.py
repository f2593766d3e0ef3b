"""Retained messages are for those who subscribe to them, whatever happens while a client connects."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.unit.amqtt.world import World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    one = await World.start()
    yield one
    await one.stop()


async def test_a_client_gets_no_retained_message_that_it_did_not_subscribe_to(world: World) -> None:
    device = await world.client("dev")
    await device.publish("a/state", b"secret", qos=1, retain=True)
    await device.publish("b/state", b"public", qos=1, retain=True)
    reader = await world.client("reader")
    await reader.subscribe(("a/#", 1), ("b/#", 1))
    await reader.wait_messages(2)

    other = await world.client("other")
    await other.subscribe(("b/#", 1))

    await other.wait_messages(1)
    await other.ping()
    assert [(message.topic, message.retain) for message in other.messages] == [("b/state", True)]


async def test_a_resumed_session_gets_those_of_its_filters(world: World) -> None:
    device = await world.client("dev")
    await device.publish("a/state", b"on", qos=1, retain=True)
    reader = await world.client("reader", clean=False)
    await reader.subscribe(("a/+", 1))
    await reader.wait_messages(1)
    await reader.disconnect()

    reader = await world.client("reader", clean=False)

    (message,) = await reader.wait_messages(1)
    assert (message.payload, message.retain) == (b"on", True)
    await reader.subscribe(("a/state", 1))
    await reader.wait_messages(2)


async def test_a_client_that_connects_while_another_subscribes_stays_connected(world: World) -> None:
    device = await world.client("dev")
    for number in range(20):
        await device.publish(f"a/{number}", b"x", qos=1, retain=True)
    reader = await world.client("reader", clean=False)
    await reader.subscribe(("a/#", 0))
    busy = await world.client("busy")

    async def subscribe() -> None:
        for number in range(100):
            await busy.subscribe((f"b/{number}", 0))

    subscribing = asyncio.create_task(subscribe(), name="subscribe")
    while not subscribing.done():
        reader = await world.client("reader", clean=False)
        await reader.subscribe(("c", 0))
    await subscribing
