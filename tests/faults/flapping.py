"""Devices that come and go all the time, in every way there is, and what a status topic must have said of it."""

import asyncio
import contextlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mq2mqtt.message import ReceivedMessage
from tests.mqtt_client import Client

_SHORTEST_SECONDS, _LONGEST_SECONDS = 0.01, 2.0
_RETRY_SECONDS = 0.1


class FlappingDevice:
    """Connects, stays for a moment and goes: with DISCONNECT, without, by a reset, or because it took itself over."""

    def __init__(self, port: int, client_id: str, moments: random.Random) -> None:
        self._port = port
        self.client_id = client_id
        self._moments = moments
        self._client: Client | None = None
        self.connects = 0
        """How many CONNACKs it has got."""

    @property
    def is_connected(self) -> bool:
        return self._client is not None and not self._client.closed.is_set()

    @property
    def address(self) -> str:
        """Its end of the connection, as the broker sees it."""
        assert self._client is not None
        return self._client.address

    async def flap(self, ending: asyncio.Event) -> None:
        """Come and go until `ending` is set."""
        while not ending.is_set():
            if not self.is_connected and not await self._connect():
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            with contextlib.suppress(TimeoutError):
                stay = self._moments.uniform(_SHORTEST_SECONDS, _LONGEST_SECONDS)
                await asyncio.wait_for(ending.wait(), stay)
            way = self._moments.choice(("disconnect", "drop", "abort", "take over"))
            if way == "take over":
                await self._take_over()
            else:
                await self._leave(way)

    async def come_to_rest(self, *, online: bool) -> None:
        """End connected, or not."""
        while online and not self.is_connected:
            await self._connect()
        if not online:
            await self._leave("drop")

    async def is_served(self) -> bool:
        """Whether its connection is there and the broker answers on it."""
        assert self._client is not None
        with contextlib.suppress(AssertionError):
            await self._client.ping()
        return self.is_connected

    async def end(self) -> None:
        await self._leave("drop")

    async def _connect(self) -> bool:
        with contextlib.suppress(OSError, AssertionError):
            clean = self._moments.random() < 0.5
            client = await Client.connect(self._port, self.client_id, clean=clean)
            self._client, before = client, self._client
            self.connects += 1
            if before is not None and before.closed.is_set():
                await before.drop()
            return True
        return False

    async def _leave(self, way: str) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        if way == "abort":
            client.abort()
        else:
            with contextlib.suppress(OSError):
                await (client.disconnect() if way == "disconnect" else client.drop())

    async def _take_over(self) -> None:
        before = self._client
        assert before is not None
        if await self._connect():
            with contextlib.suppress(AssertionError):
                await before.wait_closed()
        await before.drop()


@dataclass(frozen=True)
class StatusEvent:
    """An event of a status topic."""

    key: str
    body: dict[str, Any]

    @property
    def type(self) -> str:
        return str(self.body["eventType"])

    @property
    def connection(self) -> tuple[str, str]:
        return self.body["clientId"], self.body["channelId"]

    @property
    def seq(self) -> int:
        return int(self.body["seq"])


def status_events(messages: Iterable[ReceivedMessage]) -> list[StatusEvent]:
    """Return what `messages` of a status topic say; those that came again under the same key, once."""
    by_key: dict[str, StatusEvent] = {}
    for message in messages:
        event = StatusEvent(message.properties["KEYS"], json.loads(message.body))
        assert message.properties["TAGS"] == event.type
        assert by_key.setdefault(event.key, event) == event, f"two events with one key: {event}, {by_key[event.key]}"
    return list(by_key.values())


def assert_told_once(events: Sequence[StatusEvent], *, online: set[str]) -> None:
    """Each connection has one `connect`, and one `tcpclean` when it has ended, before the client's next `connect`.

    `online` are the clients that are connected now.
    """
    of_connection: defaultdict[tuple[str, str], list[StatusEvent]] = defaultdict(list)
    of_client: defaultdict[str, list[StatusEvent]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.seq):
        of_connection[event.connection].append(event)
        of_client[event.connection[0]].append(event)
    for connection, told in of_connection.items():
        types = [event.type for event in told]
        wanted = ["connect", "disconnect", "tcpclean"] if "disconnect" in types else ["connect", "tcpclean"]
        still = of_client[connection[0]][-1].connection == connection and connection[0] in online
        assert types == (wanted[:1] if still else wanted), (connection, told)
    for client, told in of_client.items():
        assert len({event.seq for event in told}) == len(told), (client, told)
        order = [event.connection for event in told]
        assert order == sorted(order, key=order.index), f"connections of {client} overlap: {told}"
