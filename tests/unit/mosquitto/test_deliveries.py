import asyncio

from mq2mqtt_mosquitto.control import (
    BATCH_BYTES,
    BATCH_OPERATIONS,
    OperationCode,
    Refused,
    Result,
    Results,
    encode_operation,
)
from mq2mqtt_mosquitto.deliveries import UNANSWERED_BATCHES, Deliveries
from tests.unit.mosquitto import hook_codec


class Wire:
    """Takes batches as a connection does."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[str]]] = []
        self.full = False

    def send(self, data: bytes) -> bool:
        if not self.full:
            number, operations = hook_codec.decode_batch(data)
            self.batches.append((number, [operation.client_id for operation in operations]))
        return not self.full

    @property
    def names(self) -> list[str]:
        return [name for _, batch in self.batches for name in batch]


class Box:
    """Deliveries with their outcomes."""

    def __init__(self) -> None:
        self.deliveries = Deliveries()
        self.outcomes: dict[str, Result] = {}

    def add(self, name: str, *, payload_bytes: int = 0) -> None:
        operation = encode_operation(OperationCode.DELIVER, client_id=name, topic="t", payload=b"x" * payload_bytes)

        def done(result: Result) -> None:
            assert name not in self.outcomes
            self.outcomes[name] = result

        self.deliveries.add(operation, done)

    def answer_all(self, wire: Wire) -> None:
        answered = 0
        while answered < len(wire.batches):
            number, names = wire.batches[answered]
            self.deliveries.answered(number, Results(bytes(len(names))))
            answered += 1


async def test_what_comes_in_one_turn_is_one_batch_and_each_gets_its_result() -> None:
    box, wire = Box(), Wire()
    box.deliveries.connected(wire.send)
    for number in range(4):
        box.add(str(number))
    assert wire.batches == []
    await asyncio.sleep(0)
    ((number, names),) = wire.batches
    assert names == ["0", "1", "2", "3"]
    box.deliveries.answered(number + 1, Results(bytes(4)))
    assert box.outcomes == {}
    box.deliveries.answered(number, Results(bytes((0, 1, 2, 3))))
    assert list(box.outcomes.values()) == list(Result)
    box.deliveries.answered(number, Results(bytes((0, 1, 2, 3))))


async def test_what_comes_meanwhile_waits_for_the_answer_or_for_enough_others() -> None:
    box, wire = Box(), Wire()
    box.deliveries.connected(wire.send)
    box.add("first")
    await asyncio.sleep(0)
    for name in ("a", "b"):
        box.add(name)
        await asyncio.sleep(0)
    assert wire.names == ["first"]
    box.deliveries.answered(wire.batches[0][0], Results(b"\0"))
    assert [names for _, names in wire.batches] == [["first"], ["a", "b"]]
    for number in range(BATCH_OPERATIONS):
        box.add(str(number))
    await asyncio.sleep(0)
    assert [len(names) for _, names in wire.batches] == [1, 2, BATCH_OPERATIONS]


async def test_batches_have_limits() -> None:
    box, wire = Box(), Wire()
    box.deliveries.connected(wire.send)
    for number in range(BATCH_OPERATIONS + 1):
        box.add(str(number))
    for number in range(3):
        box.add(f"big{number}", payload_bytes=BATCH_BYTES // 2)
    box.add("huge", payload_bytes=2 * BATCH_BYTES)
    await asyncio.sleep(0)
    box.answer_all(wire)
    assert [len(names) for _, names in wire.batches] == [BATCH_OPERATIONS, 2, 1, 1, 1]


async def test_what_is_longer_than_the_broker_takes_is_refused_and_the_rest_fits() -> None:
    box, wire = Box(), Wire()
    sizes: list[int] = []

    def send(data: bytes) -> bool:
        sizes.append(len(data))
        return wire.send(data)

    box.deliveries.connected(send, packet_bytes=2000)
    for name, payload_bytes in (("a", 1000), ("huge", 2000), ("b", 1000), ("c", 500)):
        box.add(name, payload_bytes=payload_bytes)
    await asyncio.sleep(0)
    box.answer_all(wire)
    assert box.outcomes.pop("huge") == Result.REFUSED
    assert box.outcomes == dict.fromkeys("abc", Result.DELIVERED)
    assert [names for _, names in wire.batches] == [["a"], ["b", "c"]]
    assert max(sizes) < 2000


async def test_batches_that_were_too_long_are_sent_again_in_shorter_ones() -> None:
    box, wire = Box(), Wire()
    box.deliveries.connected(wire.send)
    for name in "ab":
        box.add(name, payload_bytes=1000)
    box.add("huge", payload_bytes=5000)
    await asyncio.sleep(0)
    assert box.deliveries.longest_unanswered > 7000
    box.deliveries.limit(2000)
    box.answer_all(wire)
    assert box.outcomes == {"a": Result.DELIVERED, "b": Result.DELIVERED, "huge": Result.REFUSED}
    assert [names for _, names in wire.batches] == [["a", "b", "huge"], ["a"], ["b"]]


async def test_so_many_batches_are_on_their_way_and_no_more() -> None:
    box, wire = Box(), Wire()
    box.deliveries.connected(wire.send)
    for number in range(2 * UNANSWERED_BATCHES + BATCH_OPERATIONS):
        box.add(str(number), payload_bytes=BATCH_BYTES)
    await asyncio.sleep(0)
    assert len(wire.batches) == UNANSWERED_BATCHES
    assert box.deliveries.overdue_seconds >= 0
    box.deliveries.answered(wire.batches[0][0], Results(b"\0"))
    assert len(wire.batches) == UNANSWERED_BATCHES + 1


async def test_a_full_connection_is_left_alone_until_it_has_room() -> None:
    box, wire = Box(), Wire()
    wire.full = True
    box.deliveries.connected(wire.send)
    for number in range(2000):
        box.add(str(number))
    await asyncio.sleep(0)
    room = asyncio.create_task(box.deliveries.room(), name="room")
    await asyncio.sleep(0)
    assert not room.done()
    wire.full = False
    box.deliveries.flush()
    await room
    assert wire.names == [str(number) for number in range(2000)]


async def test_what_was_not_answered_is_sent_again_first_and_in_order() -> None:
    box, first, second = Box(), Wire(), Wire()
    box.deliveries.connected(first.send)
    for number in range(BATCH_OPERATIONS * 3):
        box.add(str(number))
    await asyncio.sleep(0)
    box.deliveries.answered(first.batches[0][0], Results(bytes(BATCH_OPERATIONS)))
    box.deliveries.disconnected()
    box.deliveries.disconnected()
    box.add("late")
    await asyncio.sleep(0)
    # An answer that comes too late is nobody's: its batch has another number now.
    box.deliveries.connected(second.send)
    box.deliveries.answered(first.batches[1][0], Results(bytes(BATCH_OPERATIONS)))
    box.answer_all(second)
    assert second.names == [*(str(number) for number in range(BATCH_OPERATIONS, 3 * BATCH_OPERATIONS)), "late"]
    assert len(box.outcomes) == 3 * BATCH_OPERATIONS + 1
    assert box.deliveries.overdue_seconds == 0


async def test_of_a_refused_batch_only_the_culprit_is_lost() -> None:
    box, wire = Box(), Wire()
    box.deliveries.connected(wire.send)
    for name in ("a", "bad", "c"):
        box.add(name)
    await asyncio.sleep(0)
    first = len(encode_operation(OperationCode.DELIVER, client_id="a", topic="t"))
    box.deliveries.answered(wire.batches[0][0], Refused(8 + first, "wrong topic"))
    assert box.outcomes == {"bad": Result.REFUSED}
    assert wire.batches[1][1] == ["a", "c"]
    box.deliveries.answered(wire.batches[1][0], Results(b"\0\0"))
    assert set(box.outcomes) == {"a", "bad", "c"}


async def test_results_of_another_number_of_operations_are_no_answer() -> None:
    box, wire = Box(), Wire()
    box.deliveries.connected(wire.send)
    box.add("a")
    await asyncio.sleep(0)
    box.deliveries.answered(wire.batches[0][0], Results(b"\0\0"))
    assert box.outcomes == {}
    assert box.deliveries.overdue_seconds > 0
