"""Message ids in the shape of the Java client's: 32 hexadecimal digits."""

import secrets
import time
from datetime import UTC, datetime

__all__ = ["UniqueIds"]

_DAYS_UNTIL_NEXT_MONTH = 32


class UniqueIds:
    """Gives ids that no other process or earlier run gives.

    20 random digits for this object, 8 for the milliseconds since the month began, 4 for a counter. Java puts an
    address and a process number where the random digits are, and reads only the time (to look an id up).
    """

    __slots__ = ("_last", "_month_end_ms", "_month_start_ms", "_prefix")

    def __init__(self) -> None:
        self._last = 0
        self._begin_month(time.time_ns() // 1_000_000)

    def take(self, count: int) -> list[str]:
        """Return `count` new ids in rising order."""
        now_ms = time.time_ns() // 1_000_000
        if not self._month_start_ms <= now_ms < self._month_end_ms:
            self._begin_month(now_ms)
        # Time and counter are one number that only grows: neither many ids within a millisecond nor a clock
        # that is set back can repeat an id.
        first = max(self._last + 1, (now_ms - self._month_start_ms) << 16)
        self._last = first + count - 1
        prefix = self._prefix
        return [f"{prefix}{number:012X}" for number in range(first, first + count)]

    def _begin_month(self, now_ms: int) -> None:
        now = datetime.fromtimestamp(now_ms / 1000, tz=UTC)
        start = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        following = datetime.fromtimestamp(start.timestamp() + _DAYS_UNTIL_NEXT_MONTH * 86400, tz=UTC)
        end = following.replace(day=1)
        self._month_start_ms = int(start.timestamp() * 1000)
        self._month_end_ms = int(end.timestamp() * 1000)
        self._prefix = secrets.token_hex(10).upper()
        self._last = 0
