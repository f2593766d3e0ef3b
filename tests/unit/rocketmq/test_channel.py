import asyncio
import random
import ssl
import time

import pytest

from mq2mqtt.rocketmq.channel import Channel
from mq2mqtt.rocketmq.errors import NotConnected
from tests.unit.rocketmq.peer import Peer, answer_all, peer, say_nothing, talk_garbage


def make(target: str, *, seconds: float = 10, tls: ssl.SSLContext | None = None) -> tuple[Channel, list[str]]:
    connected: list[str] = []
    channel = Channel(
        "announced:1",
        target=target,
        ssl_context=tls,
        connect_timeout=seconds,
        on_request=lambda *_: None,
        on_connected=connected.append,
    )
    return channel, connected


async def test_callers_share_one_connection_and_a_cancelled_one_does_no_harm() -> None:
    async with peer(answer_all) as server:
        channel, connected = make(server.address)
        first, *others = [asyncio.ensure_future(channel.connection()) for _ in range(5)]
        await asyncio.sleep(0)
        first.cancel()
        assert len(set(await asyncio.gather(*others))) == 1
        assert (server.connections, connected) == (1, ["announced:1"])
        await channel.close()
        with pytest.raises(NotConnected, match="closed"):
            await channel.connection()


async def test_a_refused_address_is_not_hammered_and_nobody_waits(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda _low, high: high)
    channel, _ = make(f"127.0.0.1:{free_port}")
    with pytest.raises(NotConnected) as first:
        await channel.connection()
    # What is left of 0.2 s.
    assert 0 < first.value.retry_after <= 0.2
    started = time.monotonic()
    for _ in range(100):
        with pytest.raises(NotConnected, match=str(free_port)):
            await channel.connection()
    assert time.monotonic() - started < 5
    await channel.close()


async def test_a_peer_that_talks_garbage_is_not_hammered() -> None:
    async with peer(talk_garbage) as server:
        channel, _ = make(server.address)
        deadline = time.monotonic() + 1.5
        calls = 0
        while time.monotonic() < deadline:
            try:
                connection = await channel.connection()
                await connection.call(1, {}, timeout=10)
            except NotConnected:
                calls += 1
                await asyncio.sleep(0.005)
        assert calls > 10
        # 0, then at least 0.1, 0.2, 0.4, 0.8 s apart
        assert 2 <= server.connections <= 5
        await channel.close()


async def test_reconnects_at_once_after_a_good_connection_was_lost(free_port: int) -> None:
    server = Peer(answer_all)
    await server.start(port=free_port)
    channel, connected = make(server.address)
    await (await channel.connection()).call(1, {}, timeout=10)
    await server.stop()
    while channel.is_connected:
        await asyncio.sleep(0.01)
    again = Peer(answer_all)
    await again.start(port=free_port)
    assert (await (await channel.connection()).call(2, {}, timeout=10)).remark == "2"
    assert len(connected) == 2
    await channel.close()
    await again.stop()


async def test_a_handshake_that_never_ends_is_given_up() -> None:
    async with peer(say_nothing) as server:
        channel, _ = make(server.address, seconds=0.2, tls=ssl.create_default_context())
        with pytest.raises(NotConnected, match=r"no connection within 0\.2 s"):
            await channel.connection()
        await channel.close()


async def test_closing_ends_an_attempt_and_its_callers() -> None:
    async with peer(say_nothing) as server:
        channel, _ = make(server.address, seconds=60, tls=ssl.create_default_context())
        caller = asyncio.ensure_future(channel.connection())
        await asyncio.sleep(0.05)
        await channel.close()
        with pytest.raises(NotConnected, match="this client is closed"):
            await asyncio.wait_for(caller, 10)
