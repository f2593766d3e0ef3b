"""How long a message is worth delivering. Pure; times are milliseconds since 1970."""

from dataclasses import replace
from typing import Final

from mq2mqtt.message import MqttMessage, MqttProperties

__all__ = ["MAX_SECONDS", "aged", "deadline", "is_over", "parse_seconds", "seconds_left"]

MAX_SECONDS: Final = 2**32 - 1
"""MQTT 5 section 3.3.2.3.3: a four-byte integer. ApsaraMQ takes 0 to 65535; more is carried all the same."""

_MAX_DIGITS: Final = len(str(MAX_SECONDS))


def parse_seconds(text: str) -> int | None:
    """Read a number of seconds from a property; `None` when it is none."""
    # `isdecimal` alone takes digits of other scripts, and `int` a sign, spaces and underscores.
    if not (text.isascii() and text.isdecimal()) or len(text) > _MAX_DIGITS:
        return None
    seconds = int(text)
    return seconds if seconds <= MAX_SECONDS else None


def deadline(born_ms: int, seconds: int | None) -> int | None:
    """Return when a message born then is over; `None` is never."""
    return None if seconds is None else born_ms + seconds * 1000


def is_over(expires_ms: int | None, now_ms: int) -> bool:
    """Whether a message with this deadline is worth nothing any more."""
    return expires_ms is not None and expires_ms <= now_ms


def seconds_left(expires_ms: int, now_ms: int) -> int:
    """Return the rest of a message's time in whole seconds, rounded up: while there is any, not 0."""
    return min(max(0, -((now_ms - expires_ms) // 1000)), MAX_SECONDS)


def aged(message: MqttMessage, expires_ms: int | None, now_ms: int) -> MqttMessage:
    """Return `message` as it is passed on now: MQTT 5 tells its receiver how many seconds of its time are left."""
    if expires_ms is None:
        return message
    properties = message.properties or MqttProperties()
    return replace(message, properties=replace(properties, expiry_seconds=seconds_left(expires_ms, now_ms)))
