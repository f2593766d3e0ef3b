"""Messages for clients that are away are stored and replayed while broker and bridge are killed: none is missing."""

import asyncio
import contextlib
import random
import resource
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mq2mqtt.message import RocketMessage
from tests.conftest import SharedRocketMQ
from tests.faults.mailbox import Mailbox, open_mailboxes
from tests.faults.random_moments import random_moments
from tests.faults.report import FaultRow, FaultTable, assert_invariants
from tests.mosquitto_bridge import MosquittoBridge
from tests.new_bridge import new_bridge
from tests.rocket_peer import RocketPeer
from tests.stream import Stream
from tests.thorough import FACTOR
from tests.waiting import until
from tests.watched_loop import pauses

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900 * FACTOR)]

_RULE = "devices-in"
_CLIENTS = 1000
_EACH = min(100, 10 * FACTOR)
"""`MQ2MQTT_THOROUGH=10` makes it 100 000 messages."""
_TOTAL = _CLIENTS * _EACH
_ROUNDS = min(3, FACTOR)
_BATCH = 500
_STREAM_RATE = 2
_STREAM_CLIENT = "GID_away@@@stream"
_PAUSE_SECONDS = 0.5
"""50 ms are promised, on a machine that does nothing else; waits for the disk and the interpreter's lock are in it."""


class World:
    """A bridge with an inbound rule, its clients, and a device that writes to one of them."""

    def __init__(self, rocketmq: SharedRocketMQ, peer: RocketPeer, directory: Path, moments: random.Random) -> None:
        self._peer = peer
        self._broker_address = rocketmq.broker_address
        self._moments = moments
        self.topic = f"in_{uuid.uuid4().hex[:12]}"
        # Order is promised within a queue.
        peer.create_topic(self.topic, queues=1)
        rule: dict[str, Any] = {"id": _RULE, "type": "inbound", "source": self.topic, "target": "devices"}
        self.bridge = new_bridge(directory, namesrv=rocketmq.namesrv, rules=[{**rule, "from": "earliest"}])
        self.bridge.config["node"] = uuid.uuid4().hex[:12]
        self._ends: list[Callable[[], None]] = [self.bridge.kill] * 2
        if isinstance(self.bridge, MosquittoBridge):
            self.bridge.broker.log_types = ("error", "warning", "notice")
            self._ends = [self.bridge.kill_sidecar, self.bridge.broker.kill, self.bridge.kill]
        self.notes = self.bridge.watch_loop()
        self.clients = [f"GID_away@@@{number}" for number in range(_CLIENTS)]
        topic = f"devices/p2p/{_STREAM_CLIENT}"
        self.stream = Stream(self.bridge.mqtt_port, topic, rate=_STREAM_RATE, client_id="GID_sender@@@1")
        self.mailboxes: list[Mailbox] = []
        self.kills = 0
        self._lives: list[tuple[float, float]] = []
        self._began = 0.0

    def fill(self) -> None:
        """Have RocketMQ hold `_EACH` messages for each client."""
        for number in range(_EACH):
            for first in range(0, _CLIENTS, _BATCH):
                clients = self.clients[first : first + _BATCH]
                self._peer.send_all(self.topic, [self._message(client, number) for client in clients])

    def _message(self, client: str, number: int) -> RocketMessage:
        kept = {"qoslevel": "1", "cleansessionflag": "false"}
        properties = {"TAGS": "MQ2MQTT", "mqttSecondTopic": f"/p2p/{client}", **kept}
        return RocketMessage(self.topic, b"%d" % number, properties)

    async def kill_at_random(self) -> None:
        """Kill each part in turn, each time when a random part of the messages has gone on in its life."""
        ends = self._ends * _ROUNDS
        for end in ends:
            await self._go_on(self._moments.uniform(0, _TOTAL / len(ends)))
            await asyncio.to_thread(end)
            self._lives.append((self._began, time.time()))
            self._began = 0.0
            self.kills += 1
            # Waiting until it is ready would be waiting until it has done everything.
            self.bridge.launch()
        await asyncio.to_thread(self.bridge.wait_started, ready=False)
        self._began = time.time()

    async def _go_on(self, count: float) -> None:
        """Wait until so many more are stored or replayed, or nothing is left."""
        deadline, before = time.monotonic() + 90, self.arrived
        while True:
            with contextlib.suppress(OSError):  # it is not ready yet
                waiting = self.waiting
                self._began = self._began or time.time()
                if self.mailboxes:
                    enough = self.arrived >= before + count or self.arrived >= _TOTAL
                else:
                    enough = self._stored >= count or waiting >= _TOTAL
                if enough:
                    return
            assert time.monotonic() < deadline, self.bridge.log()
            await asyncio.sleep(0.01)

    @property
    def waiting(self) -> float:
        """How many messages are kept."""
        return self.bridge.metric("mq2mqtt_offline_messages")

    @property
    def arrived(self) -> int:
        return sum(mailbox.count for mailbox in self.mailboxes)

    async def all_stored(self) -> float:
        """Wait until nothing is left in RocketMQ; return how many messages a second were stored in this life."""
        first, began = self._stored, time.monotonic()
        last, ended = first, began
        metric = self.bridge.metric
        while self.waiting < _TOTAL or metric("mq2mqtt_in_flight") or metric("mq2mqtt_consumer_lag"):
            assert time.monotonic() < began + 120, self.bridge.get("/metrics")[1]
            await asyncio.sleep(0.05)
            if self._stored > last:
                last, ended = self._stored, time.monotonic()
        return (last - first) / max(ended - began, 0.05)

    async def all_committed(self) -> None:
        """Wait until RocketMQ gives none of them again: to a device that is there they would go before what is kept."""
        group = f"GID_mq2mqtt_{_RULE}_{self.bridge.config['node']}"
        committed = partial(self._peer.committed_offset, group, self.topic, broker_address=self._broker_address)
        while await asyncio.to_thread(committed) < _TOTAL:
            await asyncio.sleep(0.05)

    @property
    def _stored(self) -> float:
        return self.bridge.metric("mq2mqtt_offline_total", outcome="stored")

    def open_mailboxes(self) -> None:
        self.mailboxes = open_mailboxes(self.bridge.mqtt_port, [*self.clients, _STREAM_CLIENT])

    async def all_arrived(self) -> None:
        wanted = {b"%d" % number for number in range(_EACH)}
        for mailbox in self.mailboxes[:-1]:
            await until(lambda: wanted <= set(mailbox.arrivals), seconds=120, what=mailbox.client_id)  # noqa: B023
        await until(lambda: self.stream.acknowledged <= set(self.mailboxes[-1].arrivals), seconds=120)
        await until(lambda: self.waiting == 0, seconds=60)

    @property
    def longest_pause(self) -> float:
        """Seconds that the bridge held up its own event loop at most, once it had started."""
        self._lives.append((self._began, time.time()))
        inside = [
            p for p in pauses(self.notes) if any(begin < p.at - p.late and p.at < end for begin, end in self._lives)
        ]
        return max((pause.own for pause in inside), default=0.0)

    def add_rows(self, table: FaultTable, *, fault: str, note: str) -> None:
        bodies = [b"%d" % number for number in range(_EACH)]
        rows = [
            FaultRow.of(
                fault=fault,
                traffic=f"P2P QoS 1 from RocketMQ for {_CLIENTS} clients that are away",
                acknowledged=bodies,
                arrivals=mailbox.arrivals,
                longest_stall=None,
                reason=note,
            )
            for mailbox in self.mailboxes[:-1]
        ]
        table.add(FaultRow.total(rows))
        stream = FaultRow.of(
            fault=fault,
            traffic=f"P2P QoS 1 from a device, {_STREAM_RATE}/s, for one that is away",
            acknowledged=self.stream.acknowledged,
            arrivals=self.mailboxes[-1].arrivals,
            longest_stall=self.stream.longest_stall,
        )
        table.add(stream)

    async def close_mailboxes(self) -> None:
        for mailbox in self.mailboxes:
            await mailbox.end()

    async def end(self) -> None:
        self.stream.give_up()
        await self.close_mailboxes()
        self.bridge.kill()


@pytest.fixture
def _many_files() -> Iterator[None]:
    """A thousand clients are a thousand sockets, here and in the broker, which inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
async def world(rocketmq: SharedRocketMQ, tmp_path: Path, _many_files: None) -> AsyncIterator[World]:
    with RocketPeer(rocketmq.namesrv) as peer:
        world = World(rocketmq, peer, tmp_path, random_moments("offline"))
        yield world
        await world.end()


async def test_killed_while_storing_and_while_replaying(world: World, fault_table: FaultTable) -> None:
    await asyncio.to_thread(world.fill)
    world.bridge.launch()
    # Before Mosquitto's hook is told of it, this topic is like any other.
    await until((world.bridge.directory / "spool" / ".p2p").is_dir)
    world.stream.start()
    await world.kill_at_random()
    await asyncio.to_thread(world.stream.stop)
    rate = await world.all_stored()
    await world.all_committed()
    storing = world.kills
    world.open_mailboxes()
    await world.kill_at_random()
    await world.all_arrived()
    await asyncio.to_thread(assert_invariants, world.bridge)
    pause = world.longest_pause
    await world.close_mailboxes()
    assert await asyncio.to_thread(world.bridge.stop) == 0
    world.add_rows(
        fault_table,
        fault=f"killed {storing} times while {_TOTAL} messages are stored, {world.kills - storing} while replayed",
        note=f"stored at {rate:.0f}/s; the event loop stood still for {1000 * pause:.0f} ms at most",
    )
    assert pause <= _PAUSE_SECONDS
    assert "Traceback" not in world.bridge.log_file.read_text()
