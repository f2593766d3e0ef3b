"""How many messages are kept for whom, and which of them are under way. Pure."""

import contextlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Final

__all__ = ["Ledger"]

_NOTHING: Final = 0


class Ledger:
    """The store's rows as they are meant to be: its transactions and reads lag behind.

    A message waits, or flies (a host has it and has not said what became of it). One that is being written does
    neither, although a read may bring its row before the one who wrote it knows. One that has left counts no more, but
    is known until no read can bring its row: a read shows what was committed when it began.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """Messages of each client, waiting and flying; a client without any is not in it."""
        self.total = 0
        self._flying: dict[int, str] = {}
        self._flying_of: Counter[str] = Counter()
        self._writing: dict[int, str] = {}
        self._writing_of: Counter[str] = Counter()
        self._left: set[int] = set()
        self._reads: dict[int, None] = {}
        self._ticket = 0
        # Ids whose rows are deleted, with the last read begun before that; bounded by what reads that long.
        self._deleted: deque[tuple[int, int]] = deque()  # bounded, see above

    def write(self, message_id: int, client_id: str) -> None:
        """A message is being written, or waits for that."""
        self._writing[message_id] = client_id
        self._writing_of[client_id] += 1

    def written(self, message_id: int) -> None:
        """It is, or never will be; in the first case `add` follows."""
        _take(self._writing_of, self._writing.pop(message_id))

    def add(self, client_id: str, count: int = 1) -> None:
        """So many more messages are kept for the client."""
        self.counts[client_id] += count
        self.total += count

    def waiting(self, client_id: str) -> int:
        """Return how many messages of the client wait."""
        return self.counts.get(client_id, _NOTHING) - self._flying_of.get(client_id, _NOTHING)

    @property
    def waiting_overall(self) -> int:
        """How many messages of all clients wait."""
        return self.total - len(self._flying)

    def knows(self, client_id: str) -> bool:
        """Whether any message of the client is kept, or being written."""
        return client_id in self.counts or client_id in self._writing_of

    def has_under_way(self, client_id: str) -> bool:
        """Whether any message of the client flies, or is being written: a read may bring none that wait, or not yet."""
        return client_id in self._flying_of or client_id in self._writing_of

    def waits(self, message_id: int) -> bool:
        """Whether a row that was read is of a message that waits."""
        return not any(message_id in others for others in (self._flying, self._left, self._writing))

    def fly(self, message_id: int, client_id: str) -> None:
        """A message that waited is given to the host."""
        self._flying[message_id] = client_id
        self._flying_of[client_id] += 1

    def land(self, message_id: int) -> None:
        """A message that flew waits again."""
        client_id = self._flying.pop(message_id)
        _take(self._flying_of, client_id)

    def leave(self, message_id: int, client_id: str) -> None:
        """A message, waiting or flying, is done with; its row is being deleted."""
        if message_id in self._flying:
            self.land(message_id)
        self._left.add(message_id)
        _take(self.counts, client_id)
        self.total -= 1

    def deleted(self, message_ids: Iterable[int]) -> None:
        """Rows of messages that have left are deleted."""
        self._deleted.extend((self._ticket, message_id) for message_id in message_ids)
        self._forget()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Rows are read in this context; what they bring is compared with the ledger before its end."""
        ticket = self.begin_read()
        try:
            yield
        finally:
            self.end_read(ticket)

    def begin_read(self) -> int:
        """A read of rows begins; return its ticket for `end_read`."""
        self._ticket += 1
        self._reads[self._ticket] = None
        return self._ticket

    def end_read(self, ticket: int) -> None:
        """What that read brought has been compared with the ledger, or dropped."""
        del self._reads[ticket]
        self._forget()

    def _forget(self) -> None:
        oldest = next(iter(self._reads), self._ticket + 1)
        while self._deleted and self._deleted[0][0] < oldest:
            self._left.discard(self._deleted.popleft()[1])


def _take(counter: Counter[str], client_id: str) -> None:
    if counter[client_id] > 1:
        counter[client_id] -= 1
    else:
        del counter[client_id]
