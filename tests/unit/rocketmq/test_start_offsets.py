"""Births of groups, against brokers made of two dictionaries."""

# ruff: noqa: ARG002 - the fake has the client's signatures

import asyncio
from typing import cast

import pytest

from mq2mqtt.rocketmq import Client, NotConnected, ReadQueue, RequestCode, Response, TopicRoute
from mq2mqtt.rocketmq.errors import NoPermission
from mq2mqtt.rocketmq.start_offsets import Start, StartOffsets

QUEUES = tuple(ReadQueue(broker, number) for broker in ("a", "b") for number in range(2))
ROUTE = TopicRoute("t", (), QUEUES, {"a": {0: "a:1"}, "b": {0: "b:1"}})


class Brokers:
    """`ends` are the queues' maxima; `legacy` ones answer 0 for an offset that is not stored."""

    def __init__(self, *, legacy: bool = False) -> None:
        self.ends = dict.fromkeys(QUEUES, 100)
        self.oldest = 10
        self.stored: dict[tuple[str, str], int] = {}
        self.legacy = legacy
        self.down: set[str] = set()
        self.stores_left = 10**6
        self.refusal = 0

    async def call(self, address: str, code: int, fields: dict[str, str]) -> Response:
        await asyncio.sleep(0)
        if address in self.down or (code == RequestCode.UPDATE_CONSUMER_OFFSET and self.stores_left <= 0):
            raise NotConnected(address, "down")
        if self.refusal:
            return Response(self.refusal, 1, 1, "refused", {}, b"")
        key = (address, fields["queueId"])
        if code == RequestCode.UPDATE_CONSUMER_OFFSET:
            self.stores_left -= 1
            await self._store(key, int(fields["commitOffset"]))
            return Response(0, 1, 1, "", {}, b"")
        assert code == RequestCode.QUERY_CONSUMER_OFFSET
        assert fields["setZeroIfNotFound"] == "false"
        if key in self.stored or self.legacy:
            return Response(0, 1, 1, "", {"offset": str(self.stored.get(key, 0))}, b"")
        return Response(22, 1, 1, "not found", {}, b"")

    async def _store(self, key: tuple[str, str], offset: int) -> None:
        # As the real ones: the first offset of a group makes the table of all, without a lock.
        had_table = any(address == key[0] for address, _ in self.stored)
        await asyncio.sleep(0)
        if not had_table:
            self.stored = {other: stored for other, stored in self.stored.items() if other[0] != key[0]}
        self.stored[key] = offset

    async def max_offset(self, address: str, topic: str, queue_id: int) -> int:
        await asyncio.sleep(0)
        return self.ends[ReadQueue(address[0], queue_id)]

    async def min_offset(self, address: str, topic: str, queue_id: int) -> int:
        await asyncio.sleep(0)
        return self.oldest

    async def offset_by_time(self, address: str, topic: str, queue_id: int, time_ms: int) -> int:
        await asyncio.sleep(0)
        return time_ms // 1000


def starts(brokers: Brokers, start: Start = "latest") -> StartOffsets:
    return StartOffsets(cast("Client", brokers), group="g", topic="t", start=start)


@pytest.mark.parametrize(("start", "expected"), [("latest", 100), ("earliest", 10), (50_000, 50)])
@pytest.mark.parametrize("legacy", [False, True])
async def test_a_birth_is_of_all_queues_and_stored_at_once(start: Start, expected: int, *, legacy: bool) -> None:
    brokers = Brokers(legacy=legacy)

    found = await starts(brokers, start).find(QUEUES[:1], ROUTE)

    assert found == {QUEUES[0]: expected}
    for queue in QUEUES:
        assert brokers.stored[f"{queue.broker}:1", str(queue.queue_id)] == expected


@pytest.mark.parametrize("legacy", [False, True])
async def test_a_group_is_born_once_even_at_zero(*, legacy: bool) -> None:
    brokers = Brokers(legacy=legacy)
    brokers.ends = dict.fromkeys(QUEUES, 0)
    await starts(brokers).find(QUEUES, ROUTE)
    brokers.ends = dict.fromkeys(QUEUES, 7)

    assert await starts(brokers).find(QUEUES, ROUTE) == dict.fromkeys(QUEUES, 0)


async def test_a_queue_that_appears_later_begins_at_its_minimum() -> None:
    brokers = Brokers()
    brokers.stored["a:1", "0"] = 60

    assert await starts(brokers).find(QUEUES[:2], ROUTE) == {QUEUES[0]: 60, QUEUES[1]: 10}
    assert brokers.stored == {("a:1", "0"): 60, ("a:1", "1"): 10}


async def test_a_topic_that_is_made_again_is_no_birth() -> None:
    brokers = Brokers()
    for queue in QUEUES:
        brokers.stored[f"{queue.broker}:1", str(queue.queue_id)] = 60
    one = starts(brokers)
    await one.find(QUEUES, ROUTE)
    brokers.stored.clear()

    assert await one.find(QUEUES, ROUTE) == dict.fromkeys(QUEUES, 10)


async def test_offsets_that_a_broker_kept_of_a_deleted_topic_are_not_those_of_the_new_one() -> None:
    brokers = Brokers(legacy=True)
    one = starts(brokers)
    await one.find(QUEUES, ROUTE)
    brokers.oldest = 0
    one.renew(QUEUES[:3])
    brokers.stores_left = 1
    with pytest.raises(NotConnected):
        await one.find(QUEUES[:2], ROUTE)
    brokers.stores_left = 100

    assert await one.find(QUEUES[:2], ROUTE) == dict.fromkeys(QUEUES[:2], 0)
    assert await one.find(QUEUES, ROUTE) == {**dict.fromkeys(QUEUES[:3], 0), QUEUES[3]: 100}
    assert brokers.stored["b:1", "0"] == 0


async def test_a_crash_in_the_middle_of_a_birth_loses_nothing() -> None:
    brokers = Brokers()
    brokers.stores_left = 2
    with pytest.raises(NotConnected):
        await starts(brokers).find(QUEUES, ROUTE)
    brokers.stores_left = 100
    brokers.ends = dict.fromkeys(QUEUES, 500)

    found = await starts(brokers).find(QUEUES, ROUTE)

    assert sorted(found.values()) == [10, 10, 100, 100]


async def test_of_two_births_the_second_yields() -> None:
    brokers = Brokers()
    first, second = starts(brokers), starts(brokers)
    one = asyncio.create_task(first.find(QUEUES[:2], ROUTE), name="one")
    for _ in range(4):
        await asyncio.sleep(0)
    two = asyncio.create_task(second.find(QUEUES[2:], ROUTE), name="two")
    await one
    brokers.ends = dict.fromkeys(QUEUES, 900)

    assert await two == dict.fromkeys(QUEUES[2:], 100)


async def test_a_known_queue_starts_although_another_broker_is_down() -> None:
    brokers = Brokers()
    brokers.stored["a:1", "0"] = 60
    brokers.down = {"b:1"}

    assert await starts(brokers).find([QUEUES[0], QUEUES[2]], ROUTE) == {QUEUES[0]: 60}


async def test_no_group_is_born_while_a_broker_is_down() -> None:
    brokers = Brokers()
    brokers.down = {"b:1"}

    with pytest.raises(NotConnected):
        await starts(brokers).find(QUEUES, ROUTE)

    assert brokers.stored == {}


async def test_a_broker_without_a_master_cannot_be_asked() -> None:
    with pytest.raises(NotConnected, match="broker b"):
        await starts(Brokers()).find(QUEUES, TopicRoute("t", (), QUEUES, {"a": {0: "a:1"}, "b": {1: "b:2"}}))


async def test_a_refusal_is_told() -> None:
    brokers = Brokers()
    brokers.refusal = 16

    with pytest.raises(NoPermission):
        await starts(brokers).find(QUEUES, ROUTE)
