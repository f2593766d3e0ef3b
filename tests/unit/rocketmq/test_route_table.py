import asyncio

import pytest

from mq2mqtt.rocketmq.errors import NotConnected
from mq2mqtt.rocketmq.route import TopicRoute, WriteQueue
from mq2mqtt.rocketmq.route_table import RouteTable


def route(address: str) -> TopicRoute:
    return TopicRoute("t", (WriteQueue("b", 0),), (), {"b": {0: address, 1: "replica:1"}})


class Names:
    """Counts what is fetched; can hold a fetch back or fail it."""

    def __init__(self) -> None:
        self.fetched = 0
        self.address = "h:1"
        self.error: NotConnected | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self, _topic: str) -> TopicRoute:
        self.fetched += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return route(self.address)


async def test_callers_share_one_fetch_and_a_cancelled_one_does_no_harm() -> None:
    names = Names()
    names.gate.clear()
    table = RouteTable(names.fetch)
    first, *others = [asyncio.ensure_future(table.get("t", max_age=30)) for _ in range(5)]
    await asyncio.sleep(0)
    first.cancel()
    names.gate.set()
    assert {one.master("b") for one in await asyncio.gather(*others)} == {"h:1"}
    assert names.fetched == 1
    assert (await table.get("t", max_age=30)).master("b") == "h:1"
    assert names.fetched == 1
    await table.get("t", max_age=0)
    assert names.fetched == 2


async def test_an_old_route_is_kept_when_no_name_server_answers() -> None:
    names = Names()
    table = RouteTable(names.fetch)
    await table.get("t", max_age=30)
    names.error = NotConnected("n:1", "refused")
    for _ in range(2):
        with pytest.raises(NotConnected):
            await table.get("t", max_age=0)
    assert table.cached("t") == route("h:1")
    assert table.addresses(masters_only=True) == {"h:1"}
    assert table.addresses(masters_only=False) == {"h:1", "replica:1"}


async def test_doubt_refreshes_in_the_background_and_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names()
    table = RouteTable(names.fetch)
    await table.get("t", max_age=30)
    names.address = "h:2"
    for _ in range(10):
        table.doubt("t")
    await asyncio.sleep(0)
    assert names.fetched == 1
    monkeypatch.setattr("mq2mqtt.rocketmq.route_table._HURRY_SECONDS", 0)
    table.doubt("t")
    table.doubt("unknown")
    while table.cached("t") != route("h:2"):
        await asyncio.sleep(0)
    assert names.fetched == 2


async def test_a_route_in_use_is_kept_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names()
    table = RouteTable(names.fetch)
    await table.get("t", max_age=30)
    names.address = "h:2"
    table.cached("t")
    await asyncio.sleep(0)
    assert names.fetched == 1
    monkeypatch.setattr("mq2mqtt.rocketmq.route_table._USED_SECONDS", 0)
    while table.cached("t") != route("h:2"):
        await asyncio.sleep(0)


async def test_old_routes_are_refreshed_and_unused_ones_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names()
    table = RouteTable(names.fetch)
    await table.get("t", max_age=30)
    table.refresh_old()
    await asyncio.sleep(0)
    assert names.fetched == 1
    monkeypatch.setattr("mq2mqtt.rocketmq.route_table.REFRESH_SECONDS", 0)
    table.refresh_old()
    await asyncio.sleep(0)
    assert names.fetched == 2
    monkeypatch.setattr("mq2mqtt.rocketmq.route_table._FORGET_SECONDS", -1)
    await asyncio.sleep(0)
    table.refresh_old()
    assert table.cached("t") is None


async def test_closing_ends_a_fetch_and_its_callers() -> None:
    names = Names()
    names.gate.clear()
    table = RouteTable(names.fetch)
    caller = asyncio.ensure_future(table.get("t", max_age=30))
    await asyncio.sleep(0)
    await table.close()
    with pytest.raises(NotConnected, match="closed"):
        await caller


async def test_a_forgotten_route_is_fetched_again() -> None:
    names = Names()
    table = RouteTable(names.fetch)
    await table.get("t", max_age=30)
    table.forget("t")
    table.forget("unknown")
    assert table.cached("t") is None
    await table.get("t", max_age=30)
    assert names.fetched == 2
