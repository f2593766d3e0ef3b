"""The offline queue: who gets what, when, and how often; on a host that sees acknowledgements unless said."""

import asyncio
import time
from itertools import pairwise

import pytest

from mq2mqtt.host import Delivery, DropReason, Outcome
from mq2mqtt.host.memory import MemoryClient
from mq2mqtt.message import MqttMessage, MqttProperties
from mq2mqtt.offline import pacing, replay, shelf
from tests.unit.offline.memory_store import MemoryStore
from tests.unit.offline.world import RULE, World, now_ms, payloads, settle, until

QUEUED = [Delivery(Outcome.QUEUED)]
DELIVERED = [Delivery(Outcome.DELIVERED)]
NOT_KEPT = [Delivery(Outcome.DROPPED, DropReason.NOT_PERSISTENT)]
NUMBERED = [b"%d" % number for number in range(70)]


async def received(client: MemoryClient, expected: list[bytes]) -> None:
    await until(lambda: payloads(client) == expected)


@pytest.fixture
def short_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "BATCH_SECONDS", 0.2)


@pytest.fixture
def short_confirmation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "CONFIRM_SECONDS", 1.0)


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize(("qos", "clean"), [(0, False), (0, True), (1, True), (2, True)])
async def test_what_is_not_to_be_kept_is_dropped_for_a_client_that_is_away(
    *, qos: int, clean: bool, sees: bool
) -> None:
    async with World(sees_acknowledgements=sees) as world:
        assert world.hand("a", b"x", qos=qos, clean=clean) == NOT_KEPT
        client = world.connect("a")
        assert world.hand("a", b"y", qos=qos, clean=clean) == DELIVERED
        assert payloads(client) == [b"y"]
        assert world.kept == []


async def test_a_host_that_does_not_see_its_clients_has_nothing_kept_for_them() -> None:
    async with World() as world:
        world.host.sees_clients = False
        assert world.hand("a", b"x") == NOT_KEPT


async def test_a_message_is_queued_when_it_is_in_the_store_and_not_before() -> None:
    async with World() as world:
        world.store.held = True
        outcome = world.hand("a", b"x", qos=2)
        await settle()
        assert outcome == []
        assert world.telemetry.offline.messages == 0
        world.store.commit()
        await settle()
        assert outcome == QUEUED
        assert world.queue.count("a") == world.telemetry.offline.messages == 1


async def test_a_client_that_is_there_and_acknowledges_costs_the_store_nothing() -> None:
    async with World() as world:
        client = world.connect("a")
        assert world.hand("a", b"x") == DELIVERED
        assert payloads(client) == [b"x"]
        assert world.count("stored") == 0


@pytest.mark.parametrize("end", ["time_out", "disconnect"])
async def test_what_a_client_does_not_acknowledge_is_kept(end: str) -> None:
    async with World() as world:
        world.connect("a", acknowledges=False)
        outcome = world.hand("a", b"x")
        assert outcome == []
        getattr(world.host, end)("a")
        await until(lambda: outcome == QUEUED)
        assert world.kept == [b"x"]


async def test_what_the_host_refuses_for_good_is_dropped_with_its_reason() -> None:
    async with World() as world:
        world.connect("a")
        refused = Delivery(Outcome.DROPPED, DropReason.TOO_LARGE)
        world.host.deliver = lambda _client, _message, settled, **_: settled(refused)  # type: ignore[method-assign]
        assert world.hand("a", b"x") == [refused]
        assert world.count("stored") == 0


async def test_thirty_at_once_then_thirty_each_pace_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "BATCH_SECONDS", 1.0)
    async with World() as world:
        await world.keep("a", *NUMBERED)
        client = world.connect("a")
        await settle()
        assert payloads(client) == NUMBERED[:30]
        while len(client.received) < 60:
            await asyncio.sleep(0)
        assert payloads(client) == NUMBERED[:60]
        await until(lambda: world.kept == [])
        assert payloads(client) == NUMBERED
        assert {message.retain for message in client.received} == {False}
        assert world.count("delivered") == 70


@pytest.mark.usefixtures("short_pace")
async def test_messages_that_are_never_acknowledged_let_those_behind_them_pass() -> None:
    async with World() as world:
        await world.keep("a", *NUMBERED)
        client = world.connect("a", acknowledges=False)
        for times in (1, 2, 3):
            await received(client, NUMBERED[:30] * times)
            world.host.time_out("a")
        client.acknowledges = True
        await until(lambda: world.kept == [])
        assert payloads(client)[90:] == NUMBERED[30:] + NUMBERED[:30]


@pytest.mark.usefixtures("short_pace")
async def test_who_acknowledges_nothing_gets_the_oldest_again_when_all_had_their_turn_and_on_return() -> None:
    async with World() as world:
        await world.keep("a", *NUMBERED[:40])
        client = world.connect("a", acknowledges=False)
        for batch in (*[NUMBERED[:30]] * 3, NUMBERED[30:40], NUMBERED[:30]):
            await received(client, batch)
            client.received.clear()
            world.host.time_out("a")
        world.host.disconnect("a")
        again = world.connect("a")
        await until(lambda: world.kept == [])
        assert payloads(again) == NUMBERED[:40]


async def test_the_pace_is_that_of_the_specification() -> None:
    assert (pacing.BATCH_MESSAGES, pacing.BATCH_SECONDS) == (30, 5.0)


async def test_live_messages_do_not_wait_for_kept_ones() -> None:
    async with World() as world:
        await world.keep("a", *NUMBERED)
        client = world.connect("a")
        await settle()
        assert world.hand("a", b"live") == DELIVERED
        assert payloads(client) == [*NUMBERED[:30], b"live"]


async def test_a_row_goes_only_when_its_message_is_acknowledged() -> None:
    async with World() as world:
        await world.keep("a", b"1", b"2")
        client = world.connect("a", acknowledges=False)
        await settle()
        assert payloads(client) == [b"1", b"2"]
        assert world.kept == [b"1", b"2"]
        client.unsettled.pop(0)(Delivery(Outcome.DELIVERED))
        await settle()
        assert world.kept == [b"2"]


@pytest.mark.usefixtures("short_pace")
async def test_what_is_not_acknowledged_comes_again_with_the_next_batch() -> None:
    async with World() as world:
        await world.keep("a", b"1")
        client = world.connect("a", acknowledges=False)
        await settle()
        client.acknowledges = True
        world.host.time_out("a")
        await until(lambda: payloads(client) == [b"1", b"1"])
        await until(lambda: world.kept == [])
        assert world.count("delivered") == 1


@pytest.mark.usefixtures("short_pace")
async def test_there_is_one_batch_at_a_time() -> None:
    async with World() as world:
        await world.keep("a", *NUMBERED)
        client = world.connect("a", acknowledges=False)
        await asyncio.sleep(0.5)
        assert payloads(client) == NUMBERED[:30]
        for settled in client.unsettled[:29]:
            settled(Delivery(Outcome.DELIVERED))
        await asyncio.sleep(0.3)
        assert len(client.received) == 30
        client.unsettled[29](Delivery(Outcome.DELIVERED))
        await until(lambda: len(client.received) == 60)


@pytest.mark.parametrize("limit", [("_FULL_MESSAGES", 6), ("_FULL_BYTES", 6)])
async def test_where_too_much_is_handed_over_others_have_to_wait_for_their_batch(
    limit: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, *limit)
    monkeypatch.setattr(replay, "_READERS", 1)
    async with World() as world:
        for client_id in ("a", "b", "c"):
            await world.keep(client_id, *NUMBERED[:4])
        first, second, third = [world.connect(client_id, acknowledges=False) for client_id in ("a", "b", "c")]
        await until(lambda: payloads(first) == payloads(second) == NUMBERED[:4])
        await settle()
        assert payloads(third) == []
        world.host.time_out("a")
        await received(third, NUMBERED[:4])


@pytest.mark.usefixtures("short_pace")
async def test_a_batch_ends_where_its_payloads_are_too_long_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_BATCH_BYTES", 10)
    batches = [[b"x" * 4, b"x" * 6], [b"x" * 11], [b"y", b"z"]]
    async with World() as world:
        await world.keep("a", *(payload for batch in batches for payload in batch))
        client = world.connect("a", acknowledges=False)
        for batch in batches:
            await received(client, batch)
            await settle()
            assert payloads(client) == batch
            client.received.clear()
            taken, client.unsettled = client.unsettled, []
            for settled in taken:
                settled(Delivery(Outcome.DELIVERED))
        await until(lambda: world.kept == [])


@pytest.mark.usefixtures("short_pace")
async def test_long_messages_that_are_never_acknowledged_let_those_behind_them_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replay, "_BATCH_BYTES", 10)
    async with World() as world:
        await world.keep("a", b"x" * 11, b"small")
        client = world.connect("a", acknowledges=False)
        for batch in (*[[b"x" * 11]] * 3, [b"small"]):
            await received(client, batch)
            client.received.clear()
            world.host.time_out("a")


async def test_a_client_that_goes_in_the_middle_of_a_batch_gets_no_more_of_it() -> None:
    async with World() as world:
        await world.keep("a", *NUMBERED[:30])
        client = world.connect("a")
        while not client.received:
            await asyncio.sleep(0)
        world.host.disconnect("a")
        assert len(payloads(client)) < 30
        await settle()
        assert world.kept == NUMBERED[len(payloads(client)) : 30]
        await received(world.connect("a"), world.kept)


async def test_on_the_next_connection_the_batch_comes_again_at_once() -> None:
    async with World() as world:
        await world.keep("a", *NUMBERED)
        world.connect("a", acknowledges=False)
        await settle()
        client = world.connect("a")
        await settle()
        assert payloads(client) == NUMBERED[:30]


async def test_a_client_that_comes_while_its_message_is_being_stored_gets_it() -> None:
    async with World() as world:
        world.store.held = True
        outcome = world.hand("a", b"x")
        client = world.connect("a")
        await settle()
        assert payloads(client) == []
        world.store.held = False
        world.store.commit()
        await until(lambda: payloads(client) == [b"x"])
        assert outcome == QUEUED


async def test_a_client_that_goes_while_its_messages_are_read_is_handed_nothing() -> None:
    async with World() as world:
        await world.keep("a", b"x")
        world.store.reads_wait = asyncio.Event()
        world.connect("a")
        await settle()
        world.host.disconnect("a")
        client = world.connect("a")
        world.store.reads_wait.set()
        await until(lambda: payloads(client) == [b"x"])
        assert world.count("delivered") == 1


async def test_nothing_is_handed_while_the_broker_is_out_of_reach() -> None:
    async with World() as world:
        await world.keep("a", b"x")
        world.host.go_away("no broker")
        client = world.connect("a")
        await settle()
        assert payloads(client) == []
        world.host.come_back()
        await until(lambda: payloads(client) == [b"x"])


async def test_what_can_never_be_delivered_does_not_block_what_is_behind_it() -> None:
    async with World() as world:
        await world.keep("a", b"large", b"small")
        deliver = world.host.deliver

        def refuse(client_id: str, message: MqttMessage, settled, *, handed) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
            if message.payload == b"large":
                settled(Delivery(Outcome.DROPPED, DropReason.TOO_LARGE))
            else:
                deliver(client_id, message, settled, handed=handed)

        world.host.deliver = refuse  # type: ignore[method-assign]
        client = world.connect("a")
        await until(lambda: world.kept == [])
        assert payloads(client) == [b"small"]
        assert (world.count("dropped"), world.rule.drops) == (1, {"too_large": 1})


async def test_a_store_that_is_away_delays_and_loses_nothing() -> None:
    async with World() as world:
        await world.keep("a", b"1")
        world.store.problem, world.store.refuses = "away", True
        assert world.queue.problem == "away"
        outcome = world.hand("a", b"2")
        client = world.connect("a")
        await asyncio.sleep(0.1)
        assert (outcome, payloads(client)) == ([], [])
        world.store.problem, world.store.refuses = None, False
        await until(lambda: sorted(payloads(client)) == [b"1", b"2"])
        assert outcome == QUEUED


async def test_what_the_store_refuses_for_a_while_keeps_its_order() -> None:
    async with World(sees_acknowledgements=False) as world:
        client = world.connect("a")
        world.store.room, world.store.held = 2, True
        outcomes = [world.hand("a", payload) for payload in NUMBERED[:5]]
        await settle()
        world.store.held = False
        world.store.commit()
        await settle()
        # Its turn has come, but not before theirs.
        outcomes.append(world.hand("a", NUMBERED[5]))
        await until(lambda: all(outcomes))
        assert payloads(client) == NUMBERED[:6]


async def test_what_the_database_can_never_hold_is_dropped() -> None:
    async with World() as world:
        outcome = world.hand("a", world.store.unstorable)
        await until(lambda: outcome == [Delivery(Outcome.DROPPED, DropReason.NOT_STORABLE)])


async def test_the_next_life_goes_on_with_what_the_last_one_kept() -> None:
    store = MemoryStore()
    async with World(store) as world:
        await world.keep("a", b"1", b"2")
    async with World(store) as world:
        assert (world.queue.count("a"), world.count("stored")) == (2, 2)
        await world.keep("a", b"3")
        client = world.connect("a")
        await until(lambda: payloads(client) == [b"1", b"2", b"3"])


async def test_what_a_session_missed_is_kept_with_its_qos() -> None:
    async with World() as world:
        outcome: list[Delivery] = []
        message = MqttMessage("devices/news", b"x", 2)
        world.queue.missed("a", message, outcome.append, rule_id=RULE)
        await until(lambda: outcome == QUEUED)
        assert [row.kind for row in world.store.rows.values()] == ["session"]
        client = world.connect("a")
        await until(lambda: world.kept == [])
        assert client.received == [MqttMessage("devices/news", b"x", 2)]


async def test_a_clean_session_ends_what_the_session_before_missed_and_no_p2p() -> None:
    async with World() as world:
        outcomes: list[Delivery] = []
        for number in range(250):
            world.queue.missed("a", MqttMessage("devices/news", b"%d" % number), outcomes.append, rule_id=RULE)
        await until(lambda: len(outcomes) == 250)
        await world.keep("a", b"p2p")
        client = world.connect("a", clean=True)
        await until(lambda: world.kept == [])
        assert payloads(client) == [b"p2p"]
        assert (world.count("dropped"), world.rule.drops) == (250, {"session_ended": 250})
        world.queue.missed("a", MqttMessage("devices/news", b"new"), outcomes.append, rule_id=RULE)
        await until(lambda: payloads(client) == [b"p2p", b"new"])


@pytest.mark.parametrize("kept", [0, 1])
async def test_a_clean_session_ends_also_what_is_just_being_written(kept: int) -> None:
    async with World() as world:
        outcomes: list[Delivery] = []
        news = MqttMessage("devices/news", b"x", 1)
        for _ in range(kept):
            world.queue.missed("a", news, outcomes.append, rule_id=RULE)
        await until(lambda: len(outcomes) == kept)
        world.store.held = True
        world.queue.missed("a", news, outcomes.append, rule_id=RULE)
        client = world.connect("a", clean=True)
        await settle()
        world.store.held = False
        world.store.commit()
        await until(lambda: world.count("dropped") == kept + 1)
        await until(lambda: world.kept == [])
        assert (payloads(client), outcomes) == ([], QUEUED * (kept + 1))
        world.host.disconnect("a")
        world.queue.missed("a", news, outcomes.append, rule_id=RULE)
        client = world.connect("a")
        await until(lambda: payloads(client) == [b"x"])


async def test_a_clean_session_ends_what_comes_back_from_the_connection_before() -> None:
    async with World() as world:
        outcomes: list[Delivery] = []
        for payload in (b"1", b"2"):
            world.queue.missed("a", MqttMessage("devices/news", payload, 1), outcomes.append, rule_id=RULE)
        await until(lambda: len(outcomes) == 2)
        client = world.connect("a", acknowledges=False)
        await settle()
        under_way, client.unsettled = client.unsettled, []
        client = world.connect("a", clean=True)
        for settled in under_way:
            settled(Delivery(Outcome.DROPPED, DropReason.DISCONNECTED))
        await until(lambda: world.kept == [])
        assert (payloads(client), world.count("dropped")) == ([], 2)


class TestExpiry:
    async def test_what_is_over_when_it_comes_is_not_delivered(self) -> None:
        async with World() as world:
            client = world.connect("a")
            assert world.hand("a", b"x", expires_ms=now_ms() - 1) == [Delivery(Outcome.EXPIRED)]
            assert payloads(client) == []

    async def test_what_ends_in_the_queue_goes_with_a_receipt(self) -> None:
        async with World() as world:
            await world.keep("a", b"short", expires_ms=now_ms() + 100, receipt="r")
            await world.keep("a", b"long")
            await until(lambda: world.kept == [b"long"])
            assert world.count("expired") == 1
            assert world.receipts == [
                (Outcome.QUEUED, "r", "a", "devices/p2p/a"),
                (Outcome.EXPIRED, "r", "a", "devices/p2p/a"),
            ]

    async def test_retention_ends_what_has_no_time_of_its_own(self) -> None:
        async with World(retention=1) as world:
            await world.keep("a", b"x", expires_ms=now_ms() + 3_600_000)
            await until(lambda: world.kept == [])
            assert world.count("expired") == 1

    async def test_what_is_over_at_its_replay_is_not_delivered(self) -> None:
        async with World() as world:
            await world.keep("a", b"over", expires_ms=now_ms() + 100)
            await world.keep("a", b"good")
            await asyncio.sleep(0.11)
            client = world.connect("a")
            await until(lambda: world.kept == [])
            assert payloads(client) == [b"good"]
            assert (world.count("expired"), world.count("delivered")) == (1, 1)

    async def test_the_seconds_that_are_left_are_passed_on_and_retention_is_not(self) -> None:
        async with World() as world:
            await world.keep("a", b"own", expires_ms=now_ms() + 60_000)
            await world.keep("a", b"none")
            stored = next(iter(world.store.rows.values()))
            assert stored.properties == MqttProperties(expiry_seconds=60)
            client = world.connect("a")
            await until(lambda: world.kept == [])
            own, none = client.received
            assert own.properties is not None
            assert own.properties.expiry_seconds in range(50, 61)
            assert none.properties is None

    async def test_a_message_under_way_is_delivered_or_expired_never_both(self) -> None:
        async with World() as world:
            await world.keep("a", b"x", expires_ms=now_ms() + 1000)
            client = world.connect("a", acknowledges=False)
            await settle()
            await asyncio.sleep(2.2)
            assert world.count("expired") == 0
            client.unsettled.pop()(Delivery(Outcome.DELIVERED))
            await settle()
            assert (world.count("delivered"), world.count("expired"), world.kept) == (1, 0, [])


class TestQuotas:
    async def test_the_oldest_of_a_client_makes_room(self) -> None:
        async with World(per_client=3) as world:
            await world.keep("a", *NUMBERED[:10])
            await world.keep("b", b"other")
            await until(lambda: world.kept == [*NUMBERED[7:10], b"other"])
            assert world.count("evicted") == 7
            assert world.rule.drops == {"offline_quota": 7}

    async def test_the_oldest_of_all_makes_room(self) -> None:
        async with World(total=3) as world:
            await world.keep("a", b"1", b"2")
            await world.keep("b", b"3", b"4", receipt="r")
            await until(lambda: world.kept == [b"2", b"3", b"4"])
            await world.keep("c", b"5", b"6")
            await until(lambda: world.kept == [b"4", b"5", b"6"])
            assert world.count("evicted") == 3
            assert (Outcome.EXPIRED, "r", "b", "devices/p2p/b") in world.receipts

    @pytest.mark.parametrize(("total", "left"), [(1000, {"b": 20, "c": 20}), (25, {"b": 0})])
    async def test_a_client_that_is_over_its_quota_all_the_time_holds_up_no_other_and_not_the_total(
        self, total: int, left: dict[str, int]
    ) -> None:
        async with World(per_client=20, total=total) as world:

            async def flood() -> None:
                while True:
                    world.hand("a", b"x")
                    await asyncio.sleep(0)

            flooding = asyncio.create_task(flood(), name="flooding")
            await until(lambda: world.count("evicted") > 100)
            for payload in NUMBERED[:30]:
                for client_id in left:
                    world.hand(client_id, payload)
            await until(lambda: {client_id: world.queue.count(client_id) for client_id in left} == left)
            assert not flooding.done()
            flooding.cancel()
            await asyncio.wait([flooding])

    @pytest.mark.parametrize(("per_client", "total"), [(3, 10), (10, 3)])
    async def test_a_quota_that_was_lowered_holds_from_the_start(self, per_client: int, total: int) -> None:
        store = MemoryStore()
        async with World(store) as world:
            await world.keep("a", *NUMBERED[:5])
        async with World(store, per_client=per_client, total=total) as world:
            await until(lambda: world.kept == NUMBERED[2:5])

    async def test_what_is_too_many_while_the_store_cannot_be_read_goes_later(self) -> None:
        async with World(per_client=2) as world:
            world.store.problem = "away"
            await world.keep("a", *NUMBERED[:4])
            await asyncio.sleep(0.1)
            world.store.problem = None
            await until(lambda: world.kept == NUMBERED[2:4])

    async def test_what_is_under_way_is_passed_over_page_by_page(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shelf, "_PAGE_MESSAGES", 50)
        async with World(sees_acknowledgements=False, total=205) as world:
            for number in range(6):
                world.connect(f"here{number}", acknowledges=False)
            for payload in NUMBERED[:35]:
                for number in range(6):
                    world.hand(f"here{number}", payload)
            await until(lambda: len(world.kept) == 210)
            await world.keep("away", b"last")
            await until(lambda: b"last" not in world.kept)
            assert world.count("evicted") == 1

    async def test_what_is_delivered_while_the_oldest_are_read_makes_room_too(self) -> None:
        async with World(per_client=3) as world:
            await world.keep("a", *NUMBERED[:3])
            client = world.connect("a", acknowledges=False)
            await until(lambda: len(client.unsettled) == 3)
            world.store.reads_wait = asyncio.Event()
            outcomes: list[Delivery] = []
            for payload in NUMBERED[3:5]:
                world.queue.missed("a", MqttMessage("devices/news", payload, 1), outcomes.append, rule_id=RULE)
            await until(lambda: world.queue.count("a") == 5)
            await settle()
            for settled in client.unsettled[:2]:
                settled(Delivery(Outcome.DELIVERED))
            world.store.reads_wait.set()
            await settle()
            assert (world.count("evicted"), world.queue.count("a")) == (0, 3)

    async def test_what_is_under_way_is_not_taken_back(self) -> None:
        async with World(per_client=2) as world:
            await world.keep("a", b"1", b"2")
            world.connect("a", acknowledges=False)
            await settle()
            outcomes = [world.hand("a", payload) for payload in (b"3", b"4")]
            world.host.time_out("a")
            await until(lambda: all(outcomes))
            await until(lambda: len(world.kept) == 2)
            assert world.kept == [b"3", b"4"]


class TestReceipts:
    async def test_whoever_was_told_that_a_message_is_kept_hears_that_its_session_ended(self) -> None:
        async with World() as world:
            outcomes: list[Delivery] = []
            world.queue.missed("a", MqttMessage("t", b"x", 1), outcomes.append, rule_id=RULE, receipt="r")
            await until(lambda: outcomes == QUEUED)
            world.connect("a", clean=True)
            await until(lambda: world.kept == [])
            assert world.receipts == [(Outcome.EXPIRED, "r", "a", "t")]

    @pytest.mark.parametrize("sees", [True, False])
    async def test_whoever_was_told_that_a_message_is_kept_hears_that_the_broker_refuses_it(
        self,
        sees: bool,  # noqa: FBT001
    ) -> None:
        async with World(sees_acknowledgements=sees) as world:
            await world.keep("a", b"kept", receipt="1")
            client = world.connect("a", acknowledges=False)
            await until(lambda: len(client.unsettled) == 1)
            live = world.hand("a", b"live", receipt="2")
            await until(lambda: len(client.unsettled) == 2)
            for settled in client.unsettled:
                settled(Delivery(Outcome.DROPPED, DropReason.TOO_LARGE))
            await until(lambda: bool(live))
            await until(lambda: world.kept == [])
            told = [outcome for outcome, receipt, _, _ in world.receipts if receipt == "1"]
            assert told == [Outcome.QUEUED, Outcome.EXPIRED]
            # Nobody was told that it is kept, and nobody hears of any other drop.
            assert {outcome for outcome, receipt, _, _ in world.receipts if receipt == "2"} <= {Outcome.DROPPED}

    async def test_each_outcome_of_a_live_message(self) -> None:
        async with World() as world:
            world.connect("a")
            world.hand("a", b"x", receipt="1")
            world.hand("b", b"x", receipt="2", clean=True)
            world.hand("b", b"x", receipt="3", expires_ms=1)
            assert [(outcome, receipt) for outcome, receipt, _, _ in world.receipts] == [
                ("delivered", "1"),
                ("dropped", "2"),
                ("expired", "3"),
            ]

    async def test_queued_and_later_delivered_gives_both_in_this_order(self) -> None:
        async with World() as world:
            await world.keep("a", b"x", receipt="1")
            world.connect("a")
            await until(lambda: world.kept == [])
            assert [outcome for outcome, _, _, _ in world.receipts] == ["queued", "delivered"]


class TestUnseenAcknowledgements:
    """A host like Mosquitto."""

    @pytest.mark.usefixtures("short_confirmation")
    async def test_it_is_kept_first_and_handed_over_at_once(self) -> None:
        async with World(sees_acknowledgements=False) as world:
            client = world.connect("a")
            world.store.held = True
            outcome = world.hand("a", b"x", receipt="r")
            await settle()
            assert (outcome, payloads(client)) == ([], [])
            world.store.held = False
            world.store.commit()
            await settle()
            assert (outcome, payloads(client)) == (DELIVERED, [b"x"])
            assert (world.kept, world.receipts) == ([b"x"], [])
            await until(lambda: world.kept == [])
            assert [outcome for outcome, _, _, _ in world.receipts] == ["delivered"]
            assert payloads(client) == [b"x"]

    @pytest.mark.usefixtures("short_confirmation")
    async def test_a_connection_that_ends_too_soon_gets_it_again(self) -> None:
        async with World(sees_acknowledgements=False) as world:
            world.connect("a")
            outcome = world.hand("a", b"x", receipt="r")
            await until(lambda: outcome == DELIVERED)
            world.host.disconnect("a")
            await asyncio.sleep(1.3)
            assert world.kept == [b"x"]
            client = world.connect("a")
            await until(lambda: world.kept == [])
            assert payloads(client) == [b"x"]
            assert [outcome for outcome, _, _, _ in world.receipts] == ["queued", "delivered"]
            assert world.count("delivered") == 1

    @pytest.mark.usefixtures("short_confirmation")
    async def test_where_ends_are_told_late_a_connection_has_to_last_longer(self) -> None:
        async with World(sees_acknowledgements=False) as world:
            world.connect("a")
            outcome = world.hand("a", b"x")
            await until(lambda: outcome == DELIVERED)
            world.host.hears_late = True
            await asyncio.sleep(1.5)
            assert world.kept == [b"x"]
            world.host.hears_late = False
            await until(lambda: world.kept == [])

    @pytest.mark.usefixtures("short_confirmation")
    async def test_a_broker_that_is_away_confirms_nothing(self) -> None:
        async with World(sees_acknowledgements=False) as world:
            world.connect("a")
            outcome = world.hand("a", b"x")
            await until(lambda: outcome == DELIVERED)
            world.host.go_away("killed")
            await asyncio.sleep(1.5)
            assert world.kept == [b"x"]
            world.host.come_back()
            world.host.disconnect("a")
            client = world.connect("a")
            await until(lambda: world.kept == [])
            assert payloads(client) == [b"x"]

    @pytest.mark.usefixtures("short_confirmation")
    async def test_a_connection_that_outlives_a_problem_is_confirmed_after_it(self) -> None:
        async with World(sees_acknowledgements=False) as world:
            client = world.connect("a")
            outcome = world.hand("a", b"x")
            await until(lambda: outcome == DELIVERED)
            world.host.go_away("does not answer")
            await asyncio.sleep(1.5)
            world.host.come_back()
            await until(lambda: world.kept == [])
            assert payloads(client) == [b"x"]

    @pytest.mark.usefixtures("short_pace")
    async def test_a_device_that_is_never_there_for_long_gets_all_in_turn(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with World(sees_acknowledgements=False) as world:
            await world.keep("a", *NUMBERED)
            for expected in (NUMBERED[:30], NUMBERED[30:60], NUMBERED[60:], NUMBERED[:30]):
                client = world.connect("a")
                await until(lambda client=client: client.received)  # type: ignore[misc]
                await settle()
                assert payloads(client) == expected
                world.host.disconnect("a")
            monkeypatch.setattr(replay, "CONFIRM_SECONDS", 0.2)
            client = world.connect("a")
            await until(lambda: world.kept == [])
            assert payloads(client) == [*NUMBERED[30:], *NUMBERED[:30]]

    @pytest.mark.usefixtures("short_confirmation")
    async def test_a_process_that_stood_still_first_hears_who_has_gone(self) -> None:
        async with World(sees_acknowledgements=False) as world:
            world.connect("a")
            outcome = world.hand("a", b"x")
            await until(lambda: outcome == DELIVERED)
            time.sleep(2.3)  # noqa: ASYNC251 - as SIGSTOP does
            await asyncio.sleep(0.01)
            world.host.disconnect("a")
            client = world.connect("a")
            await until(lambda: payloads(client) == [b"x"])
            await until(lambda: world.kept == [])

    async def test_thousands_are_confirmed_in_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replay, "CONFIRM_SECONDS", 1)
        async with World(sees_acknowledgements=False) as world:
            world.host.go_away("does not answer")
            world.store.room = 3000
            for number in range(3000):
                world.connect(f"c{number}")
                world.hand(f"c{number}", b"x")
            await until(lambda: len(world.store.rows) == 3000)
            world.host.come_back()
            left: list[int] = []
            while world.telemetry.offline.messages:
                await asyncio.sleep(0)
                left.append(world.telemetry.offline.messages)
            assert max(before - after for before, after in pairwise([3000, *left])) <= 200

    @pytest.mark.usefixtures("short_confirmation", "short_pace")
    async def test_batches_wait_for_their_confirmation(self) -> None:
        async with World(sees_acknowledgements=False) as world:
            await world.keep("a", *NUMBERED)
            client = world.connect("a")
            await settle()
            assert (payloads(client), len(world.kept)) == (NUMBERED[:30], 70)
            await until(lambda: world.kept == [])
            assert payloads(client) == NUMBERED

    async def test_what_the_broker_cannot_hand_over_is_queued(self) -> None:
        async with World(sees_acknowledgements=False) as world:
            client = world.connect("a", acknowledges=False)
            outcome = world.hand("a", b"x", receipt="r")
            await settle()
            client.unsettled.pop()(NOT_KEPT[0])
            assert outcome == QUEUED
            assert [outcome for outcome, _, _, _ in world.receipts] == ["queued"]
            assert world.kept == [b"x"]


class TestEnd:
    async def test_nothing_is_handed_over_any_more_and_what_is_under_way_is_waited_for(self) -> None:
        async with World() as world:
            await world.keep("a", b"1")
            client = world.connect("a", acknowledges=False)
            await settle()
            finishing = asyncio.ensure_future(world.queue.finish())
            await settle()
            assert not finishing.done()
            await world.keep("b", b"2")
            other = world.connect("b")
            client.unsettled.pop()(Delivery(Outcome.DELIVERED))
            await asyncio.wait_for(finishing, 20)
            await settle()
            assert payloads(other) == []
            assert world.kept == [b"2"]

    async def test_what_the_broker_has_is_not_waited_for_until_it_is_confirmed(self) -> None:
        async with World(sees_acknowledgements=False) as world:
            client = world.connect("a", acknowledges=False)
            world.hand("a", b"x")
            await until(lambda: len(client.unsettled) == 1)
            finishing = asyncio.ensure_future(world.queue.finish())
            await settle()
            assert not finishing.done()
            client.unsettled.pop()(Delivery(Outcome.DELIVERED))
            await settle()
            assert finishing.done()
            assert world.kept == [b"x"]
