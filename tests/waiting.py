"""Waiting in coroutines for what has no event."""

import asyncio
import time
from collections.abc import Callable


async def until(condition: Callable[[], object], *, seconds: float = 30.0, what: str = "the condition") -> None:
    """Wait until `condition()` is true; fail with `what`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)
