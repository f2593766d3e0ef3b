import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt.rocketmq.allocation import allocate, java_order, java_string_hash
from mq2mqtt.rocketmq.route import ReadQueue

# Printed by AllocateMessageQueueAveragely of rocketmq-client 5.3.3, by `tests/e2e/java/Peer.java allocate`.
JAVA = [
    ("b", ["b", "a", "c"], 7, "broker-b:0,broker-b:1"),
    ("c", ["b", "a", "c"], 2, ""),
    ("x", ["y"], 3, ""),
    ("a", ["a"], 3, "broker-a:0,broker-b:0,broker-b:1"),
    ("a@1", ["a@1", "a", "a@10", "A"], 9, "broker-b:1,broker-b:2"),
    ("telemetry", ["telemetry", "x"], 5, "broker-a:0,broker-a:1,broker-b:0"),
]


def queues(count: int) -> list[ReadQueue]:
    return [ReadQueue(("broker-b", "broker-a")[number % 2], number // 2) for number in range(count)]


@pytest.mark.parametrize(("client_id", "members", "count", "expected"), JAVA)
def test_a_share_is_javas(client_id: str, members: list[str], count: int, expected: str) -> None:
    mine = allocate(client_id, queues=queues(count), members=members)

    assert ",".join(f"{queue.broker}:{queue.queue_id}" for queue in mine) == expected


@given(st.sets(st.text(), min_size=1, max_size=12), st.integers(0, 40))
def test_members_share_all_queues_without_overlap(members: set[str], count: int) -> None:
    shares = [allocate(member, queues=queues(count), members=members) for member in members]

    together = [queue for share in shares for queue in share]
    assert sorted(together) == sorted(queues(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), st.integers(0, 20))
def test_a_member_listed_twice_owns_both_shares(members: list[str], count: int) -> None:
    together = [queue for member in set(members) for queue in allocate(member, queues=queues(count), members=members)]

    assert sorted(together) == sorted(queues(count))


def test_the_order_is_that_of_utf_16() -> None:
    # U+1F600 begins with the surrogate D83D, before U+FFEE; by code point it comes after.
    assert sorted(["\uffee", "\U0001f600", "ab", "a", "B"], key=java_order) == ["B", "a", "ab", "\U0001f600", "\uffee"]


@pytest.mark.parametrize(
    # Printed by String.hashCode() of Java 17.
    ("text", "expected"),
    [
        ("", 0),
        ("a", 97),
        ("Aa", 2112),
        ("BB", 2112),
        ("MQ2MQTT", 1_985_818_418),
        ("MQ2MQTT_TAG", -1_726_301_971),
        ("\U0001f600", 1_772_899),
    ],
)
def test_the_hash_is_javas(text: str, expected: int) -> None:
    assert java_string_hash(text) == expected
