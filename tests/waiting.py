"""Waiting in coroutines for what has no event."""

import asyncio
import os
import time
from collections.abc import Callable
from typing import Final, TypeVar

_Value = TypeVar("_Value")

PATIENCE: Final = 2 if os.environ.get("CI") == "true" else 1
"""By how much a promised time is multiplied: a machine of CI may be busy with others'. Elsewhere tests hold to it."""


async def until(condition: Callable[[], object], *, seconds: float = 60.0, what: str = "the condition") -> None:
    """Wait until `condition()` is true; fail with `what`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


async def settled(value: Callable[[], _Value], *, seconds: float = 1.0, within: float = 20.0) -> _Value:
    """Return `value()` once it has been the same for so many seconds."""
    seen = value()
    same_until = time.monotonic() + seconds
    deadline = time.monotonic() + within
    while time.monotonic() < same_until:
        assert time.monotonic() < deadline, f"still changing after {within:g} s"
        await asyncio.sleep(0.02)
        now = value()
        if now != seen:
            seen, same_until = now, time.monotonic() + seconds
    return seen
