"""Our packets against amqtt's own codec."""
# ruff: noqa: FBT001 - hypothesis passes arguments by position

import asyncio
from typing import Any

import pytest
from amqtt.adapters import BufferReader
from amqtt.mqtt.publish import PublishPacket
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt_amqtt.announce import decode
from mq2mqtt_amqtt.packets import (
    PUBACK,
    PUBREL,
    Frame,
    MalformedPacketError,
    acknowledgement,
    packet_id,
    parse_publish,
)

topics = st.text(st.characters(exclude_characters="+#\0", exclude_categories=["Cs"]), min_size=1, max_size=100)
payloads = st.one_of(st.binary(max_size=300), st.integers(100, 20_000).map(bytes))
ids = st.integers(1, 65_535)


@given(topics, payloads, st.integers(0, 2), ids)
def test_amqtt_reads_the_frames_that_we_write(topic: str, payload: bytes, qos: int, number: int) -> None:
    data = Frame(topic, payload, qos).encode(number)
    reader = BufferReader(data)
    packet = asyncio.run(PublishPacket.from_stream(reader))
    assert (packet.topic_name, packet.data, packet.qos) == (topic, payload, qos)
    assert packet.packet_id == (number if qos else None)
    assert (packet.retain_flag, packet.dup_flag) == (False, False)
    assert asyncio.run(reader.read(1)) == b""


@given(topics, payloads, st.integers(0, 2), ids, st.booleans(), st.booleans())
def test_we_read_what_amqtt_writes(  # noqa: PLR0913, PLR0917 - the fields of PUBLISH
    topic: str,
    payload: bytes,
    qos: int,
    number: int,
    dup: bool,
    retain: bool,
) -> None:
    packet = PublishPacket.build(topic, payload, number if qos else None, dup, qos, retain)
    assert packet.variable_header is not None
    body = packet.variable_header.to_bytes() + payload
    publish = parse_publish(packet.fixed_header.flags, bytes(body))
    assert (publish.topic, publish.payload, publish.qos) == (topic, payload, qos)
    assert (publish.packet_id, publish.dup, publish.retain) == (number if qos else 0, dup, retain)


@given(st.integers(0, 15), st.binary(max_size=20))
def test_whatever_comes_is_a_publish_or_malformed(flags: int, body: bytes) -> None:
    try:
        publish = parse_publish(flags, body)
    except MalformedPacketError:
        return
    assert len(publish.topic.encode()) + len(publish.payload) + (4 if publish.qos else 2) == len(body)


@given(ids)
def test_acknowledgements(number: int) -> None:
    for kind in (PUBACK, PUBREL):
        data = acknowledgement(kind, number)
        packet: Any = decode(data[0], data[2:])
        assert packet.packet_id == packet_id(data[2:]) == number
        assert packet.to_bytes() == data


@pytest.mark.parametrize("body", [b"", b"\x00", b"\x00\x00"])
def test_a_packet_identifier_is_there_and_not_zero(body: bytes) -> None:
    with pytest.raises(MalformedPacketError):
        packet_id(body)
