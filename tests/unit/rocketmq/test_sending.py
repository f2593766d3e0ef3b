import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt.message import RocketMessage
from mq2mqtt.rocketmq.acl import Credentials, signature
from mq2mqtt.rocketmq.remoting import Command, FrameDecoder
from mq2mqtt.rocketmq.sending import SendEncoder

TEXT = st.text(st.characters(exclude_characters="\x01\x02", exclude_categories=["Cs"]), min_size=1)
SECRET = "s3cret"  # noqa: S105 - made up


def encode(
    messages: list[RocketMessage],
    *,
    credentials: Credentials | None = None,
    topic: str = "t",
    broker: str = "b",
    group: str = "g",
) -> Command:
    encoded = SendEncoder(credentials).encode(topic, broker, 3, messages, group=group)
    [command] = FrameDecoder().feed(encoded.encode(42))
    return command


def test_header_of_a_single_message() -> None:
    command = encode([RocketMessage("t", b"body", {"TAGS": "a", "UNIQ_KEY": "U"})])
    born = command.fields.pop("g")
    assert command.code == 310
    assert (command.opaque, command.flag, command.body) == (42, 0, b"body")
    assert int(born) > 1_700_000_000_000
    assert command.fields == {
        "a": "g",
        "b": "t",
        "c": "t",  # never TBW102, from which brokers create topics
        "d": "4",
        "e": "3",
        "f": "0",
        "h": "0",
        "i": "TAGS\x01a\x02UNIQ_KEY\x01U\x02",
        "j": "0",
        "k": "false",
        "m": "false",
        "n": "b",
    }


def test_header_of_a_batch() -> None:
    command = encode([RocketMessage("t", b"1", {}), RocketMessage("t", b"2", {})])
    assert command.code == 320
    assert (command.fields["m"], command.fields["i"]) == ("true", "")


@given(TEXT, TEXT, TEXT, TEXT, TEXT)
def test_hand_made_json_is_json_whatever_the_names_hold(
    topic: str, broker: str, group: str, name: str, value: str
) -> None:
    message = RocketMessage(topic, b"x", {name: value, "UNIQ_KEY": "U"} if name != "UNIQ_KEY" else {})
    command = encode([message], topic=topic, broker=broker, group=group)
    assert (command.fields["a"], command.fields["b"], command.fields["n"]) == (group, topic, broker)
    if name != "UNIQ_KEY":
        assert command.fields["i"] == f"{name}\x01{value}\x02UNIQ_KEY\x01U\x02"


@pytest.mark.parametrize("count", [1, 2])
def test_signed_requests_differ_only_by_the_signature(count: int) -> None:
    messages = [RocketMessage("t", b"body", {"UNIQ_KEY": "U"})] * count
    plain, signed = encode(messages), encode(messages, credentials=Credentials("ak", SECRET))
    fields = dict(signed.fields)
    assert fields.pop("Signature") == signature(SECRET, signed.fields, signed.body)
    assert fields.pop("AccessKey") == "ak"
    assert {**fields, "g": ""} == {**plain.fields, "g": ""}
    assert (signed.code, signed.body) == (plain.code, plain.body)
    assert SECRET not in json.dumps(signed.fields)


def test_nothing_to_send_is_a_wrong_argument() -> None:
    with pytest.raises(ValueError, match="no message"):
        encode([])


def test_more_queues_than_templates_are_kept() -> None:
    encoder = SendEncoder(None)
    for number in range(5000):
        encoder.encode("t", "b", number, [RocketMessage("t", b"x", {})], group="g")
    [command] = FrameDecoder().feed(encoder.encode("t", "b", 7, [RocketMessage("t", b"x", {})], group="g").encode(1))
    assert command.fields["e"] == "7"
