"""What a plugin says late of who may receive a message: on a real broker, with a raw client."""

import asyncio

import pytest

from mq2mqtt.host import Delivery, DropReason, Outcome, Settled
from mq2mqtt.message import MqttMessage
from mq2mqtt_amqtt.outbox import STUCK_UNSETTLED
from tests.mqtt_client import Client
from tests.unit.amqtt.conftest import StartWorld
from tests.unit.amqtt.plugins import ANSWERS, Answers
from tests.unit.amqtt.world import AUTH, World, until

NOT_AUTHORIZED = Delivery(Outcome.DROPPED, DropReason.NOT_AUTHORIZED)
QUEUED = Delivery(Outcome.QUEUED)


class Asked:
    """A broker with a persistent client `dev`; what was missed, and what became of each message, in that order."""

    def __init__(self, world: World, device: Client) -> None:
        self.world = world
        self.device = device
        self.missed: list[bytes] = []
        self.settled: list[tuple[bytes, Delivery]] = []

    def publish(self, topic: str, payload: bytes) -> None:
        def settled(delivery: Delivery) -> None:
            self.settled.append((payload, delivery))

        def missed(_client_id: str, _qos: int, told: Settled) -> None:
            self.missed.append(payload)
            told(QUEUED)

        self.world.host.publish(MqttMessage(topic, payload), settled, handed=lambda: None, missed=missed)

    async def leave(self) -> None:
        self.device.abort()
        await until(lambda: not self.world.host.is_online("dev"))


@pytest.fixture
def later() -> dict[str, asyncio.Future[bool]]:
    """Answers that are not given yet, by topic."""
    Answers.later = {}
    return Answers.later


@pytest.fixture
async def asked(start_world: StartWorld, later: dict[str, asyncio.Future[bool]]) -> Asked:
    world = await start_world(plugins={AUTH: {"allow_anonymous": True}, ANSWERS: {}})
    device = await world.client("dev", clean=False, acknowledge=False)
    await device.subscribe(("into/#", 1))
    for name in ("slow", "slower"):
        later[f"into/{name}"] = asyncio.get_running_loop().create_future()
    return Asked(world, device)


async def test_sessions_that_are_away_miss_messages_in_their_order(
    asked: Asked, later: dict[str, asyncio.Future[bool]]
) -> None:
    await asked.leave()
    await asked.world.client("other")
    for number, name in enumerate(["slow", "quick", "slower", "quick"]):
        asked.publish(f"into/{name}", b"%d" % number)
    later["into/slower"].set_result(False)
    await until(lambda: bool(asked.settled))
    assert asked.settled == [(b"2", NOT_AUTHORIZED)]
    later["into/slow"].set_result(True)
    await until(lambda: len(asked.settled) == 4)
    assert asked.missed == [b"0", b"1", b"3"]


async def test_who_leaves_before_the_answer_misses_what_it_may_receive(
    asked: Asked, later: dict[str, asyncio.Future[bool]]
) -> None:
    for name in ("slow", "slower", "quick"):
        asked.publish(f"into/{name}", name.encode())
    await asked.leave()
    later["into/slower"].set_result(False)
    later["into/slow"].set_result(True)
    await until(lambda: len(asked.settled) == 3)
    assert sorted(asked.missed) == [b"quick", b"slow"]
    assert (b"slower", NOT_AUTHORIZED) in asked.settled


async def test_who_does_not_read_misses_only_what_it_may_receive(
    asked: Asked, later: dict[str, asyncio.Future[bool]]
) -> None:
    for _ in range(STUCK_UNSETTLED + 1):
        asked.publish("into/slow", b"")
    outbox = asked.world.host._lifecycle.online["dev"].outbox  # noqa: SLF001 - nobody is told before the answer
    await until(lambda: not outbox._unsettled)  # noqa: SLF001
    asked.publish("into/slower", b"")
    assert not asked.settled
    for answer in later.values():
        answer.set_result(False)
    await until(lambda: len(asked.settled) == STUCK_UNSETTLED + 2)
    assert {delivery for _, delivery in asked.settled} == {NOT_AUTHORIZED}
    assert not asked.missed
