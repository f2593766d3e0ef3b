import pytest

from mq2mqtt_mosquitto import mqtt5
from mq2mqtt_mosquitto.mqtt5 import Connack, Decoder, Disconnect, MqttError, Publish, Suback

STREAM = (
    b"\x20\x06\x01\x00\x03\x22\x00\x0a"  # CONNACK with a property
    b"\xd0\x00"
    b"\x90\x05\x12\x34\x00\x00\x87"  # SUBACK
    b"\x30\x0a\x00\x03a/b\x02\x01\x00hi"  # PUBLISH with a property
    b"\xe0\x02\x8e\x00"
)
PACKETS = [Connack(True, 0), None, Suback(0x1234, b"\0\x87"), Publish("a/b", b"hi"), Disconnect(0x8E)]  # noqa: FBT003


def test_a_stream_in_pieces_of_any_size() -> None:
    for size in range(1, len(STREAM) + 1):
        decoder = Decoder()
        packets = [p for at in range(0, len(STREAM), size) for p in decoder.feed(STREAM[at : at + size])]
        assert packets == PACKETS, size


def test_a_long_packet() -> None:
    body = b"\0\3a/b\0" + b"x" * 300_000
    length = bytes((len(body) & 0x7F | 0x80, len(body) >> 7 & 0x7F | 0x80, len(body) >> 14))
    assert Decoder().feed(b"\x30" + length + body) == [Publish("a/b", b"x" * 300_000)]


@pytest.mark.parametrize(
    "data",
    [
        b"\x30\xff\xff\xff\xff\x01",
        b"\x30\x00",
        b"\x30\x01\x00",
        b"\x30\x03\x00\x05a",
        b"\x30\x03\x00\x01a",
        b"\x30\x04\x00\x01a\x09",
        b"\x32\x06\x00\x01a\x00\x01\x00",
        b"\x20\x00",
        b"\x90\x01\x00",
        b"\x10\x00",
    ],
)
def test_what_is_no_mqtt_5(data: bytes) -> None:
    with pytest.raises(MqttError):
        Decoder().feed(data)


def test_what_is_sent() -> None:
    connect = mqtt5.connect_packet(client_id="c", username="u", password="p", keepalive=10)  # noqa: S106
    assert connect == b"\x10\x19\0\4MQTT\5\xc0\0\x0a\5\x11\xff\xff\xff\xff\0\1c\0\1u\0\1p"
    assert mqtt5.connect_packet(client_id="c", username=None, password=None, keepalive=10)[9] == 0
    assert mqtt5.publish_packet("a", b"x" * 200) == b"\x30\xcc\x01\0\1a\0" + b"x" * 200
    assert mqtt5.subscribe_packet(7, [("a/#", 1)]) == b"\x82\x09\0\7\0\0\3a/#\x21"
    assert mqtt5.disconnect_packet() == b"\xe0\0"
    assert mqtt5.reason_text(0x87) == "not authorized"
    assert mqtt5.reason_text(0x99) == "reason code 0x99"
