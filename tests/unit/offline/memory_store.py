"""What `mq2mqtt.store.OfflineStore` promises, in memory: commits when the test lets it, or fails."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from mq2mqtt.errors import StoreError, UnstorableError
from mq2mqtt.store import MessageHead, MessageKind, StoredMessage

__all__ = ["MemoryStore"]

_Row = TypeVar("_Row", StoredMessage, MessageHead)


class MemoryStore:
    """Commits at once after the current turn of the loop; while `held`, when `commit` is called."""

    def __init__(self) -> None:
        self.rows: dict[int, StoredMessage] = {}
        self.problem: str | None = None
        self.held = False
        self.refuses = False
        self.room = 1000
        self.reads_wait: asyncio.Event | None = None
        self.unstorable = b"unstorable"
        self._waiting: list[tuple[Callable[[], None], asyncio.Future[None]]] = []

    @property
    def offline(self) -> "MemoryStore":
        return self

    def _do(self, change: Callable[[], None]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((change, future))
        if not self.held:
            asyncio.get_running_loop().call_soon(self.commit)
        return future

    def commit(self) -> None:
        waiting, self._waiting = self._waiting, []
        for change, future in waiting:
            change()
            future.set_result(None)

    def add(self, message: StoredMessage) -> asyncio.Future[None]:
        failure: StoreError | None = None
        if message.payload == self.unstorable:
            failure = UnstorableError("no")
        elif self.refuses or len(self._waiting) >= self.room:
            failure = StoreError("too much waits")
        if failure is not None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.set_exception(failure)
            return future
        return self._do(lambda: self.rows.update({message.id: message}))

    def remove(self, ids: Sequence[int]) -> asyncio.Future[None]:
        def change() -> None:
            for number in ids:
                self.rows.pop(number, None)

        return self._do(change)

    def _sorted(self) -> list[StoredMessage]:
        return [self.rows[number] for number in sorted(self.rows)]

    async def oldest(self, client_id: str, *, after: int = -1, limit: int) -> list[MessageHead]:
        return await self._heads(lambda row: row.client_id == client_id and row.id > after, limit)

    async def oldest_overall(self, *, after: int = -1, limit: int) -> list[MessageHead]:
        return await self._heads(lambda row: row.id > after, limit)

    async def missed(self, client_id: str, *, upto: int, after: int = -1, limit: int) -> list[MessageHead]:
        return await self._heads(
            lambda row: row.client_id == client_id and row.kind is MessageKind.SESSION and after < row.id <= upto, limit
        )

    async def expired(self, now_ms: int, limit: int) -> list[MessageHead]:
        return await self._heads(lambda row: row.expires_ms is not None and row.expires_ms <= now_ms, limit)

    async def read(self, ids: Sequence[int]) -> list[StoredMessage]:
        return await self._read([row for row in self._sorted() if row.id in ids])

    async def _heads(self, wanted: Callable[[StoredMessage], bool], limit: int) -> list[MessageHead]:
        assert limit <= 300, "a page that takes the loop"
        rows = [row for row in self._sorted() if wanted(row)][:limit]
        return await self._read(
            [MessageHead(row.id, row.client_id, row.rule, row.topic, row.receipt, len(row.payload)) for row in rows]
        )

    async def _read(self, rows: list[_Row]) -> list[_Row]:
        """Bring what was committed when the read began."""
        if self.problem is not None:
            raise StoreError(self.problem)
        if self.reads_wait is not None:
            await self.reads_wait.wait()
        await asyncio.sleep(0)
        return rows

    async def counts(self) -> dict[str, int]:
        return dict(Counter(row.client_id for row in self.rows.values()))

    async def last_id(self) -> int:
        return max(self.rows, default=-1)

    async def close(self) -> None:
        self.commit()
