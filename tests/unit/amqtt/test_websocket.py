"""WebSocket connections: the same broker and host, another way to write and to read."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from mq2mqtt_amqtt.wire import BUFFER_HIGH
from tests.mqtt_client import PUBACK, PUBCOMP, PUBREC, PUBREL, ack_packet, connect_packet, packet, publish_packet, text
from tests.unit.amqtt.conftest import StartWorld
from tests.unit.amqtt.world import World, until

SUBSCRIBE_ALL = packet(0x82, b"\x00\x01" + text("into/#") + b"\x01")


@pytest.fixture
async def world(start_world: StartWorld) -> World:
    return await start_world(listener="ws")


@asynccontextmanager
async def browser(world: World, client_id: str, *, more: bytes = b"") -> AsyncIterator[ClientConnection]:
    """Connect; `more` goes into the same message as CONNECT."""
    url = f"ws://127.0.0.1:{world.port}/"
    subprotocols = [websockets.Subprotocol("mqtt")]
    async with websockets.connect(
        url, subprotocols=subprotocols, compression=None, max_size=None, close_timeout=1
    ) as socket:
        await socket.send(connect_packet(client_id) + more)
        assert await read(socket, 4) == b"\x20\x02\x00\x00"
        yield socket


async def read(socket: ClientConnection, size: int) -> bytes:
    """Read bytes, whatever messages they come in."""
    data = bytearray()
    async with asyncio.timeout(20):
        while len(data) < size:
            message = await socket.recv()
            data += message if isinstance(message, bytes) else message.encode()
    return bytes(data)


async def test_publish_and_receive(world: World) -> None:
    async with browser(world, "dev", more=SUBSCRIBE_ALL) as socket:
        assert await read(socket, 5) == b"\x90\x03\x00\x01\x01"
        await socket.send(publish_packet("lane/a", b"1", qos=1, packet_id=1))
        assert await read(socket, 4) == ack_packet(PUBACK, 1)
        # One packet in three messages, and its PUBREL with the next publish in one.
        data = publish_packet("lane/a", b"2" * 1000, qos=2, packet_id=2)
        for part in (data[:1], data[1:20], data[20:]):
            await socket.send(part)
        assert await read(socket, 4) == ack_packet(PUBREC, 2)
        await socket.send(ack_packet(PUBREL, 2) + publish_packet("lane/a", b"3"))
        assert await read(socket, 4) == ack_packet(PUBCOMP, 2)
        await until(lambda: len(world.intake.lane("lane")) == 3)
        receipts = [world.publish("into/a", b"%03d" % number, qos=0) for number in range(500)]
        expected = b"".join(publish_packet("into/a", b"%03d" % number) for number in range(500))
        assert await read(socket, len(expected)) == expected
        for receipt in receipts:
            assert await receipt.outcome() == ("delivered", None)
    await until(lambda: world.intake.told("dev")[-1] == "tcpclean")


async def test_a_browser_that_closes_is_told_of(world: World) -> None:
    async with browser(world, "dev"):
        pass
    await until(lambda: world.intake.told("dev") == ["connect", "tcpclean"])
    async with browser(world, "dev") as socket:
        socket.transport.abort()
        await until(lambda: world.intake.told("dev") == ["connect", "tcpclean"] * 2)


async def test_take_over_kick_and_a_publish_that_is_cut_off(world: World) -> None:
    async with browser(world, "dev") as old, browser(world, "dev") as new:
        with pytest.raises(websockets.ConnectionClosed):
            await read(old, 1)
        assert world.intake.told("dev") == ["connect", "tcpclean", "connect"]
        await new.send(publish_packet("lane/a", b"1234567890", qos=1, packet_id=1)[:-3])
        await world.host.kick("dev")
        with pytest.raises(websockets.ConnectionClosed):
            await read(new, 1)
    assert not world.intake.lanes


async def test_a_browser_that_does_not_read_holds_up_nobody(world: World) -> None:
    async with browser(world, "stuck") as stuck, browser(world, "healthy", more=SUBSCRIBE_ALL) as healthy:
        await read(healthy, 5)
        stuck.transport.pause_reading()
        payload = bytes(100_000)
        while world.buffered("stuck") <= BUFFER_HIGH:
            world.deliver("stuck", "into/p2p/stuck", payload, qos=0)
            await asyncio.sleep(0)
        waiting = world.deliver("stuck", "into/p2p/stuck", payload, qos=0)
        assert world.buffered("stuck") <= BUFFER_HIGH + len(payload) + 100
        assert await world.publish("into/a", b"x", qos=0).outcome() == ("delivered", None)
        assert await waiting.outcome() == ("dropped", "slow_device")
        again = world.deliver("stuck", "into/p2p/stuck", b"x", qos=0)
        stuck.transport.resume_reading()
        # The browser reads again, and what was queued meanwhile goes out.
        reading = asyncio.create_task(read(stuck, 1 << 40), name="test.read")
        assert await again.outcome() == ("delivered", None)
        reading.cancel()
