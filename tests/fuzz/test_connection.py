"""Whole streams of mutated packets against the broker: no device may make it stumble, or disturb another."""

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from tests.fuzz.mutations import mutations
from tests.mqtt_client import SECONDS
from tests.thorough import searching
from tests.unit.amqtt.world import World

CONNECT = b"\x10\x11\0\4MQTT\4\2\0\x3c\0\5fuzzy"
WITH_WILL = b"\x10\x2a\0\4MQTT\4\xce\0\x3c\0\5fuzzy\0\6lane/w\0\3bye\0\4user\0\4pass"
SUBSCRIBE = b"\x82\x0b\0\1\0\6lane/#\1"
PUBLISH = b"\x32\x10\0\6lane/a\0\2body-1"
EXACTLY_ONCE = b"\x34\x10\0\6lane/b\0\3body-2" + b"\x62\2\0\3"
REST = b"\x40\2\0\1" + b"\x50\2\0\1" + b"\x70\2\0\1" + b"\xc0\0" + b"\xa2\x0a\0\4\0\6lane/#" + b"\xe0\0"
STREAM = SUBSCRIBE + PUBLISH + EXACTLY_ONCE + REST
HUGE = b"\x32\xff\xff\xff\x7f\0\6lane/a\0\2"

behind_connect = mutations((STREAM, SUBSCRIBE + PUBLISH, EXACTLY_ONCE, REST, HUGE)).map(lambda data: CONNECT + data)
streams = st.one_of(behind_connect, mutations((CONNECT + STREAM, WITH_WILL + STREAM)))


async def play(world: World, stream: bytes) -> None:
    """Send it and hang up; return when the broker has let go."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(stream)
    writer.write_eof()
    async with asyncio.timeout(SECONDS):
        try:
            while await reader.read(65536):
                pass
        except ConnectionError:
            pass
        writer.close()
        while world.open_connections > 1:
            await asyncio.sleep(0.001)


def test_no_stream_makes_the_broker_stumble(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    sink = logger.add(told.append, level="ERROR", format="{message}")
    with asyncio.Runner() as runner:
        world = runner.run(World.start())
        other = runner.run(world.client("other"))

        @searching(60)
        @given(streams)
        def search(stream: bytes) -> None:
            caplog.clear()
            runner.run(play(world, stream))
            assert told == []
            assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []

        try:
            for stream in (CONNECT + STREAM, WITH_WILL + STREAM):
                world.intake.lanes.clear()
                runner.run(play(world, stream))
                assert [message.payload for message in world.intake.lane("lane")] == [b"body-1", b"body-2"]
            search()
            runner.run(other.ping())
        finally:
            runner.run(world.stop())
            logger.remove(sink)
