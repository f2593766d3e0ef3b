"""Traffic over a bridge that ends again and again, in both directions, and what must have come through."""

import asyncio
import contextlib
import itertools
import threading
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.conftest import SharedRocketMQ
from tests.faults.report import FaultRow, FaultTable, assert_invariants
from tests.mqtt_client import Client, Message
from tests.new_bridge import new_bridge
from tests.rocket_peer import RocketPeer
from tests.stream import Stream
from tests.waiting import until

_UPLINK_RATE = 50
_DOWNLINK_RATE = 100

DESTINATIONS = (
    # MQTT topic, QoS, client id
    ("devices/one", 1, "one"),
    ("devices/two", 2, "two"),
    ("devices/p2p/one", 1, "one"),
)
"""Where the downlink stream goes, in turn."""


@dataclass
class _Span:
    """A part of what one connection got: in one life of the bridge."""

    life: int
    client: Client
    begin: int
    end: int | None = None
    kept: bool = False
    """Whether the connection is one of the life before."""

    @property
    def messages(self) -> list[Message]:
        return self.client.messages[self.begin : self.end]


class _Device:
    """A client that comes back as soon as there is a broker again. `spans` are in the order of time."""

    def __init__(self, port: int, client_id: str, *, qos: int) -> None:
        self._port = port
        self._client_id = client_id
        self._qos = qos
        self.spans: list[_Span] = []
        self.subscribed = asyncio.Event()
        self.bridge_life = 0
        self._task = asyncio.create_task(self._run(), name=f"device {client_id}")

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(OSError, AssertionError):
                client = await Client.connect(self._port, self._client_id)
                self.spans.append(_Span(self.bridge_life, client, 0))
                await client.subscribe((f"devices/{self._client_id}", self._qos))
                self.subscribed.set()
                await client.closed.wait()
            self.subscribed.clear()
            await asyncio.sleep(0.02)

    def numbers(self, life: int, topic: str) -> list[int]:
        """What came to `topic` in one life of the bridge, in the order of arrival."""
        return [int(m.payload) for span in self._of(life) for m in span.messages if m.topic == topic]

    def was_there(self, life: int) -> bool:
        """Whether it was connected when that life began."""
        return any(span.kept for span in self._of(life))

    def _of(self, life: int) -> list[_Span]:
        return [span for span in self.spans if span.life == life]

    async def next_life(self) -> None:
        """What the broker sends from now on is of the bridge's next life."""
        self.bridge_life += 1
        if not self.spans:
            return
        client = self.spans[-1].client
        with contextlib.suppress(AssertionError):  # it is closed
            await client.ping()
        if not client.closed.is_set():
            self.spans[-1].end = len(client.messages)
            self.spans.append(_Span(self.bridge_life, client, len(client.messages), kept=True))

    async def end(self) -> None:
        self._task.cancel()
        for span in self.spans:
            await span.client.drop()


class _Sender(threading.Thread):
    """Sends 0, 1, 2 ... to a RocketMQ topic of one queue, so that a number is its offset; `DESTINATIONS` in turn."""

    def __init__(self, peer: RocketPeer, topic: str) -> None:
        super().__init__(name="downlink sender", daemon=True)
        self._peer = peer
        self._topic = topic
        self._stopping = threading.Event()
        self.sent = 0

    def run(self) -> None:
        while not self._stopping.wait(1 / _DOWNLINK_RATE):
            topic, qos, _ = DESTINATIONS[self.sent % len(DESTINATIONS)]
            self._peer.send(
                self._topic, b"%d" % self.sent, mqttSecondTopic=topic.removeprefix("devices"), qoslevel=str(qos)
            )
            self.sent += 1

    def stop(self) -> None:
        self._stopping.set()
        if self.is_alive():
            self.join()


class Lives:
    """One bridge with uplink and downlink streams, from `start` to `finish`; `end_life` lies between two starts."""

    def __init__(self, rocketmq: SharedRocketMQ, peer: RocketPeer, directory: Path, *, durability: str) -> None:
        name = uuid.uuid4().hex[:12]
        self._out, self._in = f"out_{name}", f"in_{name}"
        self._rocketmq = rocketmq
        self._peer = peer
        rules: list[dict[str, Any]] = [
            {"id": "stream-out", "type": "outbound", "source": "stream", "target": self._out},
            {"id": "devices-in", "type": "inbound", "source": self._in, "target": "devices"},
        ]
        self.bridge = new_bridge(directory, namesrv=rocketmq.namesrv, rules=rules)
        self.bridge.config["node"] = durability
        self.bridge.config["spool"]["durability"] = durability
        self._group = f"GID_mq2mqtt_devices-in_{durability}"
        self._committed = [0]
        """How far the group had committed when each life began."""
        self._away: dict[int, float] = {}
        """By process: what its metrics say of messages that came before their device."""

    async def start(self) -> None:
        await asyncio.to_thread(self._peer.create_topic, self._out)
        await asyncio.to_thread(self._peer.create_topic, self._in, queues=1)
        port = self.bridge.mqtt_port
        self.streams = [
            Stream(port, "stream/x", rate=_UPLINK_RATE, qos=qos, client_id=f"GID_stream@@@{qos}-{number}")
            for qos in (1, 2)
            for number in range(2)
        ]
        self._devices = {client_id: _Device(port, client_id, qos=qos) for _, qos, client_id in DESTINATIONS[:2]}
        self._sender = _Sender(self._peer, self._in)
        await asyncio.to_thread(self.bridge.start)
        await self._all_back()
        for thread in (*self.streams, self._sender):
            thread.start()

    async def _all_back(self) -> None:
        for device in self._devices.values():
            await asyncio.wait_for(device.subscribed.wait(), 90)

    async def count_away(self) -> None:
        """Wait for the devices, and note how many messages came before them in this life."""
        await self._all_back()
        total, dropped = "mq2mqtt_messages_total", "mq2mqtt_dropped_total"
        get = self.bridge.metric
        process = self.bridge.process
        assert process is not None
        with contextlib.suppress(OSError):  # the bridge may end meanwhile
            away = await asyncio.to_thread(get, total, rule="devices-in", outcome="no_subscriber")
            self._away[process.pid] = away + await asyncio.to_thread(get, dropped, reason="not_persistent")

    async def next_life(self) -> None:
        """The bridge, or a part of it, has just ended."""
        self._committed.append(await asyncio.to_thread(self._read_committed))
        for device in self._devices.values():
            await device.next_life()

    def _read_committed(self) -> int:
        return self._peer.committed_offset(self._group, self._in, broker_address=self._rocketmq.broker_address)

    async def finish(self, table: FaultTable, *, fault: str) -> None:
        """Let everything arrive, add the rows, check the invariants. The bridge is running."""
        await until(lambda: self.bridge.get("/readyz")[0] == 200, seconds=90)
        await self._all_back()
        for stream in self.streams:
            await asyncio.to_thread(stream.stop)
        await asyncio.to_thread(self._sender.stop)
        metric = self.bridge.metric
        await until(lambda: metric("mq2mqtt_lane_messages") == 0, seconds=90)
        await until(lambda: self._read_committed() == self._sender.sent, seconds=90)
        await self._add_uplink(table, fault)
        self._add_downlink(table, fault)
        await asyncio.to_thread(assert_invariants, self.bridge)
        assert "Traceback" not in self.bridge.log_file.read_text()

    async def end(self) -> None:
        """Stop the traffic and the bridge, in whatever state they are."""
        for stream in self.streams:
            stream.give_up()
        await asyncio.to_thread(self._sender.stop)
        for device in self._devices.values():
            await device.end()
        self.bridge.kill()

    async def _add_uplink(self, table: FaultTable, fault: str) -> None:
        with self._peer.collect(self._out) as messages:
            wanted = {(s.client_id, body) for s in self.streams for body in s.acknowledged}
            await until(lambda: wanted <= {(m.properties["clientId"], m.body) for m in messages})
        for qos, streams in ((1, self.streams[:2]), (2, self.streams[2:])):
            rows = [
                FaultRow.of(
                    fault=fault,
                    traffic=f"uplink QoS {qos}, 2 clients, {2 * _UPLINK_RATE}/s",
                    acknowledged=stream.acknowledged,
                    arrivals=[m.body for m in messages if m.properties["clientId"] == stream.client_id],
                    longest_stall=stream.longest_stall,
                )
                for stream in streams
            ]
            table.add(FaultRow.total(rows))

    def _add_downlink(self, table: FaultTable, fault: str) -> None:
        rows, away = zip(*(self._downlink(index, fault) for index in range(len(DESTINATIONS))), strict=True)
        counted = int(sum(self._away.values()))
        # Nobody else knows what ended processes had counted since they were asked last.
        assert len(self._away) > 1 or sum(away) <= counted
        note = f"{sum(away)} came before their device was back ({counted} counted as no_subscriber or dropped)"
        table.add(replace(FaultRow.total(rows), reason=note if sum(away) else ""))

    def _downlink(self, index: int, fault: str) -> tuple[FaultRow, int]:
        """Return the row of one destination, and how many of its messages nobody was promised.

        In each life of the bridge that its device had to come back in, those are the ones from what was committed when
        it began up to the first that the device got. A broker that ends in good order may close the device's connection
        before the sidecar's: behind the last that the device got, what a sidecar that lives on has counted.
        """
        topic, _, client_id = DESTINATIONS[index]
        device = self._devices[client_id]
        lives = [device.numbers(life, topic) for life in range(len(self._committed))]
        arrived = [number for life in lives for number in life]
        sent = set(range(index, self._sender.sent, len(DESTINATIONS)))
        missed = sent.difference(arrived)
        unpromised: set[int] = set()
        sidecar_lived_on = len(self._away) == 1
        for life, numbers in enumerate(lives):
            end = self._committed[life + 1] if life + 1 < len(lives) else self._sender.sent
            if not device.was_there(life):
                unpromised |= missed.intersection(range(self._committed[life], numbers[0] if numbers else end))
            if sidecar_lived_on and numbers and life + 1 < len(lives):
                unpromised |= missed.intersection(range(numbers[-1], end))
        row = FaultRow(
            fault=fault,
            traffic=f"downlink QoS 1 and 2, topics and P2P, {_DOWNLINK_RATE}/s",
            acknowledged=len(sent) - len(unpromised),
            arrived=len(set(arrived)),
            missing=len(missed - unpromised),
            duplicated=len(arrived) - len(set(arrived)),
            # Across lives the unsettled come again, behind those that had overtaken them in settling.
            out_of_order=sum(a > b for life in lives for a, b in itertools.pairwise(life)),
            longest_stall=None,
            told_down=None,
            reason="",
        )
        return row, len(unpromised)
