"""Why a connection ended, as its tcpclean says: on a real broker, with a raw client."""

from collections.abc import Awaitable, Callable

import pytest

from mq2mqtt.message import ClientEventType
from tests.mqtt_client import Client, connect_packet
from tests.unit.amqtt.world import World, until

End = Callable[[World, Client], Awaitable[None]]


async def _disconnect(_: World, device: Client) -> None:
    await device.disconnect()


async def _abort(_: World, device: Client) -> None:
    device.abort()


async def _connect_again(world: World, _: Client) -> None:
    await world.client("dev")


async def _kick(world: World, _: Client) -> None:
    await world.host.kick("dev")


async def _send_a_second_connect(_: World, device: Client) -> None:
    device.send(connect_packet("dev"))


async def _publish_with_a_wildcard(_: World, device: Client) -> None:
    device.send(b"\x30\x03\x00\x01#")


async def _stop_the_broker(world: World, _: Client) -> None:
    await world.host.close()


async def _be_silent(_: World, device: Client) -> None:
    await device.wait_closed()


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (_disconnect, "disconnected by client"),
        (_abort, "closed by client"),
        (_connect_again, "clientId conflict"),
        (_kick, "kicked"),
        (_send_a_second_connect, "invalid packet"),
        (_publish_with_a_wildcard, "invalid packet"),
        (_stop_the_broker, "broker stopped"),
        (_be_silent, "no heart"),
    ],
)
async def test_a_tcpclean_says_why(world: World, end: End, reason: str) -> None:
    device = await world.client("dev", clean=False, keep_alive=1 if end is _be_silent else 60)
    await end(world, device)
    await until(lambda: "tcpclean" in world.intake.told("dev"))
    told = {event.type: event for event in world.intake.events if event.channel_id == world.intake.events[0].channel_id}
    assert told[ClientEventType.TCPCLEAN].reason == reason
    assert not told[ClientEventType.CONNECT].reason
    assert not any(event.clean_session for event in told.values())
