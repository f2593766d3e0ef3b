import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt.errors import UnmappableMessageError
from mq2mqtt.message import MqttMessage, MqttProperties
from mq2mqtt.spool.frame import (
    HEADER_BYTES,
    Frame,
    FrameKind,
    accepted_us_of,
    count_frames,
    decode_frames,
    encode,
    encode_publish,
    find_frame,
    frame_end,
    problem_at,
    size_of,
)
from mq2mqtt.spool.properties import decode_properties, encode_properties

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "data/frames_v1.json").read_text("utf-8"))

texts = st.text(st.characters(codec="utf-8"), max_size=50)
properties = st.builds(
    MqttProperties,
    content_type=st.none() | texts,
    expiry_seconds=st.none() | st.integers(0, 2**32 - 1),
    user=st.lists(st.tuples(texts, texts), max_size=4).map(tuple),
)
messages = st.builds(
    MqttMessage,
    topic=texts,
    payload=st.binary(max_size=300),
    qos=st.integers(0, 2),
    retain=st.booleans(),
    client_id=texts,
    clean_session=st.booleans(),
    properties=st.none() | properties,
)
frames = st.builds(
    Frame,
    kind=st.sampled_from(FrameKind),
    flags=st.integers(0, 31).filter(lambda flags: flags & 3 != 3),
    accepted_us=st.integers(0, 2**64 - 1),
    client_id=st.binary(max_size=40).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
    topic=st.binary(max_size=40).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
    properties=st.binary(max_size=40),
    payload=st.binary(max_size=300),
)


def decode_one(data: bytes) -> Frame:
    decoded, ends = decode_frames(data, 0, max_frames=1)
    assert ends == [len(data)]
    return decoded[0]


def fields_of(vector: dict[str, Any]) -> Frame:
    flags = vector["qos"] | vector["retain"] << 2 | vector["clean_session"] << 3 | vector["will"] << 4
    client_id, topic = (
        bytes.fromhex(vector[name]).decode("utf-8", "surrogateescape") for name in ("client_id_hex", "topic_hex")
    )
    return Frame(
        vector["kind"],
        flags,
        vector["accepted_us"],
        client_id,
        topic,
        bytes.fromhex(vector["properties_hex"]),
        bytes.fromhex(vector["payload_hex"]),
    )


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
class TestGoldenVectors:
    def test_is_decoded_to_its_fields(self, vector: dict[str, Any]) -> None:
        decoded = decode_one(bytes.fromhex(vector["frame_hex"]))
        assert decoded == fields_of(vector)
        assert (decoded.qos, decoded.retain, decoded.clean_session, decoded.will) == tuple(
            vector[name] for name in ("qos", "retain", "clean_session", "will")
        )

    def test_is_what_its_fields_encode_to(self, vector: dict[str, Any]) -> None:
        assert encode(fields_of(vector)).hex() == vector["frame_hex"]

    def test_has_its_mqtt_properties(self, vector: dict[str, Any]) -> None:
        expected = vector.get("mqtt_properties")
        if vector["kind"] == FrameKind.PUBLISH:
            assert decode_one(bytes.fromhex(vector["frame_hex"])).mqtt_properties == (
                expected
                and MqttProperties(
                    expected["content_type"], expected["expiry_seconds"], tuple(map(tuple, expected["user"]))
                )
            )


@given(messages, st.integers(0, 2**64 - 1), st.booleans())
def test_a_publish_round_trips(message: MqttMessage, accepted_us: int, will: bool) -> None:  # noqa: FBT001
    frame = decode_one(encode_publish(message, accepted_us=accepted_us, will=will))
    again = MqttMessage(
        frame.topic,
        frame.payload,
        frame.qos,
        frame.retain,
        frame.client_id,
        frame.clean_session,
        message.properties if message.properties == MqttProperties() else frame.mqtt_properties,
    )
    assert again == message
    assert (frame.kind, frame.accepted_us, frame.will) == (FrameKind.PUBLISH, accepted_us, will)


@given(st.lists(frames, max_size=8))
def test_frames_one_after_another_round_trip(several: list[Frame]) -> None:
    data = b"".join(map(encode, several))
    decoded, ends = decode_frames(data, 0, max_frames=100)
    assert decoded == several
    assert count_frames(data, 0) == (len(several), len(data))
    starts = [0, *ends[:-1]]
    for frame, start, end in zip(several, starts, ends, strict=False):
        assert frame_end(data, start) == end == start + (size_of(data, start) or 0)
        assert accepted_us_of(data[start : start + HEADER_BYTES]) == frame.accepted_us


@given(frames, st.data())
def test_no_prefix_of_a_frame_is_a_frame_or_damage(frame: Frame, data: st.DataObject) -> None:
    whole = encode(frame)
    prefix = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert decode_frames(prefix, 0, max_frames=1) == ([], [])
    assert count_frames(prefix, 0) == (0, 0)
    assert problem_at(prefix, 0) is None


@given(frames, st.data())
def test_a_flipped_bit_is_never_taken_for_a_frame(frame: Frame, data: st.DataObject) -> None:
    damaged = bytearray(encode(frame))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert decode_frames(bytes(damaged), 0, max_frames=1) == ([], [])
    assert count_frames(damaged, 0) == (0, 0)
    assert frame_end(damaged, 0) is None


@pytest.mark.parametrize(
    ("position", "value", "problem"),
    [
        (0, 19, "impossible frame size"),
        (3, 0xFF, "impossible frame size"),
        (8, 2, "frame version 2"),
        (9, 5, "unknown frame kind 5"),
        (10, 3, "illegal frame flags"),
        (10, 0x20, "illegal frame flags"),
        (11, 1, "reserved byte"),
        (13, 1, "longer than the frame size"),
        (40, 0, "CRC mismatch"),
    ],
)
def test_the_problem_is_named(position: int, value: int, problem: str) -> None:
    damaged = bytearray(encode_publish(MqttMessage("sensors/a", b"payload", client_id="dev"), accepted_us=1))
    damaged[position] = value
    assert problem in (problem_at(damaged, 0) or "")


def test_zeros_are_no_frames() -> None:
    # The CRC of nothing is 0: without a least size, zeros would be an endless row of empty frames.
    assert decode_frames(bytes(4096), 0, max_frames=10) == ([], [])
    assert count_frames(bytes(4096), 0) == (0, 0)
    assert find_frame(bytes(4096), 0) is None


def test_a_frame_is_found_at_any_byte() -> None:
    frame = encode(Frame(1, 1, 5, "dev", "sensors/a", b"", b"payload"))
    for lead in range(70):
        assert find_frame(b"\x01" * lead + frame + b"rest", 0) == lead


def test_reading_is_bounded_by_messages_and_bytes_but_yields_at_least_one() -> None:
    frame = encode(Frame(1, 1, 5, "dev", "sensors/a", b"", b"payload"))
    data = frame * 5
    assert len(decode_frames(data, 0, max_frames=3)[0]) == 3
    assert len(decode_frames(data, 0, max_frames=9, max_bytes=2 * len(frame))[0]) == 2
    assert len(decode_frames(data, len(frame), max_frames=9, max_bytes=2 * len(frame) - 1)[0]) == 1
    assert len(decode_frames(data, 0, max_frames=9, max_bytes=1)[0]) == 1


@pytest.mark.parametrize(
    "message",
    [MqttMessage("t" * 65536, b""), MqttMessage("t", b"", client_id="c" * 65536), MqttMessage("t", b"", qos=3)],
    ids=["topic", "client id", "qos"],
)
def test_what_mqtt_cannot_carry_is_refused(message: MqttMessage) -> None:
    with pytest.raises(ValueError, match="frame"):
        encode_publish(message, accepted_us=1)


@given(properties)
def test_properties_round_trip(value: MqttProperties) -> None:
    assert (decode_properties(encode_properties(value)) or MqttProperties()) == value


@given(properties, st.data())
def test_properties_that_are_cut_are_malformed_or_shorter(value: MqttProperties, data: st.DataObject) -> None:
    section = encode_properties(value)
    cut = section[: data.draw(st.integers(0, len(section)))]
    try:
        decoded = decode_properties(cut) or MqttProperties()
    except UnmappableMessageError:
        return
    assert cut == encode_properties(decoded)


@pytest.mark.parametrize("section", ["00", "7f", "02000000", "0300", "030005ab", "0b80", "0101 01", "26000161", "2100"])
def test_malformed_properties_park_the_message(section: str) -> None:
    frame = decode_one(encode(Frame(1, 0, 0, "d", "t", bytes.fromhex(section), b"")))
    with pytest.raises(UnmappableMessageError, match="malformed MQTT 5 properties"):
        _ = frame.mqtt_properties


@pytest.mark.parametrize(
    "value", [MqttProperties(expiry_seconds=2**32), MqttProperties(expiry_seconds=-1), MqttProperties("t" * 65536)]
)
def test_properties_that_do_not_fit_are_refused(value: MqttProperties) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        encode_properties(value)
