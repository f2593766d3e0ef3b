import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt.rocketmq.errors import FrameError
from mq2mqtt.rocketmq.remoting import MAX_FRAME, Command, FrameDecoder, encode_request, encode_response, frame
from tests.unit.rocketmq.golden import golden_bytes

FIELDS = st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=4)
REQUESTS = st.lists(st.tuples(st.integers(0, 999), FIELDS, st.binary(max_size=60)), min_size=1, max_size=6)


@pytest.mark.parametrize("name", ["response_json", "response_binary"])
def test_reads_what_java_writes_in_either_serialization(name: str) -> None:
    [command] = FrameDecoder().feed(golden_bytes(name))
    assert command == Command(17, 77, 1, "no such topic é", {"queueId": "3", "msgId": "é"}, b"BODY")
    assert command.is_response
    assert not command.is_one_way


@pytest.mark.parametrize("name", ["response_json", "response_binary"])
def test_reads_frames_that_come_byte_by_byte(name: str) -> None:
    data = golden_bytes(name)
    decoder = FrameDecoder()
    assert all(not decoder.feed(data[index : index + 1]) for index in range(len(data) - 1))
    assert [command.body for command in decoder.feed(data[-1:])] == [b"BODY"]


@given(REQUESTS, st.lists(st.integers(1, 50), min_size=1))
def test_round_trip_however_the_stream_is_cut(
    requests: list[tuple[int, dict[str, str], bytes]], cuts: list[int]
) -> None:
    stream = b"".join(encode_request(code, index, fields, body) for index, (code, fields, body) in enumerate(requests))
    decoder = FrameDecoder()
    commands: list[Command] = []
    position = 0
    while position < len(stream):
        length = cuts[position % len(cuts)]
        commands += decoder.feed(stream[position : position + length])
        position += length
    assert [(c.code, c.opaque, c.fields, c.body) for c in commands] == [
        (code, index, fields, body) for index, (code, fields, body) in enumerate(requests)
    ]


def test_a_response_carries_the_requests_number() -> None:
    [request] = FrameDecoder().feed(encode_request(307, 5, {}))
    [response] = FrameDecoder().feed(encode_response(request, 3, "not done"))
    assert (response.code, response.opaque, response.is_response, response.remark) == (3, 5, True, "not done")


def test_unknown_header_fields_and_codes_are_no_error() -> None:
    header = {"code": 4711, "opaque": 1, "flag": 3, "serializeTypeCurrentRPC": "JSON", "new": {"x": []}}
    [command] = FrameDecoder().feed(frame(json.dumps(header).encode(), b""))
    assert (command.code, command.fields, command.remark, command.is_one_way) == (4711, {}, "", True)


def test_fields_are_text_whatever_the_peer_writes() -> None:
    [command] = FrameDecoder().feed(_header(extFields={"text": "a", "number": 1, "nothing": None, "list": ["x"]}))
    assert command.fields == {"text": "a", "number": "1", "list": "['x']"}
    assert command.integer("number") == 1


def _header(**changes: object) -> bytes:
    return frame(json.dumps({"code": 0, "opaque": 1, "flag": 1, **changes}).encode(), b"")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", id="another protocol"),
        pytest.param(struct.pack(">II", MAX_FRAME + 1, 10), id="too large"),
        pytest.param(struct.pack(">II", 3, 0) + b"xyz", id="shorter than its own header"),
        pytest.param(struct.pack(">II", 20, 17), id="header longer than the frame"),
        pytest.param(frame(b"not json", b""), id="no JSON"),
        pytest.param(frame(b"[" * 100_000, b""), id="deep JSON"),
        pytest.param(frame(b'"text"', b""), id="JSON but no object"),
        pytest.param(frame(b"\xff\xfe{}", b""), id="no UTF-8"),
        pytest.param(frame(b'{"code":1}', b""), id="fields missing"),
        pytest.param(_header(code="0"), id="code is a string"),
        pytest.param(_header(opaque=True), id="opaque is a boolean"),
        pytest.param(_header(extFields=[1]), id="fields are a list"),
        pytest.param(_header(remark=5), id="remark is a number"),
        pytest.param(struct.pack(">II", 6, 2 << 24 | 2) + b"{}", id="unknown serialization"),
        pytest.param(struct.pack(">II", 6, 1 << 24 | 2) + b"\0\0", id="short binary header"),
        pytest.param(struct.pack(">IIhBhiii", 21, 1 << 24 | 17, 0, 0, 0, 1, 1, -5), id="negative length"),
        pytest.param(struct.pack(">IIhBhiii", 21, 1 << 24 | 17, 0, 0, 0, 1, 1, 500), id="length beyond the end"),
        pytest.param(struct.pack(">IIhBhiiii", 25, 1 << 24 | 21, 0, 0, 0, 1, 1, 0, 99), id="fields beyond the end"),
    ],
)
def test_garbage_is_a_clear_error(data: bytes) -> None:
    with pytest.raises(FrameError):
        FrameDecoder().feed(data)


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_commands_or_a_frame_error(data: bytes) -> None:
    try:
        commands = FrameDecoder(max_frame=1000).feed(data)
    except FrameError:
        return
    assert all(isinstance(command, Command) for command in commands)


def test_a_missing_or_odd_integer_field_is_a_frame_error() -> None:
    command = Command(0, 1, 1, "", {"good": "12", "bad": "x"}, b"")
    assert command.integer("good") == 12
    for name in ("bad", "missing"):
        with pytest.raises(FrameError, match=name):
            command.integer(name)
