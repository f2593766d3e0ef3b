"""From RocketMQ to subscribers, against amqtt's own way from a publisher to the same subscribers.

The bridge stands still (SIGSTOP) while its RocketMQ topic is filled, and is then measured at the subscribers, from the
first message to the last: what the producer costs is not in it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mq2mqtt.message import RocketMessage
from tests.bench.experiment import Bench, Experiment, Measurement
from tests.bench.rocketmq_client import batches_of, target
from tests.bench.servers import AloneServer, BridgeServer, Load, cpu_seconds

TOPIC = "devices/room1/state"
BODY = b"x" * 64


@dataclass(frozen=True)
class DownlinkResult:
    """What receiving took."""

    rate: float
    cpu_us: float
    """Of the server for each delivery."""


def for_room(topic: str, qos: int) -> RocketMessage:
    """Make a message for `TOPIC`."""
    return RocketMessage(topic, BODY, {"TAGS": "MQ2MQTT", "mqttSecondTopic": "/room1/state", "qoslevel": str(qos)})


async def receive(
    bench: Bench, server: BridgeServer, load: Load, *, count: int, make: Callable[[str, int], RocketMessage]
) -> DownlinkResult:
    """Put `count` messages into RocketMQ while `server` stands still, then let it deliver them to `load`."""
    async with target(bench, server.topic) as rocketmq, server.paused():
        end = await rocketmq.shown() + count
        await rocketmq.fill(batches_of(server.topic, count, make))
        await rocketmq.wait_shown(end)
        before = cpu_seconds(server.pid)
    result = await load.result()
    return DownlinkResult(result.rate, (cpu_seconds(server.pid) - before) / result.messages * 1e6)


async def _by_amqtt(bench: Bench, *, subscribers: int, qos: int, count: int) -> DownlinkResult:
    server = await bench.kept("alone", lambda: AloneServer.start(bench))
    load = await Load.start(
        "subscribe", server, clients=subscribers, topic=TOPIC, qos=qos, messages=count * subscribers
    )
    before = cpu_seconds(server.pid)
    publisher = await Load.start("publish", server, topic=TOPIC, qos=qos, messages=count, seconds=600)
    result = await load.result()
    used = cpu_seconds(server.pid) - before
    await publisher.result()
    return DownlinkResult(result.rate, used / result.messages * 1e6)


async def _by_bridge(bench: Bench, *, subscribers: int, qos: int, count: int) -> DownlinkResult:
    server = await bench.kept("inbound", lambda: BridgeServer.inbound(bench))
    load = await Load.start(
        "subscribe", server, clients=subscribers, topic=TOPIC, qos=qos, messages=count * subscribers
    )
    return await receive(bench, server, load, count=count, make=lambda topic, _: for_room(topic, qos))


async def _compare(bench: Bench, *, subscribers: int, qos: int, count: int, amqtt_count: int) -> list[Measurement]:
    baseline, measured = await bench.interleaved(
        lambda: _by_amqtt(bench, subscribers=subscribers, qos=qos, count=bench.scaled(amqtt_count)),
        lambda: _by_bridge(bench, subscribers=subscribers, qos=qos, count=bench.scaled(count)),
    )
    return [
        Measurement(f"delivered, QoS {qos}", measured.rate, "msg/s", baseline.rate),
        Measurement(f"CPU of the server, QoS {qos}", measured.cpu_us, "us/msg", baseline.cpu_us),
    ]


async def one_subscriber(bench: Bench) -> list[Measurement]:
    """One subscriber; baseline: amqtt alone, one publisher of the same QoS to the same subscriber."""
    return [
        *await _compare(bench, subscribers=1, qos=0, count=150_000, amqtt_count=30_000),
        *await _compare(bench, subscribers=1, qos=1, count=80_000, amqtt_count=15_000),
    ]


async def thousand_subscribers(bench: Bench) -> list[Measurement]:
    """A thousand subscribers of one topic; baseline as above. Every delivery counts."""
    return await _compare(bench, subscribers=bench.scaled(1000), qos=0, count=600, amqtt_count=60)


EXPERIMENTS = {
    "downlink-amqtt-1sub": Experiment(one_subscriber),
    "downlink-amqtt-1000sub": Experiment(thousand_subscribers),
}
