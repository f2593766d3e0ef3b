"""Batches come at once on return, and then each five seconds."""

from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt.offline.pacing import BATCH_SECONDS, Pacer

CLIENTS = st.sampled_from(["a", "b", "c"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("want"), CLIENTS),
        st.tuples(st.just("forget"), CLIENTS),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.5, 4.0, 5.0, 7.0])),
        st.tuples(st.just("take"), st.none()),
    ),
    max_size=60,
)


def test_the_first_batch_comes_at_once_and_the_next_five_seconds_later() -> None:
    pacer = Pacer()
    pacer.want("a", 100.0)
    assert pacer.take_due(100.0) == "a"
    pacer.want("a", 101.0)
    assert pacer.take_due(104.9) is None
    assert pacer.next_at == 105.0
    assert pacer.take_due(105.0) == "a"


def test_whoever_went_and_came_back_gets_a_batch_at_once() -> None:
    pacer = Pacer()
    pacer.want("a", 100.0)
    pacer.take_due(100.0)
    pacer.want("a", 100.0)
    pacer.forget("a")
    assert pacer.next_at is None
    pacer.want("a", 101.0)
    assert pacer.take_due(101.0) == "a"


def test_a_batch_that_came_to_nothing_is_tried_again_after_its_delay() -> None:
    pacer = Pacer()
    pacer.want("a", 100.0)
    pacer.take_due(100.0)
    pacer.retry("a", 100.0, delay=1.0)
    assert pacer.take_due(100.9) is None
    assert pacer.take_due(101.0) == "a"


@given(STEPS)
def test_no_client_is_early_none_is_forgotten_and_each_has_one_turn_for_each_wish(
    steps: list[tuple[str, object]],
) -> None:
    pacer = Pacer()
    now = 0.0
    began: dict[str, float] = {}
    wants: dict[str, float] = {}
    for step, argument in steps:
        if step == "wait":
            assert isinstance(argument, float)
            now += argument
        elif step == "take":
            due = {client for client, at in wants.items() if max(at, began.get(client, -9.0) + BATCH_SECONDS) <= now}
            taken = pacer.take_due(now)
            assert (taken in due) if due else (taken is None)
            if taken is not None:
                began[taken] = now
                del wants[taken]
        else:
            assert isinstance(argument, str)
            if step == "want":
                pacer.want(argument, now)
                wants.setdefault(argument, now)
            else:
                pacer.forget(argument)
                began.pop(argument, None)
                wants.pop(argument, None)
    expected = [max(at, began.get(client, -9.0) + BATCH_SECONDS) for client, at in wants.items()]
    assert pacer.next_at == (min(expected) if expected else None)
