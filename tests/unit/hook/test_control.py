"""The bytes of a batch to `$CONTROL/mq2mqtt/v1` (docs/mosquitto-protocol.md)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.thorough import searching
from tests.unit.hook.batches import BATCH_BYTES, DELIVER, HELLO, KICK, LIST, PUBLISH, STATS, TABLE, Operation, batch
from tests.unit.hook.driver import Driver, text

SOUND = {
    "hello": Operation(HELLO),
    "table": Operation(TABLE, payload=b"mq2mqtt-table 1 1000 process - -\n"),
    "deliver": Operation(DELIVER, 1, b"dev", b"a/p2p/dev", b"\x03\0\x01x", b"body"),
    "publish": Operation(PUBLISH, 2, b"", "a/\u20ac".encode(), b"", b""),
    "kick": Operation(KICK, client_id=b"dev"),
    "list": Operation(LIST),
    "stats": Operation(STATS),
}


def answer_to(*operations: Operation, number: int) -> str:
    fields = [[str(one.code), str(one.qos), *map(text, one[2:])] for one in operations]
    return " ".join(["sound", str(len(operations)), str(number), *(field for one in fields for field in one)])


@pytest.mark.parametrize("name", SOUND)
def test_each_operation(name: str, driver: Driver) -> None:
    assert driver.ask("control", batch(SOUND[name]).hex()).strip() == answer_to(SOUND[name], number=7)


def test_all_in_one_batch_and_none(driver: Driver) -> None:
    assert driver.ask("control", batch(*SOUND.values(), number=2**32 - 1).hex()).strip() == answer_to(
        *SOUND.values(), number=2**32 - 1
    )
    assert driver.ask("control", batch().hex()).strip() == "sound 0 7"


@pytest.mark.parametrize(
    "operation",
    [
        Operation(0),
        Operation(8),
        Operation(255),
        SOUND["deliver"]._replace(qos=3),
        SOUND["deliver"]._replace(client_id=b""),
        SOUND["deliver"]._replace(client_id=b"a\0b"),
        SOUND["deliver"]._replace(topic=b""),
        SOUND["deliver"]._replace(topic=b"a/#"),
        SOUND["deliver"]._replace(topic=b"a/+/b"),
        SOUND["deliver"]._replace(topic=b"a\0"),
        SOUND["deliver"]._replace(topic=b"\xff"),
        SOUND["publish"]._replace(client_id=b"dev"),
        SOUND["publish"]._replace(topic=b""),
        SOUND["kick"]._replace(client_id=b""),
        SOUND["kick"]._replace(topic=b"t"),
        SOUND["kick"]._replace(payload=b"x"),
        SOUND["hello"]._replace(properties=b"x"),
        SOUND["list"]._replace(client_id=b"x"),
        SOUND["stats"]._replace(payload=b"x"),
        SOUND["table"]._replace(topic=b"x"),
    ],
    ids=repr,
)
def test_one_wrong_operation_refuses_the_batch_with_its_position(operation: Operation, driver: Driver) -> None:
    position = BATCH_BYTES + len(SOUND["publish"].pack())
    answer = driver.ask("control", batch(SOUND["publish"], operation, SOUND["hello"]).hex())
    assert answer.startswith(f"refused {position} ")


def test_every_cut_and_every_byte_too_many(driver: Driver) -> None:
    whole = batch(*SOUND.values())
    for size in range(len(whole)):
        assert driver.ask("control", text(whole[:size])).startswith("refused"), size
    assert driver.ask("control", (whole + b"x").hex()) == f"refused {len(whole)} bytes after the last operation"
    assert driver.ask("control", batch(SOUND["hello"], count=2).hex()).startswith("refused 20 ")
    assert driver.ask("control", "02" + whole.hex()[2:]).startswith("refused 0 ")
    assert driver.ask("control", "0101" + whole.hex()[4:]).startswith("refused 0 ")


def test_any_bytes(driver: Driver) -> None:
    whole = batch(*SOUND.values())

    @searching(500)
    @given(changes=st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4))
    def search(changes: list[tuple[int, int]]) -> None:
        data = bytearray(whole)
        for at, value in changes:
            data[at] = value
        answer = driver.ask("control", data.hex())
        assert answer.startswith(("sound", "refused"))
        assert answer.startswith("sound") or bytes(data) != whole

    search()
