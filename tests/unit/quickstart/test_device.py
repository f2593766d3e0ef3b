"""The quickstart's device against a broker that this test plays byte by byte."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from mq2mqtt.quickstart.device import Device, DeviceError, Received

CONNACK = bytes.fromhex("20020000")
CONNECT_OF_D1 = b"\x10\x0e\x00\x04MQTT\x04\x02\x00\x00\x00\x02d1"

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def play(peer: Peer, use: Callable[[Device, int], Awaitable[None]]) -> None:
    """Run `use` with a device and the port where `peer` plays the broker; an error of either fails the test."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await peer(reader, writer)
            done.set_result(None)
        except (AssertionError, asyncio.IncompleteReadError) as exc:
            done.set_exception(exc)
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        device = Device("d1")
        try:
            await use(device, port)
        finally:
            await device.close()
        await asyncio.wait_for(done, 20)


async def test_publish_waits_for_its_acknowledgement() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(len(CONNECT_OF_D1)) == CONNECT_OF_D1
        writer.write(CONNACK)
        publish = b"\x32\x08\x00\x03a/b\x00\x01x"
        assert await reader.readexactly(len(publish)) == publish
        writer.write(bytes.fromhex("40020001"))
        assert await reader.readexactly(2) == b"\xe0\x00"

    async def use(device: Device, port: int) -> None:
        await device.connect("127.0.0.1", port)
        await device.publish("a/b", b"x")
        await device.close()

    await play(peer, use)


async def test_messages_are_acknowledged_and_kept_in_order() -> None:
    long = b"y" * 300

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(CONNECT_OF_D1))
        writer.write(CONNACK)
        assert await reader.readexactly(8) == b"\x82\x06\x00\x01\x00\x01#\x01"
        writer.write(b"\x90\x03\x00\x01\x01" + b"\x30\x04\x00\x01az")
        # 305 = 0xb1 0x02 as a remaining length; in two pieces, as a network may bring it.
        data = b"\x32\xb1\x02\x00\x01b\x00\x07" + long
        writer.write(data[:2])
        await writer.drain()
        writer.write(data[2:])
        assert await reader.readexactly(4) == b"\x40\x02\x00\x07"

    async def use(device: Device, port: int) -> None:
        await device.connect("127.0.0.1", port)
        await device.subscribe("#")
        assert await device.inbox.get() == Received("a", b"z", 0)
        assert await device.inbox.get() == Received("b", long, 1)

    await play(peer, use)


@pytest.mark.parametrize(
    ("answer", "text"), [(bytes.fromhex("20020005"), "return code 5"), (b"", "closed the connection")]
)
async def test_a_refused_connection_is_an_error(answer: bytes, text: str) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(CONNECT_OF_D1))
        writer.write(answer)

    async def use(device: Device, port: int) -> None:
        with pytest.raises(DeviceError, match=text):
            await device.connect("127.0.0.1", port)

    await play(peer, use)


async def test_nobody_there_is_an_error(free_port: int) -> None:
    with pytest.raises(DeviceError, match=f"no MQTT broker at 127.0.0.1:{free_port}"):
        await Device("d1").connect("127.0.0.1", free_port)
