import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt.message import RocketMessage
from mq2mqtt.rocketmq import codec
from mq2mqtt.rocketmq.codec import MAX_BODY, BodyEncoder, decode_messages, encoded_size
from mq2mqtt.rocketmq.errors import DecodeError, MessageIllegal
from mq2mqtt.rocketmq.message import EncodedMessages, ReceivedMessage
from mq2mqtt.rocketmq.properties import encode_properties
from mq2mqtt.rocketmq.unique import UniqueIds
from tests.unit.rocketmq.golden import golden_bytes

UNIQ = "0102030405060708090A0B0C0D0E0F10"
MAGIC_V2 = -626843477


def encoder() -> BodyEncoder:
    return BodyEncoder(UniqueIds().take)


def stored(  # noqa: PLR0913 - the fields of a stored message
    body: bytes = b"body",
    *,
    topic: bytes = b"T",
    properties: bytes = b"",
    magic: int = -626843481,
    sys_flag: int = 0,
    offset: int = 9,
) -> bytes:
    """Make a stored message by the layout, field by field."""
    length = struct.pack(">H" if magic == MAGIC_V2 else ">B", len(topic))
    rest = b"".join(
        [
            struct.pack(">iiiiqqiq", magic, 0, 2, 0, offset, 77, sys_flag, 1_700_000_000_000),
            bytes(8),
            struct.pack(">q", 1_700_000_000_001),
            b"\x7f\0\0\x01\0\0\x2a\x9f",
            struct.pack(">iq", 0, 0),
            struct.pack(">i", len(body)) + body,
            length + topic,
            struct.pack(">H", len(properties)) + properties,
        ]
    )
    return struct.pack(">i", 4 + len(rest)) + rest


@pytest.mark.parametrize(
    ("name", "store_host"),
    [
        ("stored_plain", "7f00000100002a9f"),
        ("stored_v6born", "7f00000100002a9f"),
        ("stored_v6store", "20010db800000000000000000000000200002a9f"),
        ("stored_v6both", "20010db800000000000000000000000200002a9f"),
    ],
)
def test_reads_what_java_writes(name: str, store_host: str) -> None:
    [message] = decode_messages(golden_bytes(name), broker="b")
    assert message._replace(sys_flag=0) == ReceivedMessage(
        topic="T_gold",
        body="body with \0 and é".encode(),
        properties={"clientId": "GID_a@@@é1", "KEYS": "k1 k2", "TAGS": "MQTT_COMMON"},
        broker="b",
        queue_id=3,
        offset=41,
        commit_log_offset=123456789012,
        born_ms=1700000000123,
        stored_ms=1700000000456,
        sys_flag=0,
        flag=7,
        reconsume_times=2,
        store_host=bytes.fromhex(store_host),
    )
    assert message.message_id == message.offset_id == store_host.upper() + "0000001CBE991A14"


@pytest.mark.parametrize("name", ["stored_zlib", "stored_lz4", "stored_zstd"])
def test_inflates_what_java_compresses(name: str) -> None:
    [message] = decode_messages(golden_bytes(name))
    assert message.body == b"z" * 5000
    assert not message.sys_flag & 1


def test_inflates_zlib_of_old_clients() -> None:
    [message] = decode_messages(stored(zlib.compress(b"old" * 99), sys_flag=1))
    assert message.body == b"old" * 99


def test_reads_topics_longer_than_a_byte_can_count() -> None:
    [message] = decode_messages(stored(topic=b"t" * 300, magic=MAGIC_V2))
    assert message.topic == "t" * 300


def test_the_producers_id_is_the_message_id() -> None:
    [message] = decode_messages(stored(properties=f"UNIQ_KEY\x01{UNIQ}\x02".encode()))
    assert message.message_id == UNIQ


BAD = {
    "unknown magic": stored(magic=5),
    "topic is no UTF-8": stored(topic=b"\xff"),
    "properties are no UTF-8": stored(properties=b"\xff\xfe"),
    "unknown compression": stored(b"x", sys_flag=0x501),
    "not zlib": stored(b"not zlib", sys_flag=1),
    "zlib cut short": stored(zlib.compress(b"z" * 500)[:-6], sys_flag=1),
    "not LZ4": stored(b"not lz4 at all", sys_flag=0x101),
    "LZ4 cut short": stored(bytes.fromhex("04224d186070731e"), sys_flag=0x101),
    "Zstd cut short": stored(bytes.fromhex("28b52ffd00584c0000107a7a010083d3"), sys_flag=0x201),
    "not Zstd": stored(b"not zstd at all", sys_flag=0x201),
    "inner batch": stored(sys_flag=0x80),
    "body longer than the message": stored()[:84] + struct.pack(">i", 999) + stored()[88:],
    "negative body length": stored()[:84] + struct.pack(">i", -1) + stored()[88:],
    "properties longer than the message": stored()[:-2] + b"\0\x05",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_message_is_named_and_the_next_one_read(bad: bytes) -> None:
    problems: list[DecodeError] = []
    messages = decode_messages(stored(b"before") + bad + stored(b"after"), on_error=problems.append)
    assert [message.body for message in messages] == [b"before", b"after"]
    [problem] = problems
    assert (problem.offset, problem.position, problem.raw) == (9, len(stored(b"before")), bad)
    assert "offset 9" in str(problem)
    with pytest.raises(DecodeError):
        decode_messages(bad)


@pytest.mark.parametrize("size", [-1, 0, 3, 88, 10_000])
def test_a_wrong_size_ends_the_reading(size: int) -> None:
    data = stored() + struct.pack(">i", size) + stored()[4:]
    with pytest.raises(DecodeError, match=f"given as {size}"):
        decode_messages(data, on_error=lambda _: None)


@given(st.binary(max_size=300), st.integers(0, 300))
def test_damage_makes_nothing_but_decode_errors(damage: bytes, at: int) -> None:
    data = bytearray(stored(b"x" * 100, properties=b"a\x01b\x02") + stored())
    data[at : at + len(damage)] = damage
    try:
        decode_messages(bytes(data), on_error=lambda _: None)
    except DecodeError as error:
        assert error.raw  # noqa: PT017 - whether it raises depends on the damage


@pytest.mark.parametrize("kind", ["zlib", "lz4", "zstd"])
def test_a_body_that_swells_too_much_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_INFLATED", 4999)
    with pytest.raises(DecodeError, match="inflates to more than 4999"):
        decode_messages(golden_bytes(f"stored_{kind}"))


@pytest.mark.parametrize("kind", ["zlib", "lz4", "zstd"])
@pytest.mark.parametrize(("limit", "decoded", "failed"), [(5000, 1, 0), (5001, 2, 0), (4999, 0, 1)])
def test_what_one_answer_swells_to_is_bounded(
    kind: str, limit: int, decoded: int, failed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "MAX_INFLATED", limit)
    problems: list[DecodeError] = []
    rest: list[int] = []
    data = golden_bytes(f"stored_{kind}") * 2 + stored(offset=43)
    messages = decode_messages(data, on_error=problems.append, on_rest=rest.append)
    assert (len(messages), len(problems)) == (decoded, failed)
    assert rest == [41 if decoded + failed == 1 else 43]
    # Who does not ask for it gets all.
    assert len(decode_messages(data, on_error=problems.append)) + len(problems) - failed == 3


def test_a_batch_is_javas_but_for_wait() -> None:
    properties = {"clientId": "é", "KEYS": "k1", "UNIQ_KEY": UNIQ, "WAIT": "true", "TAGS": "A"}
    message = RocketMessage("T_gold", b"one", properties)
    body, ids = encoder().batch([message, message])
    assert body == bytes.fromhex(golden_bytes("batch").hex())
    assert ids == (UNIQ, UNIQ)
    assert encoded_size(message) * 2 == len(body)


def test_properties_that_are_encoded_already_make_the_same_batch() -> None:
    properties = [{"TAGS": "A", "clientId": "é"}, {"KEYS": "k1"}]
    bodies = [b"one", b"two"]
    texts = [encode_properties(each) for each in properties]
    ids = ["1".zfill(32), "2".zfill(32)]
    plain = BodyEncoder(lambda _: list(ids)).batch(list(map(RocketMessage, "tt", bodies, properties)))
    assert BodyEncoder(lambda _: list(ids)).batch(EncodedMessages(bodies, texts)) == plain


@given(
    st.dictionaries(st.text("abcé€😀", min_size=1), st.text("abcé€😀"), max_size=5), st.binary(min_size=1, max_size=50)
)
def test_encoded_size_is_what_a_batch_takes(properties: dict[str, str], body: bytes) -> None:
    message = RocketMessage("t", body, properties)
    whole, ids = encoder().batch((message,))
    assert len(whole) == encoded_size(message)
    assert ids[0] in whole.decode("latin-1")


def test_each_message_gets_an_id_of_its_own_unless_it_has_one() -> None:
    own = RocketMessage("t", b"x", {"UNIQ_KEY": UNIQ})
    plain = RocketMessage("t", b"x", {})
    encode = encoder()
    _, ids = encode.batch([plain, own, plain])
    assert ids[1] == UNIQ
    assert len({*ids, *encode.batch([plain, plain])[1], encode.single(plain)[1]}) == 6
    assert encode.single(own) == (f"UNIQ_KEY\x01{UNIQ}\x02", UNIQ)
    assert plain.properties == {}


def properties_of(size: int, *, character: str = "v") -> dict[str, str]:
    """Make properties that take exactly `size` bytes with an id."""
    text = size - len(f"UNIQ_KEY\x01{UNIQ}\x02") - len("k\x01\x02")
    return {"k": character * (text // len(character.encode())), "UNIQ_KEY": UNIQ}


@pytest.mark.parametrize("character", ["v", "é"])
def test_properties_may_take_32000_bytes_and_not_one_more(character: str) -> None:
    fits = properties_of(32000, character=character)
    message = RocketMessage("t", b"x", fits)
    encoder().single(message)
    encoder().batch([message, message])
    over = RocketMessage("t", b"x", {**fits, "k": fits["k"] + character})
    with pytest.raises(MessageIllegal, match="properties take"):
        encoded_size(over)
    with pytest.raises(MessageIllegal, match="properties take"):
        encoder().single(over)
    with pytest.raises(MessageIllegal, match="properties take"):
        encoder().batch([over, over])


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(RocketMessage("t", b"", {}), id="empty body"),
        pytest.param(RocketMessage("t", bytes(MAX_BODY + 1), {}), id="large body"),
        pytest.param(RocketMessage("t", b"x", {"k": "a\x02b"}), id="separator"),
        pytest.param(RocketMessage("t", b"x", {"k": "\ud800"}), id="lone surrogate"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_sending(message: RocketMessage) -> None:
    good = RocketMessage("t", b"x", {})
    with pytest.raises(MessageIllegal) as single:
        encoder().single(message)
    with pytest.raises(MessageIllegal):
        encoder().batch([good, message])
    with pytest.raises(MessageIllegal):
        encoded_size(message)
    assert not single.value.retriable


def test_a_batch_over_the_limit_is_refused() -> None:
    half = RocketMessage("t", bytes(MAX_BODY // 2), {})
    with pytest.raises(MessageIllegal, match="batch"):
        encoder().batch([half, half])
