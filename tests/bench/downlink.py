"""From RocketMQ to subscribers, against the broker's own way from a publisher to the same subscribers.

The bridge stands still (SIGSTOP) while its RocketMQ topic is filled, and is then measured at the subscribers, from the
first message to the last: what the producer costs is not in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mq2mqtt.message import RocketMessage
from tests.bench.experiment import Bench, Experiment, Measurement
from tests.bench.hosts import AMQTT, MOSQUITTO, Host
from tests.bench.rocketmq_client import batches_of, target
from tests.bench.servers import BridgeServer, Load, Server, cpu_measurements, cpu_of, cpu_since

TOPIC = "devices/room1/state"
BODY = b"x" * 64
SUBSCRIBER = "GID_subscribe@@@{:05d}"
"""Client id of a load program that subscribes."""


@dataclass(frozen=True)
class DownlinkResult:
    """What receiving took."""

    rate: float
    cpu_us: dict[str, float]
    """Of each process of the server for each delivery."""


def for_room(topic: str, qos: int) -> RocketMessage:
    """Make a message for `TOPIC`."""
    return RocketMessage(topic, BODY, {"TAGS": "MQ2MQTT", "mqttSecondTopic": "/room1/state", "qoslevel": str(qos)})


def for_client(topic: str, number: int) -> RocketMessage:
    """Make a message for the client of this number of a load program that subscribes."""
    second = f"/p2p/{SUBSCRIBER.format(number)}"
    return RocketMessage(topic, BODY, {"TAGS": "MQ2MQTT", "mqttSecondTopic": second, "qoslevel": "0"})


async def receive(
    bench: Bench, server: BridgeServer, load: Load, *, count: int, make: Callable[[str, int], RocketMessage]
) -> DownlinkResult:
    """Put `count` messages into RocketMQ while `server` stands still, then let it deliver them to `load`."""
    async with target(bench, server.topic) as rocketmq, server.paused():
        end = await rocketmq.shown() + count
        await rocketmq.fill(batches_of(server.topic, count, make))
        await rocketmq.wait_shown(end)
        before = cpu_of(server)
    result = await load.result()
    return DownlinkResult(result.rate, cpu_since(before, server, messages=result.messages))


@dataclass(frozen=True)
class _Case:
    """Who receives, and how many messages: the broker alone fewer where it is slower."""

    qos: int
    bridge: int
    alone: int
    subscribers: int = 1
    p2p: bool = False
    """Each message is for one of them, by client id; on the broker alone, by a topic of its own."""


async def _subscribe(bench: Bench, server: Server, case: _Case, *, count: int) -> Load:
    clients = bench.scaled(case.subscribers)
    if case.p2p:
        return await Load.start("subscribe", server, clients=clients, filters=clients, topic=TOPIC, messages=count)
    return await Load.start("subscribe", server, clients=clients, topic=TOPIC, qos=case.qos, messages=count * clients)


async def _by_broker(bench: Bench, host: Host, case: _Case) -> DownlinkResult:
    server = await host.keep_alone(bench)
    count = bench.scaled(case.alone)
    load = await _subscribe(bench, server, case, count=count)
    before = cpu_of(server)
    topics = bench.scaled(case.subscribers) if case.p2p else 0
    publisher = await Load.start(
        "publish", server, topic=TOPIC, filters=topics, qos=case.qos, messages=count, seconds=600
    )
    result = await load.result()
    used = cpu_since(before, server, messages=result.messages)
    await publisher.result()
    return DownlinkResult(result.rate, used)


async def _by_bridge(bench: Bench, host: Host, case: _Case) -> DownlinkResult:
    server = await host.keep_inbound(bench)
    count = bench.scaled(case.bridge)
    load = await _subscribe(bench, server, case, count=count)
    clients = bench.scaled(case.subscribers)

    def make(topic: str, number: int) -> RocketMessage:
        return for_client(topic, number % clients) if case.p2p else for_room(topic, case.qos)

    return await receive(bench, server, load, count=count, make=make)


def _experiment(host: Host, *cases: _Case) -> Experiment:
    async def run(bench: Bench) -> list[Measurement]:
        rows = []
        for case in cases:
            baseline, measured = await bench.interleaved(
                partial(_by_broker, bench, host, case), partial(_by_bridge, bench, host, case)
            )
            rows.append(Measurement(f"delivered, QoS {case.qos}", measured.rate, "msg/s", baseline.rate))
            rows += cpu_measurements(measured.cpu_us, baseline.cpu_us, of=f", QoS {case.qos}")
        return rows

    return Experiment(run)


EXPERIMENTS = {
    "downlink-amqtt-1sub": _experiment(
        AMQTT, _Case(qos=0, bridge=150_000, alone=30_000), _Case(qos=1, bridge=80_000, alone=15_000)
    ),
    "downlink-amqtt-1000sub": _experiment(AMQTT, _Case(qos=0, bridge=600, alone=60, subscribers=1000)),
    "downlink-mosquitto-1sub": _experiment(
        MOSQUITTO, _Case(qos=0, bridge=150_000, alone=150_000), _Case(qos=1, bridge=80_000, alone=80_000)
    ),
    "downlink-mosquitto-1000sub": _experiment(
        MOSQUITTO,
        _Case(qos=0, bridge=300, alone=300, subscribers=1000),
        _Case(qos=1, bridge=100, alone=100, subscribers=1000),
    ),
    "downlink-mosquitto-1000p2p": _experiment(
        MOSQUITTO, _Case(qos=0, bridge=150_000, alone=150_000, subscribers=1000, p2p=True)
    ),
}
