from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt.rocketmq.message import ReceivedMessage
from mq2mqtt.rocketmq.offsets import WINDOW_BYTES, WINDOW_MESSAGES, SettledPrefix


def message(offset: int, body: bytes = b"") -> ReceivedMessage:
    return ReceivedMessage("t", body, {}, "b", 0, offset, 0, 0, 0, 0, 0, 0, bytes(8))


@given(st.data(), st.lists(st.integers(1, 5), max_size=40), st.integers(0, 10**12))
def test_what_is_committed_is_the_settled_prefix(data: st.DataObject, gaps: list[int], start: int) -> None:
    """Whatever the gaps between offsets and the order of settling, against the definition."""
    offsets = [start + sum(gaps[:index]) for index in range(1, len(gaps) + 1)]
    messages = list(map(message, offsets))
    end = (offsets[-1] if offsets else start) + data.draw(st.integers(1, 5))
    progress = SettledPrefix(start)
    progress.hand_out(messages, end)
    settled: set[int] = set()

    for one in data.draw(st.permutations(messages)):
        assert progress.settle(one)
        settled.add(one.offset)
        assert progress.committable == next((offset for offset in offsets if offset not in settled), end)
        assert progress.unsettled == len(messages) - len(settled)
    assert progress.committable == end


def test_a_message_is_settled_once() -> None:
    progress = SettledPrefix(0)
    first = message(0)
    progress.hand_out([first], 1)

    assert progress.settle(first)
    assert not progress.settle(first)


def test_a_message_of_an_earlier_time_settles_nothing() -> None:
    progress = SettledPrefix(0)
    progress.hand_out([message(0)], 1)

    assert not progress.settle(message(0))
    assert progress.committable == 0


def test_the_window_is_counted_in_messages() -> None:
    progress = SettledPrefix(0)
    first = list(map(message, range(WINDOW_MESSAGES - 3)))
    progress.hand_out(first, len(first))
    following = list(map(message, range(len(first), len(first) + 10)))

    assert progress.room(following) == 3
    assert progress.room(following[:2]) == 2
    progress.hand_out(following[:3], following[3].offset)
    assert progress.room(following[3:]) == 0
    progress.settle(first[7])
    assert progress.room(following[3:]) == 1


def test_the_window_is_counted_in_bytes_but_lets_one_message_through() -> None:
    progress = SettledPrefix(0)
    huge = message(0, bytes(WINDOW_BYTES + 1))
    assert progress.room([huge, message(1)]) == 1
    progress.hand_out([huge], 1)
    assert progress.room([message(1, b"x")]) == 0
    progress.settle(huge)

    half = bytes(WINDOW_BYTES // 2)
    assert progress.room([message(1, half), message(2, half), message(3, b"x")]) == 2


def test_a_reset_forgets_what_is_out() -> None:
    progress = SettledPrefix(100)
    old = message(100)
    progress.hand_out([old], 101)
    progress.reset(40)

    assert progress.committable == 40
    assert not progress.settle(old)
    assert progress.unsettled == 0
