import time
from unittest.mock import patch

from mq2mqtt.rocketmq.unique import UniqueIds

MS = 1_000_000
END_OF_JANUARY_MS = 1_769_903_999_999  # 2026-01-31 23:59:59.999 UTC


def test_ids_are_distinct_rising_and_in_javas_shape() -> None:
    ids = UniqueIds()
    taken = [*ids.take(200_000), *ids.take(3)]
    assert len(set(taken)) == 200_003
    assert taken == sorted(taken)
    assert {len(one) for one in taken} == {32}
    assert all(bytes.fromhex(one) for one in taken[:10])


def test_two_processes_share_no_id() -> None:
    assert UniqueIds().take(1)[0][:20] != UniqueIds().take(1)[0][:20]


def test_a_clock_that_is_set_back_repeats_nothing() -> None:
    ids = UniqueIds()
    now = time.time_ns()
    first = ids.take(5)
    with patch("mq2mqtt.rocketmq.unique.time.time_ns", return_value=now - 60_000 * MS):
        second = ids.take(5)
    assert not set(first) & set(second)


def test_time_is_milliseconds_of_the_month() -> None:
    with patch("mq2mqtt.rocketmq.unique.time.time_ns", return_value=END_OF_JANUARY_MS * MS) as clock:
        ids = UniqueIds()
        [last] = ids.take(1)
        clock.return_value += MS
        [first] = ids.take(1)
    assert int(last[20:28], 16) == 31 * 86_400_000 - 1
    assert int(first[20:28], 16) == 0
    assert last[:20] != first[:20]
