"""How long one message takes when nothing waits: 500 a second, QoS 1, 64 bytes.

Devices, the RocketMQ producer and the RocketMQ consumer are in this process, so that one clock measures all of it: each
message carries the time when it was sent.
"""

import asyncio
import math
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Self, cast

from mq2mqtt.link import ConsumeFrom, Queue
from mq2mqtt.link.native import NativeLink
from mq2mqtt.message import RocketMessage
from tests import mqtt_client as mqtt
from tests.bench.experiment import Bench, Experiment, Measurement
from tests.bench.hosts import AMQTT, MOSQUITTO, Host
from tests.bench.servers import Server

if TYPE_CHECKING:
    from mq2mqtt.rocketmq import ReceivedMessage

RATE = 500
MESSAGES = 2000
_TOPIC = "sensors/room1/temperature"
_BODY_BYTES = 64
_SECONDS = 60.0

Latencies = dict[int, float]
"""Time of sending (nanoseconds since 1970) -> milliseconds until it had arrived."""


def stamped() -> tuple[int, bytes]:
    """Return the time and a body that carries it."""
    now = time.time_ns()
    return now, b"%0*d" % (_BODY_BYTES, now)


def percentile(values: list[float], share: float) -> float:
    """Return the smallest of `values` that `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


def measurements(name: str, latencies: Latencies, baseline: Latencies | None = None) -> list[Measurement]:
    """Return p50 and p99."""
    return [
        Measurement(
            f"{name}, p{share}",
            percentile(list(latencies.values()), share / 100),
            "ms",
            None if baseline is None else percentile(list(baseline.values()), share / 100),
        )
        for share in (50, 99)
    ]


async def at_rate(send: Callable[[], Awaitable[None]], *, count: int, rate: float) -> None:
    """Call `send` `count` times, `rate` times a second."""
    start = time.perf_counter()
    for number in range(count):
        await asyncio.sleep(start + number / rate - time.perf_counter())
        await send()


async def wait_for(latencies: Latencies, count: int) -> None:
    """Wait until `count` messages have arrived."""
    async with asyncio.timeout(_SECONDS):
        while len(latencies) < count:
            await asyncio.sleep(0.01)


class Device(asyncio.Protocol):
    """An MQTT client that notes when PUBACKs and messages come."""

    def __init__(self) -> None:
        self.acknowledged: Latencies = {}
        self.received: Latencies = {}
        self.answers: asyncio.Queue[bytes] = asyncio.Queue(4)
        self._sent: dict[int, int] = {}  # packet id -> time of sending; bounded by the experiment's messages
        self._last_id = 0
        self._begin = 0
        self._data = b""

    @classmethod
    async def connect(cls, server: Server, client_id: str, topic_filter: str | None = None) -> Self:
        """Connect, and subscribe at QoS 1."""
        loop = asyncio.get_running_loop()
        _, device = await loop.create_connection(cls, "127.0.0.1", server.port)
        device.transport.write(mqtt.connect_packet(client_id))
        await device.answers.get()
        if topic_filter is not None:
            wanted = b"\x00\x01" + mqtt.text(topic_filter) + b"\x01"
            device.transport.write(mqtt.packet(mqtt.SUBSCRIBE << 4 | 2, wanted))
            await device.answers.get()
        return device

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def begin(self) -> None:
        """Forget what has come; ignore what was sent before now."""
        self._begin = time.time_ns()
        self.received = {}

    async def publish(self) -> None:
        """Publish the time."""
        now, body = stamped()
        self._last_id = self._last_id % 65_535 + 1
        self._sent[self._last_id] = now
        self.transport.write(mqtt.publish_packet(_TOPIC, body, qos=1, packet_id=self._last_id))

    def data_received(self, data: bytes) -> None:
        """Take whole packets; all are short."""
        now = time.time_ns()
        self._data += data
        while len(self._data) >= 2 and len(self._data) >= (size := 2 + self._data[1]):
            packet, self._data = self._data[:size], self._data[size:]
            self._take(packet, now)

    def _take(self, packet: bytes, now: int) -> None:
        kind = packet[0] >> 4
        if kind == mqtt.PUBACK:
            sent = self._sent.pop(int.from_bytes(packet[2:4], "big"))
            self.acknowledged[sent] = (now - sent) / 1e6
        elif kind == mqtt.PUBLISH:
            sent = int(packet[-_BODY_BYTES:])
            if sent >= self._begin:
                self.received[sent] = (now - sent) / 1e6
            id_at = len(packet) - _BODY_BYTES - 2
            self.transport.write(bytes((mqtt.PUBACK << 4, 2)) + packet[id_at : id_at + 2])
        else:
            self.answers.put_nowait(packet)


class Application:
    """A RocketMQ application: consumes one topic and produces to others."""

    def __init__(self, link: NativeLink, tasks: asyncio.TaskGroup) -> None:
        self._link = link
        self._tasks = tasks
        self._queues: dict[str, tuple[Queue, ...]] = {}
        self._turn = 0
        self._begin = 0
        self.received: Latencies = {}
        """Until the consumer had it."""
        self.stored: Latencies = {}
        """Until the broker had stored it by its own clock, rounded up to the next millisecond."""
        self.echo_to: str | None = None

    @classmethod
    @asynccontextmanager
    async def on(cls, bench: Bench, topic: str) -> AsyncIterator[Self]:
        """Start one that consumes what comes to `topic` from now on; it is ready when a message has come through."""
        namesrv, client_id = await bench.namesrv(), f"bench@{uuid.uuid4().hex}"
        link = NativeLink(namesrv=namesrv, client_id=client_id, request_timeout=_SECONDS)
        await link.start()
        try:
            # What goes wrong in a task ends the experiment.
            async with asyncio.TaskGroup() as tasks:
                application = cls(link, tasks)
                consuming = tasks.create_task(application._consume(topic), name="bench.consume")
                async with asyncio.timeout(_SECONDS):
                    while not application.received:
                        await application.send(topic)
                        await asyncio.sleep(0.1)
                application.begin()
                yield application
                consuming.cancel()
        finally:
            await link.close()

    async def _consume(self, topic: str) -> None:
        group = f"GID_bench_{uuid.uuid4().hex[:12]}"
        subscription = await self._link.subscribe(topic, group, tags="*", start=ConsumeFrom.LATEST)
        async for batch in subscription:
            now = time.time_ns()
            for message in batch:
                subscription.settle(message)
                sent = int(message.body)
                if sent < self._begin:
                    continue
                self.received[sent] = (now - sent) / 1e6
                self.stored[sent] = cast("ReceivedMessage", message).stored_ms + 1 - sent / 1e6
                if self.echo_to is not None:
                    # Not one by one: a store that is slow for a moment would hold up all that come after it.
                    self._tasks.create_task(self._send(self.echo_to, message.body), name="bench.echo")

    async def send(self, topic: str) -> None:
        """Send the time and wait until it is stored."""
        await self._send(topic, stamped()[1])

    async def send_soon(self, topic: str) -> None:
        """Send the time and wait for nothing."""
        self._tasks.create_task(self.send(topic), name="bench.send")

    async def _send(self, topic: str, body: bytes) -> None:
        if topic not in self._queues:
            self._queues[topic] = await self._link.queues(topic)
        self._turn += 1
        message = RocketMessage(topic, body, {"TAGS": "MQ2MQTT", "mqttSecondTopic": "/room1/state"})
        await self._link.send(self._queues[topic][self._turn % len(self._queues[topic])], [message])

    def begin(self) -> None:
        """Forget what has come; ignore what was sent before now."""
        self._begin = time.time_ns()
        self.received = {}
        self.stored = {}


async def _publish(server: Server, count: int) -> Latencies:
    """Publish to `server`; return how long the PUBACKs took."""
    device = await Device.connect(server, "GID_bench@@@device")
    await at_rate(device.publish, count=count, rate=RATE)
    await wait_for(device.acknowledged, count)
    device.transport.close()
    return device.acknowledged


async def uplink(bench: Bench, *, host: Host) -> list[Measurement]:
    """Device to PUBACK, to RocketMQ's store, to a RocketMQ consumer.

    Baselines: PUBACK of the broker alone; a RocketMQ producer in place of the device.
    """
    count = bench.scaled(MESSAGES)
    alone = await host.keep_alone(bench)
    bridge = await bench.kept(f"{host.name} outbound, one by one", lambda: host.bridge.outbound(bench))
    async with Application.on(bench, bridge.topic) as application:

        async def by_others() -> tuple[Latencies, Latencies, Latencies]:
            acknowledged = await _publish(alone, count)
            application.begin()
            await at_rate(lambda: application.send_soon(bridge.topic), count=count, rate=RATE)
            await wait_for(application.received, count)
            return acknowledged, application.stored, application.received

        async def by_bridge() -> tuple[Latencies, Latencies, Latencies]:
            application.begin()
            acknowledged = await _publish(bridge, count)
            await wait_for(application.received, count)
            return acknowledged, application.stored, application.received

        baseline, measured = await bench.interleaved(by_others, by_bridge)
    names = ("device to PUBACK", "device to RocketMQ's store", "device to a RocketMQ consumer")
    return [
        row
        for name, latencies, base in zip(names, measured, baseline, strict=True)
        for row in measurements(name, latencies, base)
    ]


async def downlink(bench: Bench, *, host: Host) -> list[Measurement]:
    """RocketMQ producer to device; baseline: to a RocketMQ consumer, the same messages."""
    count = bench.scaled(MESSAGES)
    bridge = await bench.kept(f"{host.name} inbound, one by one", lambda: host.bridge.inbound(bench))
    device = await Device.connect(bridge, "GID_bench@@@device", "devices/#")
    async with Application.on(bench, bridge.topic) as application:
        await wait_for(device.received, 1)
        application.begin()
        device.begin()
        await at_rate(lambda: application.send_soon(bridge.topic), count=count, rate=RATE)
        await wait_for(application.received, count)
        await wait_for(device.received, count)
    device.transport.close()
    return measurements("RocketMQ producer to device", device.received, application.received)


async def round_trip(bench: Bench, *, host: Host) -> list[Measurement]:
    """Device, bridge, RocketMQ, an application that sends back what it gets, RocketMQ, bridge, device."""
    count = bench.scaled(MESSAGES)
    bridge = await bench.kept(f"{host.name} both ways", lambda: host.bridge.both_ways(bench))
    up, down = bridge.topic.split()
    device = await Device.connect(bridge, "GID_bench@@@device", "devices/#")
    async with Application.on(bench, up) as application:
        application.echo_to = down
        await device.publish()
        await wait_for(device.received, 1)
        device.begin()
        await at_rate(device.publish, count=count, rate=RATE)
        await wait_for(device.received, count)
    device.transport.close()
    return measurements("device to RocketMQ application to device", device.received)


EXPERIMENTS = {
    "latency-uplink": Experiment(partial(uplink, host=AMQTT)),
    "latency-downlink": Experiment(partial(downlink, host=AMQTT)),
    "latency-round-trip": Experiment(partial(round_trip, host=AMQTT)),
    "latency-mosquitto-uplink": Experiment(partial(uplink, host=MOSQUITTO)),
    "latency-mosquitto-downlink": Experiment(partial(downlink, host=MOSQUITTO)),
    "latency-mosquitto-round-trip": Experiment(partial(round_trip, host=MOSQUITTO)),
}
