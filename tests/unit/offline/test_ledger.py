"""What the ledger says is true, whatever transactions and reads do meanwhile."""

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mq2mqtt.offline.ledger import Ledger

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "add", "fly", "land", "leave", "delete", "read", "look", "look"]), st.integers(0, 9)
    ),
    max_size=80,
)


def test_a_row_that_a_slow_read_brings_is_not_of_a_message_that_waits() -> None:
    ledger = Ledger()
    ledger.add("a")
    slow = ledger.begin_read()
    ledger.leave(1, "a")
    ledger.deleted([1])
    assert not ledger.waits(1)
    ledger.end_read(slow)
    assert ledger.waits(1)  # forgotten: no read can bring it any more


@given(STEPS)
@hypothesis_settings(max_examples=300)
def test_no_read_ever_brings_a_message_that_does_not_wait(  # noqa: C901 - a branch for each step
    steps: list[tuple[str, int]],
) -> None:
    ledger = Ledger()
    table: set[int] = set()  # committed rows
    waiting: set[int] = set()
    flying: set[int] = set()
    writing: list[int] = []
    deleting: list[int] = []
    reads: list[tuple[int, set[int]]] = []
    number = 0

    def pick(ids: set[int], choice: int) -> int:
        return sorted(ids)[choice % len(ids)]

    for step, choice in steps:
        if step == "write":
            ledger.write(number, "a")
            table.add(number)
            writing.append(number)
            number += 1
        elif step == "add" and writing:
            one = writing.pop(choice % len(writing))
            ledger.written(one)
            ledger.add("a")
            waiting.add(one)
        elif step == "fly" and waiting:
            one = pick(waiting, choice)
            ledger.fly(one, "a")
            waiting.remove(one)
            flying.add(one)
        elif step == "land" and flying:
            one = pick(flying, choice)
            ledger.land(one)
            flying.remove(one)
            waiting.add(one)
        elif step == "leave" and waiting | flying:
            one = pick(waiting | flying, choice)
            ledger.leave(one, "a")
            waiting.discard(one)
            flying.discard(one)
            deleting.append(one)
        elif step == "delete" and deleting:
            one = deleting.pop(choice % len(deleting))
            table.remove(one)
            ledger.deleted([one])
        elif step == "read":
            reads.append((ledger.begin_read(), set(table)))
        elif step == "look" and reads:
            ticket, rows = reads.pop(choice % len(reads))
            assert {row for row in rows if ledger.waits(row)} == rows & waiting
            ledger.end_read(ticket)
        assert ledger.total == ledger.counts["a"] == len(waiting) + len(flying)
        assert ledger.waiting("a") == len(waiting)
