"""What a broker with very many subscriptions does for one client costs no look at those of the others."""

import asyncio
from typing import NoReturn

import pytest
from amqtt.contexts import Action

from tests.mqtt_client import subscribe_packet
from tests.unit.amqtt.conftest import StartWorld
from tests.unit.amqtt.plugins import TOPIC_GATE, TopicGate
from tests.unit.amqtt.world import AUTH, World, until


@pytest.fixture
def gate() -> type[TopicGate]:
    # amqtt makes the plugin of its class.
    TopicGate.opened, TopicGate.asked = asyncio.Event(), asyncio.Event()
    return TopicGate


def _fail(*_: object) -> NoReturn:
    raise AssertionError("amqtt goes through the filters of all clients")


async def test_no_client_has_the_filters_of_all_gone_through(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    table = world.broker.subscriptions
    for name in ("__iter__", "items", "keys", "values"):
        monkeypatch.setattr(type(table), name, _fail, raising=False)
    monkeypatch.setattr(world.broker, "_matches", _fail)
    device = await world.client("dev", clean=False)
    await device.subscribe(("a/+", 1), ("a/b", 0))
    assert repr(table) == "<2 filters>"
    sender = await world.client("sender")
    await sender.publish("a/b", b"live", qos=1)
    assert sorted(message.qos for message in await device.wait_messages(2)) == [0, 1]
    await device.disconnect()
    await until(lambda: not world.host.is_online("dev"))
    await sender.publish("a/c", b"missed", qos=1)
    await sender.publish("a/b", b"missed", qos=1)
    back = await world.client("dev", clean=False)
    assert [(message.topic, message.payload) for message in await back.wait_messages(2)] == [
        ("a/c", b"missed"),
        ("a/b", b"missed"),
    ]
    await back.unsubscribe("a/+", "a/b")
    await back.ping()
    assert len(back.messages) == 2


async def test_filters_that_nobody_subscribes_to_any_more_take_no_memory(world: World) -> None:
    device = await world.client("dev", clean=False)
    for number in range(3):
        await device.subscribe((f"reply/{number}", 1))
        await device.unsubscribe(f"reply/{number}")
    assert not world.broker.subscriptions
    assert not world.host._subscriptions._filters  # noqa: SLF001


async def test_a_message_reaches_all_while_others_subscribe(start_world: StartWorld, gate: type[TopicGate]) -> None:
    gate.holds = Action.RECEIVE
    world = await start_world(plugins={AUTH: {"allow_anonymous": True}, TOPIC_GATE: {}})
    receivers = [await world.client(name) for name in ("one", "two")]
    await receivers[0].subscribe(("a/+", 1))
    await receivers[1].subscribe(("a/b", 1))
    await receivers[0].publish("a/b", b"to both", qos=1)
    await gate.asked.wait()
    other = await world.client("other")
    await other.subscribe(("c", 1))
    gate.opened.set()
    for receiver in receivers:
        (message,) = await receiver.wait_messages(1)
        assert message.payload == b"to both"


@pytest.mark.parametrize("clean", [True, False])
async def test_a_client_that_has_gone_subscribes_to_nothing(
    start_world: StartWorld, gate: type[TopicGate], *, clean: bool
) -> None:
    gate.holds = Action.SUBSCRIBE
    world = await start_world(plugins={AUTH: {"allow_anonymous": True}, TOPIC_GATE: {}})
    device = await world.client("dev", clean=clean)
    device.send(subscribe_packet(1, ("into/#", 1)))
    await gate.asked.wait()
    device.abort()
    await until(lambda: not world.host.is_online("dev"))
    again = await world.client("dev")
    gate.opened.set()
    await again.subscribe(("other", 1))
    assert await world.publish("into/a").outcome() == ("no_subscriber", None)
    assert list(world.broker.subscriptions) == ["other"]
