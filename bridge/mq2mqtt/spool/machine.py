"""What a lane asks of the machine it runs on."""

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Machine"]


def _boot_id() -> bytes:
    try:
        return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()).bytes
    except (OSError, ValueError):
        return bytes(16)


@dataclass(frozen=True)
class Machine:
    """What a lane asks of the machine; tests replace parts of it."""

    now_us: Callable[[], int] = field(default=lambda: time.time_ns() // 1000)
    """The wall clock: microseconds since 1970."""
    boot_id: bytes = field(default_factory=_boot_id)
    """16 bytes that change when the machine starts; zeros if unknown, which counts as changed."""
    sync: Callable[[int], None] = os.fdatasync
    """Makes the content of an open file survive a loss of power."""
