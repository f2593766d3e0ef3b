"""How long messages live."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt import expiry
from mq2mqtt.message import MqttMessage, MqttProperties


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("60", 60),
        ("4294967295", 2**32 - 1),
        ("4294967296", None),
        ("-1", None),
        ("1.5", None),
        ("", None),
        ("\u0661", None),
        (" 1", None),
        ("1_0", None),
        ("9" * 5000, None),
    ],
)
def test_seconds_are_read_strictly(text: str, seconds: int | None) -> None:
    assert expiry.parse_seconds(text) == seconds


@given(st.integers(0, 2**45), st.integers(1, 2**32 - 1), st.integers(-(2**40), 2**45))
def test_a_message_has_seconds_left_exactly_as_long_as_it_is_not_over(born_ms: int, seconds: int, age_ms: int) -> None:
    expires_ms = expiry.deadline(born_ms, seconds)
    assert expires_ms is not None
    left = expiry.seconds_left(expires_ms, born_ms + age_ms)
    assert (left == 0) == expiry.is_over(expires_ms, born_ms + age_ms)
    if age_ms >= 0:
        assert left * 1000 <= max(0, seconds * 1000 - age_ms) + 999


def test_without_a_deadline_nothing_is_ever_over() -> None:
    assert expiry.deadline(0, None) is None
    assert not expiry.is_over(None, 2**60)
    message = MqttMessage("t", b"x")
    assert expiry.aged(message, None, 2**60) is message


def test_a_message_that_is_passed_on_tells_what_is_left_and_keeps_its_other_properties() -> None:
    message = MqttMessage("t", b"x", properties=MqttProperties("text", 60, (("a", "b"),)))
    assert expiry.aged(message, 60_000, 9_500).properties == MqttProperties("text", 51, (("a", "b"),))
    assert expiry.aged(MqttMessage("t", b"x"), 60_000, 9_500).properties == MqttProperties(None, 51)
