"""Which client gets its next batch when. Pure: whoever asks brings the time, in seconds of one clock."""

import heapq
from typing import Final

__all__ = ["BATCH_MESSAGES", "BATCH_SECONDS", "Pacer", "Turns"]

BATCH_MESSAGES: Final = 30
"""Of one client at once (spec 7)."""

BATCH_SECONDS: Final = 5.0
"""From the beginning of one batch to that of the next."""


_PATIENCE: Final = 3


class Pacer:
    """Clients that want a batch, each not before its last one is `BATCH_SECONDS` old.

    The time since the last batch is forgotten when a client goes: on its return the first batch comes at once.
    """

    def __init__(self) -> None:
        self._not_before: dict[str, float] = {}
        self._due_at: dict[str, float] = {}
        # Entries that `_due_at` does not confirm are void.
        self._heap: list[tuple[float, str]] = []

    def want(self, client_id: str, now: float, *, delay: float = 0.0) -> None:
        """Let the client have a batch as soon as it may, after `delay` seconds at the earliest."""
        at = max(now + delay, self._not_before.get(client_id, now))
        known = self._due_at.get(client_id)
        if known is None or at < known:
            self._due_at[client_id] = at
            heapq.heappush(self._heap, (at, client_id))

    def take_due(self, now: float) -> str | None:
        """Return the client whose turn it is, if there is one: its batch begins now."""
        self._drop_void()
        if not self._heap or self._heap[0][0] > now:
            return None
        _, client_id = heapq.heappop(self._heap)
        del self._due_at[client_id]
        self._not_before[client_id] = now + BATCH_SECONDS
        return client_id

    def retry(self, client_id: str, now: float, *, delay: float) -> None:
        """Let the client have again, after `delay` seconds, the batch that came to nothing."""
        self._not_before.pop(client_id, None)
        self.want(client_id, now, delay=delay)

    def forget(self, client_id: str) -> None:
        """The client has gone."""
        self._not_before.pop(client_id, None)
        self._due_at.pop(client_id, None)

    @property
    def next_at(self) -> float | None:
        """When the next client is due; `None` while none wants a batch."""
        self._drop_void()
        return self._heap[0][0] if self._heap else None

    def _drop_void(self) -> None:
        while self._heap and self._due_at.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)


class Turns:
    """After which message each client's next batch begins.

    Messages that a client never acknowledges, as one that is too long for it, would keep away those behind them: after
    `_PATIENCE` batches of which it acknowledged nothing, the next ones come, and these again when all had their turn.
    """

    def __init__(self) -> None:
        self._after: dict[str, int] = {}
        self._in_vain: dict[str, int] = {}

    def after(self, client_id: str) -> int:
        """Return the id of the message that the next batch begins behind; -1 for the oldest one."""
        return self._after.get(client_id, -1)

    def ended(self, client_id: str, *, last_id: int, acknowledged: bool) -> None:
        """A batch with this last message has ended; some of it was acknowledged, or nothing."""
        in_vain = 0 if acknowledged else self._in_vain.pop(client_id, 0) + 1
        if in_vain >= _PATIENCE:
            self._after[client_id] = last_id
        elif in_vain:
            self._in_vain[client_id] = in_vain
        else:
            self._in_vain.pop(client_id, None)

    def left(self, client_id: str, *, last_id: int) -> None:
        """The client has gone, and it is not known whether it has got the batch with this last message.

        One that is never there for long would get the same batch each time, and none of those behind it.
        """
        self.begin_anew(client_id)
        self._after[client_id] = last_id

    def begin_anew(self, client_id: str) -> None:
        """All had their turn, or the client has gone."""
        self._after.pop(client_id, None)
        self._in_vain.pop(client_id, None)
