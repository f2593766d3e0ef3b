import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt.rocketmq.errors import MessageIllegal
from mq2mqtt.rocketmq.properties import decode_properties, encode_properties
from tests.unit.rocketmq.golden import golden_bytes

TEXT = st.text(st.characters(exclude_characters="\x01\x02", exclude_categories=["Cs"]))
PROPERTIES = st.dictionaries(TEXT.filter(bool), TEXT, max_size=8)


def test_writes_and_reads_what_java_writes() -> None:
    text = golden_bytes("properties").decode()
    properties = {
        "clientId": "é",
        "KEYS": "k1",
        "UNIQ_KEY": "0102030405060708090A0B0C0D0E0F10",
        "WAIT": "true",
        "TAGS": "A",
    }
    assert decode_properties(text) == properties
    assert encode_properties(properties) == text


@given(PROPERTIES)
def test_round_trip_but_for_empty_values(properties: dict[str, str]) -> None:
    kept = {key: value for key, value in properties.items() if value}
    assert decode_properties(encode_properties(properties)) == kept


@given(PROPERTIES, TEXT, TEXT, st.sampled_from(["{}{}{}\n", "\n{}{}{}"]), st.sampled_from("\x01\x02"))
def test_a_separator_within_is_refused(
    properties: dict[str, str], before: str, after: str, place: str, separator: str
) -> None:
    key, _, value = place.format(before, separator, after).rpartition("\n")
    with pytest.raises(MessageIllegal):
        encode_properties({**properties, key or "k": value or "v"})


@pytest.mark.parametrize("properties", [{"": "v"}, {"a": "1", "": "v"}, {"a": "", "": "v"}])
def test_an_empty_name_is_refused(properties: dict[str, str]) -> None:
    with pytest.raises(MessageIllegal):
        encode_properties(properties)


@pytest.mark.parametrize(
    ("text", "properties"),
    [
        ("", {}),
        ("a\x011", {"a": "1"}),
        ("a\x011\x02", {"a": "1"}),
        ("a\x01b\x01c\x02", {"a": "b\x01c"}),
        ("a\x011\x02\x02b\x012\x02", {"a": "1", "b": "2"}),
        ("alone\x02b\x012", {"b": "2"}),
        ("\x01v\x02b\x012", {"b": "2"}),
        ("a\x01\x02b\x012", {"b": "2"}),
        ("b\x012\x02a\x01", {"b": "2"}),
        ("\x02", {}),
    ],
)
def test_reads_odd_texts_as_java_does(text: str, properties: dict[str, str]) -> None:
    assert decode_properties(text) == properties
