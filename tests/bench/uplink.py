"""What the bridge costs publishers: a broker with the bridge, RocketMQ reachable, against the broker alone.

Nobody subscribes, so both sides only take and acknowledge the messages; the bridge also keeps them in its lane, maps
them and sends them to RocketMQ: in the same process (amqtt), or in another one (Mosquitto), which is also measured
standing still, so that it takes nothing from the broker. With a subscriber both sides route them to it as well.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from tests.bench.experiment import Bench, Experiment, Measurement
from tests.bench.hosts import AMQTT, MOSQUITTO, Host
from tests.bench.rocketmq_client import target
from tests.bench.servers import (
    BridgeServer,
    Load,
    LoadResult,
    Server,
    cpu_measurements,
    cpu_of,
    cpu_since,
)

WINDOW = 100
"""Publishes of a publisher that wait for their PUBACK; QoS 0 is written as fast as the server reads."""
_FOR_SUBSCRIBER = 25_000
_TOPIC = "sensors/room1/temperature"


@dataclass(frozen=True)
class UplinkResult:
    """What publishing cost."""

    rate: float
    cpu_us: dict[str, float]
    """Of each process of the server for each message, until its lanes are empty."""
    waiting: float = 0.0
    """Messages that RocketMQ did not show when the last was acknowledged."""


async def publish(
    bench: Bench, server: Server, *, qos: int = 1, publishers: int = 1, topic: str = _TOPIC
) -> UplinkResult:
    """Publish to `server` for a while, and wait until a bridge's lane is empty where it can be."""

    async def load() -> LoadResult:
        program = await Load.start(
            "publish", server, clients=publishers, qos=qos, window=WINDOW, seconds=bench.seconds, topic=topic
        )
        return await program.result()

    return await _measured(bench, server, load)


async def _publish_beside(bench: Bench, server: BridgeServer, *, qos: int, publishers: int) -> UplinkResult:
    """Publish as `publish` does, to a broker whose bridge is another process and begins when all is published."""

    async def load() -> LoadResult:
        program = await Load.start(
            "publish", server, clients=publishers, qos=qos, window=WINDOW, seconds=bench.seconds, topic=_TOPIC
        )
        async with server.paused():
            return await program.result()

    return await _measured(bench, server, load)


async def _publish_to_subscriber(bench: Bench, server: Server, *, messages: int = _FOR_SUBSCRIBER) -> UplinkResult:
    count = bench.scaled(messages)

    async def load() -> LoadResult:
        subscriber = await Load.start("subscribe", server, topic=_TOPIC, messages=count)
        publisher = await Load.start("publish", server, topic=_TOPIC, qos=1, window=WINDOW, messages=count, seconds=600)
        result = await subscriber.result()
        await publisher.result()
        return result

    return await _measured(bench, server, load)


async def _measured(bench: Bench, server: Server, load: Callable[[], Awaitable[LoadResult]]) -> UplinkResult:
    """Put `load` on `server`. What the lane still holds is asked of RocketMQ: a scrape would cost the bridge."""
    before = cpu_of(server)
    if not isinstance(server, BridgeServer) or server.rocketmq_away:
        result = await load()
        return UplinkResult(result.rate, cpu_since(before, server, messages=result.messages))
    async with target(bench, server.topic) as rocketmq:
        stored = await rocketmq.shown()
        result = await load()
        waiting = stored + result.messages - await rocketmq.shown()
        await rocketmq.wait_shown(stored + result.messages)
    return UplinkResult(result.rate, cpu_since(before, server, messages=result.messages), max(0, waiting))


def _experiment(
    publish_to: Callable[[Bench, Server], Awaitable[UplinkResult]], metric: str, host: Host = AMQTT
) -> Experiment:
    async def run(bench: Bench) -> list[Measurement]:
        alone, bridge = await host.keep_alone(bench), await host.keep_outbound(bench)
        baseline, measured = await bench.interleaved(
            lambda: publish_to(bench, alone), lambda: publish_to(bench, bridge)
        )
        return [
            Measurement(metric, measured.rate, "msg/s", baseline.rate),
            *cpu_measurements(measured.cpu_us, baseline.cpu_us),
            Measurement("not yet in RocketMQ", measured.waiting, "msg"),
        ]

    return Experiment(run)


def _beside(*, qos: int = 1, publishers: int = 1) -> Experiment:
    """Make the experiment for a bridge that is a process beside the broker."""

    async def run(bench: Bench) -> list[Measurement]:
        alone, bridge = await MOSQUITTO.keep_alone(bench), await MOSQUITTO.keep_outbound(bench)
        to = partial(publish, bench, qos=qos, publishers=publishers)

        async def both() -> tuple[UplinkResult, UplinkResult]:
            return await _publish_beside(bench, bridge, qos=qos, publishers=publishers), await to(bridge)

        baseline, (hook, all_of_it) = await bench.interleaved(lambda: to(alone), both)
        return [
            Measurement("published, sidecar stands still", hook.rate, "msg/s", baseline.rate),
            *cpu_measurements(hook.cpu_us, baseline.cpu_us, of=", sidecar stands still"),
            Measurement("published", all_of_it.rate, "msg/s", baseline.rate),
            *cpu_measurements(all_of_it.cpu_us, baseline.cpu_us),
            Measurement("not yet in RocketMQ", all_of_it.waiting, "msg"),
        ]

    return Experiment(run)


EXPERIMENTS = {
    "uplink-amqtt-qos1-1pub": _experiment(publish, "published"),
    "uplink-amqtt-qos1-20pub": _experiment(partial(publish, publishers=20), "published"),
    "uplink-amqtt-qos0-1pub": _experiment(partial(publish, qos=0), "published"),
    "uplink-amqtt-qos1-1pub-1sub": _experiment(_publish_to_subscriber, "delivered"),
    "uplink-mosquitto-qos1-1pub": _beside(),
    "uplink-mosquitto-qos1-20pub": _beside(publishers=20),
    "uplink-mosquitto-qos0-1pub": _beside(qos=0),
    "uplink-mosquitto-qos1-1pub-1sub": _experiment(
        partial(_publish_to_subscriber, messages=8 * _FOR_SUBSCRIBER), "delivered", MOSQUITTO
    ),
}
