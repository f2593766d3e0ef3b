import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt_mosquitto import control
from mq2mqtt_mosquitto.control import (
    Clients,
    ConnectedClient,
    ControlError,
    OperationCode,
    Refused,
    Results,
    Stats,
    Table,
    Welcome,
    WelcomeFlags,
)
from tests.unit.mosquitto import hook_codec

VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[2] / "data" / "control_v1.json").read_text()
)

texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)
operations = st.builds(
    hook_codec.Operation,
    code=st.sampled_from([int(code) for code in OperationCode]),
    client_id=texts,
    topic=texts,
    qos=st.integers(0, 2),
    properties=st.binary(max_size=20),
    payload=st.binary(max_size=100),
)


def encoded(operation: hook_codec.Operation) -> bytes:
    return control.encode_operation(
        OperationCode(operation.code),
        client_id=operation.client_id,
        topic=operation.topic,
        qos=operation.qos,
        properties=operation.properties,
        payload=operation.payload,
    )


@pytest.mark.parametrize("vector", VECTORS["batches"], ids=lambda vector: str(vector["name"]))
def test_golden_batches(vector: dict[str, Any]) -> None:
    made = [
        hook_codec.Operation(
            fields["code"],
            fields["client_id"],
            fields["topic"],
            fields["qos"],
            bytes.fromhex(fields["properties"]),
            bytes.fromhex(fields["payload"]),
        )
        for fields in vector["operations"]
    ]
    data = bytes.fromhex(vector["bytes"])
    assert control.encode_batch(vector["number"], [encoded(operation) for operation in made]) == data
    assert hook_codec.decode_batch(data) == (vector["number"], made)


def expected(vector: dict[str, Any]) -> control.Answer:
    name = vector["name"].split()[0]
    if name == "welcome":
        return Welcome(
            (vector["version"][0], vector["version"][1]),
            vector["boot_epoch"],
            vector["table_crc"],
            WelcomeFlags(vector["flags"]),
            vector["broker_version"],
            vector["spool_path"],
            tuple(vector["problems"]),
        )
    if name == "results":
        return Results(bytes.fromhex(vector["results"]))
    if name == "table":
        return Table(vector["ok"], vector["text"])
    if name == "clients":
        return Clients(vector["last"], vector["offset"], tuple(ConnectedClient(*row) for row in vector["clients"]))
    if name == "refused":
        return Refused(vector["position"], vector["text"])
    counters = {(rule, counter): value for rule, counter, value in vector["counters"]}
    return Stats(counters, dict(vector["problems"]))


@pytest.mark.parametrize("vector", VECTORS["answers"], ids=lambda vector: str(vector["name"]))
def test_golden_answers(vector: dict[str, Any]) -> None:
    assert control.decode_answer(bytes.fromhex(vector["bytes"])) == (vector["number"], expected(vector))


@pytest.mark.parametrize("vector", VECTORS["answers"], ids=lambda vector: str(vector["name"]))
def test_answers_that_are_cut_off(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["bytes"])
    # The text of a refusal has no length of its own.
    shortest = 12 if vector["name"] == "refused" else len(data)
    for size in range(shortest):
        with pytest.raises(ControlError):
            control.decode_answer(data[:size])
    if vector["name"] != "refused":
        with pytest.raises(ControlError):
            control.decode_answer(data + b"\0")


@given(st.lists(operations, max_size=10), st.integers(0, 2**32 - 1))
def test_a_batch_is_read_as_it_was_made(batch: list[hook_codec.Operation], number: int) -> None:
    parts = [encoded(operation) for operation in batch]
    assert hook_codec.decode_batch(control.encode_batch(number, parts)) == (number, batch)
    position = 8
    for index, part in enumerate(parts):
        assert control.operation_at(parts, position) == index
        assert control.operation_at(parts, position + len(part) - 1) == index
        position += len(part)


@given(st.binary(max_size=200))
def test_whatever_comes_is_an_answer_or_an_error(data: bytes) -> None:
    for prefix in (b"", *(bytes((1, kind)) for kind in range(9))):
        try:
            control.decode_answer(prefix + data)
        except ControlError:
            continue


def test_a_field_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        control.encode_operation(OperationCode.KICK, client_id="c" * 65536)
