"""Values that a database cannot hold: refused before they are in one transaction with others."""

from collections.abc import Iterable
from typing import Final

from mq2mqtt.errors import UnstorableError

__all__ = ["KEY_BYTES", "unstorable"]

KEY_BYTES: Final = 1024
"""Longest client id, and longest topic filter. PostgreSQL's indexes take 2700 bytes for all of a row's columns."""
_MOST: Final = 2**63


def unstorable(
    *, keys: Iterable[str], texts: Iterable[str | None] = (), numbers: Iterable[int | None] = ()
) -> UnstorableError | None:
    """Return why one of these values cannot be stored, `None` where all can. `keys` are in an index."""
    for key in keys:
        if len(key) > KEY_BYTES or len(key.encode(errors="replace")) > KEY_BYTES:
            return UnstorableError(f"store: {key[:40]!r}... is longer than {KEY_BYTES} bytes")
        if not _is_text(key):
            return _no_text(key)
    for text in texts:
        if text is not None and not _is_text(text):
            return _no_text(text)
    for number in numbers:
        if number is not None and not -_MOST <= number < _MOST:
            return UnstorableError(f"store: {number} is too large")
    return None


def _is_text(text: str) -> bool:
    """Whether it is valid in UTF-8 and without NUL, which PostgreSQL does not take."""
    if "\0" in text:
        return False
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_text(text: str) -> UnstorableError:
    return UnstorableError(f"store: {text[:40]!r} holds NUL, or is no text")
