"""What clients publish to each other, where one of them does not read: on a real broker, with raw clients."""

import asyncio

import pytest

from mq2mqtt_amqtt import turnstile
from mq2mqtt_amqtt.wire import BUFFER_HIGH
from tests.mqtt_client import SECONDS, Client
from tests.unit.amqtt.world import World, until

PAYLOAD_BYTES = 10_000
# More than what both systems buffer for a connection on loopback, and the write buffer.
MANY = 1500


def _body(number: int) -> bytes:
    return b"%d" % number + b" " * PAYLOAD_BYTES


async def _flood(world: World, publisher: Client) -> None:
    for number in range(MANY):
        await publisher.publish("local/x", _body(number), qos=1)
    assert world.buffered("deaf") > BUFFER_HIGH


@pytest.mark.parametrize("qos", [0, 1])
async def test_a_device_that_never_reads(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, qos: int
) -> None:
    monkeypatch.setattr(turnstile, "WAIT_SECONDS", 0.2)
    good, deaf = await world.client("good"), await world.client("deaf")
    for client in (good, deaf):
        await client.subscribe(("local/x", qos))
    deaf.stop_reading()
    await _flood(world, await world.client("publisher"))
    assert [int(message.payload) for message in await good.wait_messages(MANY)] == list(range(MANY))
    assert world.buffered("deaf") < BUFFER_HIGH + 2 * PAYLOAD_BYTES
    # amqtt drops finished tasks when it routes the next message.
    kept = world.broker._tasks_queue  # noqa: SLF001 - amqtt shows it nowhere
    await good.subscribe(("local/y", 0))
    async with asyncio.timeout(SECONDS):
        while len(kept) >= 100:
            await good.publish("local/y", b"", qos=1)
    assert "Traceback" not in caplog.text


async def test_a_device_that_reads_late_gets_all_in_order(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turnstile, "MAX_WAITING_BYTES", MANY * PAYLOAD_BYTES * 2)
    monkeypatch.setattr(turnstile, "WAIT_SECONDS", 60)
    late = await world.client("deaf")
    await late.subscribe(("local/x", 0))
    late.stop_reading()
    await _flood(world, await world.client("publisher"))
    late.resume_reading()
    assert [int(message.payload) for message in await late.wait_messages(MANY)] == list(range(MANY))


async def test_too_much_for_a_device_that_does_not_read_is_dropped_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turnstile, "MAX_WAITING", 3)
    monkeypatch.setattr(turnstile, "WAIT_SECONDS", 60)
    deaf = await world.client("deaf")
    await deaf.subscribe(("local/x", 0))
    deaf.stop_reading()
    await _flood(world, await world.client("publisher"))
    await until(lambda: sum(not task.done() for task in world.broker._tasks_queue) <= 4)  # noqa: SLF001
    deaf.resume_reading()
    await deaf.ping()
    assert 0 < len(deaf.messages) < MANY
