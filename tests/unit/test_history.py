import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mq2mqtt.admin.sessions import Sessions
from mq2mqtt.errors import StoreError
from mq2mqtt.history import keep_history
from mq2mqtt.host.memory import MemoryHost
from mq2mqtt.message import ClientEvent, ClientEventType
from mq2mqtt.presence import Presence
from mq2mqtt.store import Connect, ConnectStore
from mq2mqtt.store.sql import SqlStore
from tests.unit.bridge_world import World


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlStore]:
    store = await SqlStore.open(f"sqlite+aiosqlite:///{tmp_path}/mq2mqtt.db", node="n1")
    yield store
    await store.close()


def came(presence: Presence, channel: str, time_ms: int, *, clean_session: bool = True) -> None:
    presence.take(ClientEvent(ClientEventType.CONNECT, "dev", channel, "127.0.0.1", time_ms, clean_session))


def gone(presence: Presence, channel: str, time_ms: int, reason: str) -> None:
    presence.take(ClientEvent(ClientEventType.TCPCLEAN, "dev", channel, "127.0.0.1", time_ms, reason=reason))


def sessions(presence: Presence, connects: ConnectStore | None) -> Sessions:
    return Sessions(
        MemoryHost(), presence.connections, connects=lambda: connects, kept=lambda _: 3, started=lambda: True
    )


def entry(channel: str, began: int, ended: int | None, reason: str, *, clean_session: bool = True) -> dict[str, Any]:
    return {
        "channelId": channel,
        "clientIp": "127.0.0.1",
        "cleanSession": clean_session,
        "connectedAt": began,
        "endedAt": ended,
        "reason": reason,
    }


async def test_each_connection_is_noted_with_its_end_the_latest_first(store: SqlStore) -> None:
    presence = Presence()
    keep_history(presence, store.connects)
    came(presence, "c1", 10)
    gone(presence, "c1", 20, "no heart")
    came(presence, "c2", 30)
    came(presence, "c3", 40, clean_session=False)
    seen = sessions(presence, store.connects)
    expected = [
        entry("c3", 40, None, "", clean_session=False),
        entry("c2", 30, 40, "clientId conflict"),
        entry("c1", 10, 20, "no heart"),
    ]
    # What is committed in their order: all before this.
    await asyncio.sleep(0)
    await store.subscriptions.forget("dev")
    assert await seen.history("dev") == expected
    assert seen.of("dev")["offlineMessages"] == 3
    assert await seen.history("nobody") == []


async def test_who_was_connected_before_is_noted_too_and_what_nobody_saw_end_is_unknown(store: SqlStore) -> None:
    store.connects.began(Connect("dev", "c0", "127.0.0.1", clean_session=True, connected_ms=5))
    presence = Presence()
    came(presence, "c1", 10)
    keep_history(presence, store.connects)
    expected = [entry("c1", 10, None, ""), entry("c0", 5, None, "unknown")]
    await asyncio.sleep(0)
    await store.subscriptions.forget("dev")
    assert await sessions(presence, store.connects).history("dev") == expected


async def test_without_a_store_or_while_it_is_away_there_is_no_history_but_the_state() -> None:
    class Away:
        async def of(self, client_id: str, *, limit: int = 20) -> list[Connect]:
            raise StoreError(f"away: {client_id}, {limit}")

        def began(self, connect: Connect) -> None: ...

        def ended(self, client_id: str, channel_id: str, *, ended_ms: int, reason: str) -> None: ...

    presence = Presence()
    came(presence, "c1", 10)
    for connects in (None, Away()):
        seen = sessions(presence, connects)
        assert await seen.history("dev") is None
        assert seen.of("dev")["online"] is True


async def test_a_broker_that_ends_with_all_its_connections_keeps_the_loop_from_nobody() -> None:
    noted: list[str] = []

    class Notes:
        async def of(self, client_id: str, *, limit: int = 20) -> list[Connect]:
            raise AssertionError(client_id, limit)

        def began(self, connect: Connect) -> None: ...

        def ended(self, client_id: str, channel_id: str, *, ended_ms: int, reason: str) -> None:
            noted.append(f"{client_id} {channel_id} {ended_ms} {reason}")

    presence = Presence()
    for number in range(1000):
        presence.take(ClientEvent(ClientEventType.CONNECT, f"dev{number}", f"c{number}", "127.0.0.1", 10))
    keep_history(presence, Notes())
    presence.begin(time_ms=20, reason="broker stopped")
    before = 0
    for _ in range(100):
        assert len(noted) - before <= 300
        before = len(noted)
        await asyncio.sleep(0)
    assert noted == [f"dev{number} c{number} 20 broker stopped" for number in range(1000)]


async def test_a_stop_still_notes_whose_connection_it_has_ended(tmp_path: Path) -> None:
    async with World(tmp_path / "spool", stop_deadline=60) as world:
        clients = [f"c{number}" for number in range(5000)]
        for client_id in clients:
            world.host.connect(client_id)
        await world.bridge.stop_receiving()
        for client_id in clients:
            world.host.disconnect(client_id)
        await world.bridge.stop()
    store = await SqlStore.open(f"sqlite+aiosqlite:///{tmp_path}/spool.db", node="n1")
    for client_id in (clients[0], clients[-1]):
        (connect,) = await store.connects.of(client_id)
        assert connect.ended_ms is not None
    await store.close()
