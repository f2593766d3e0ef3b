"""The trie against amqtt's own matching and its own table."""
# ruff: noqa: SLF001 - that is what is compared

import asyncio

from amqtt.broker import Broker
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.session import Session
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt_amqtt.subscriptions import Subscriptions

levels = st.sampled_from(["a", "b", "", "$x"])
names = st.lists(levels, min_size=1, max_size=4).map("/".join).filter(bool)
filters = st.one_of(
    st.lists(st.one_of(levels, st.just("+")), min_size=1, max_size=4).map("/".join),
    st.lists(st.one_of(levels, st.just("+")), max_size=3).map(lambda found: "/".join([*found, "#"])),
).filter(bool)
steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "delete", "forget"]), st.integers(0, 2), filters, st.integers(0, 2)
    ),
    max_size=15,
)


def _session(number: int) -> Session:
    session = Session()
    session.client_id = f"client-{number}"
    return session


@given(steps, st.lists(names, min_size=1, max_size=5))
def test_subscribers_are_those_of_amqtts_table_after_any_changes(
    changes: list[tuple[str, int, str, int]], topics: list[str]
) -> None:
    asyncio.run(_compare(changes, topics))


async def _compare(changes: list[tuple[str, int, str, int]], topics: list[str]) -> None:
    broker = Broker({"plugins": {}})
    subscriptions = Subscriptions(broker)
    sessions = [_session(number) for number in range(3)]
    for session in sessions:
        broker.sessions[session.client_id or ""] = session, BrokerProtocolHandler(broker.plugins_manager)
    granted: dict[tuple[str, str | None], int] = {}
    for change, number, topic_filter, qos in changes:
        session = sessions[number]
        if change == "add":
            if await broker.add_subscription((topic_filter, qos), session) != 0x80:
                granted[topic_filter, session.client_id] = qos
        elif change == "delete":
            broker._del_subscription(topic_filter, session)
            granted.pop((topic_filter, session.client_id), None)
        else:
            await broker._del_all_subscriptions(session)
            granted = {key: value for key, value in granted.items() if key[1] != session.client_id}
        for topic in topics:
            expected: dict[str | None, int] = {}
            for (known, client_id), level in granted.items():
                if broker._matches(topic, known):
                    expected[client_id] = max(level, expected.get(client_id, 0))
            assert {s.session.client_id: s.qos for s in subscriptions.of(topic)} == expected
            each = sorted(level for (known, _), level in granted.items() if broker._matches(topic, known))
            assert sorted(qos for _, qos in subscriptions.matching(topic)) == each
        for one in sessions:
            own = {known for known, client_id in granted if client_id == one.client_id}
            assert set(subscriptions.filters_of(one.client_id or "")) == own
        assert broker.subscriptions.keys() == {known for known, _ in granted}


async def test_a_restored_subscription_is_seen() -> None:
    broker = Broker({"plugins": {}})
    await broker.add_subscription(("a/#", 1), _session(0))
    subscriptions = Subscriptions(broker)
    assert [s.qos for s in subscriptions.of("a/b")] == [1]
    await broker.plugins_manager.context.add_subscription("restored", "a/+", 2)  # type: ignore[attr-defined]
    assert {s.session.client_id for s in subscriptions.of("a/b")} == {"client-0", "restored"}
