"""Devices that come back whenever their connection ends, and keep what they got."""

import asyncio
import contextlib

from tests.mqtt_client import Client

_AT_ONCE = 20
"""So many connect at the same time: each takes amqtt a millisecond or two, and a loop that has many to do is late."""
_RETRY_SECONDS = 0.1


class Mailbox:
    """One of them. `gate` is shared: who passes it may connect."""

    def __init__(self, port: int, client_id: str, gate: asyncio.Semaphore) -> None:
        self._port = port
        self.client_id = client_id
        self._gate = gate
        self._clients: list[Client] = []
        self._task = asyncio.create_task(self._run(), name=f"mailbox {client_id}")

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(OSError, AssertionError):
                async with self._gate:
                    self._clients.append(await Client.connect(self._port, self.client_id))
                await self._clients[-1].closed.wait()
            await asyncio.sleep(_RETRY_SECONDS)

    @property
    def arrivals(self) -> list[bytes]:
        """Payloads, in the order in which they came."""
        return [message.payload for client in self._clients for message in client.messages]

    @property
    def count(self) -> int:
        """How many messages came."""
        return sum(len(client.messages) for client in self._clients)

    async def end(self) -> None:
        self._task.cancel()
        for client in self._clients:
            await client.drop()


def open_mailboxes(port: int, client_ids: list[str]) -> list[Mailbox]:
    """Have these clients connect."""
    gate = asyncio.Semaphore(_AT_ONCE)
    return [Mailbox(port, client_id, gate) for client_id in client_ids]
