"""What the bridge costs publishers: amqtt with the bridge, RocketMQ reachable, against amqtt alone.

Nobody subscribes, so both sides only take and acknowledge the messages; the bridge also keeps them in its lane, maps
them and sends them to RocketMQ, in the same process. With a subscriber both sides route them to it as well.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from tests.bench.experiment import Bench, Experiment, Measurement
from tests.bench.rocketmq_client import target
from tests.bench.servers import AloneServer, BridgeServer, Load, LoadResult, Server, cpu_seconds

WINDOW = 100
"""Publishes of a publisher that wait for their PUBACK; QoS 0 is written as fast as the server reads."""
_FOR_SUBSCRIBER = 25_000
_TOPIC = "sensors/room1/temperature"


@dataclass(frozen=True)
class UplinkResult:
    """What publishing cost."""

    rate: float
    cpu_us: float
    """Of the server for each message, until its lanes are empty."""
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


async def _publish_to_subscriber(bench: Bench, server: Server) -> UplinkResult:
    count = bench.scaled(_FOR_SUBSCRIBER)

    async def load() -> LoadResult:
        subscriber = await Load.start("subscribe", server, topic=_TOPIC, messages=count)
        publisher = await Load.start("publish", server, topic=_TOPIC, qos=1, window=WINDOW, messages=count, seconds=600)
        result = await subscriber.result()
        await publisher.result()
        return result

    return await _measured(bench, server, load)


async def _measured(bench: Bench, server: Server, load: Callable[[], Awaitable[LoadResult]]) -> UplinkResult:
    """Put `load` on `server`. What the lane still holds is asked of RocketMQ: a scrape would cost the bridge."""
    before = cpu_seconds(server.pid)
    if not isinstance(server, BridgeServer) or server.rocketmq_away:
        result = await load()
        return UplinkResult(result.rate, (cpu_seconds(server.pid) - before) / result.messages * 1e6)
    async with target(bench, server.topic) as rocketmq:
        stored = await rocketmq.shown()
        result = await load()
        waiting = stored + result.messages - await rocketmq.shown()
        await rocketmq.wait_shown(stored + result.messages)
    return UplinkResult(result.rate, (cpu_seconds(server.pid) - before) / result.messages * 1e6, max(0, waiting))


def _experiment(publish_to: Callable[[Bench, Server], Awaitable[UplinkResult]], metric: str) -> Experiment:
    async def run(bench: Bench) -> list[Measurement]:
        alone = await bench.kept("alone", lambda: AloneServer.start(bench))
        bridge = await bench.kept("outbound", lambda: BridgeServer.outbound(bench))
        baseline, measured = await bench.interleaved(
            lambda: publish_to(bench, alone), lambda: publish_to(bench, bridge)
        )
        return [
            Measurement(metric, measured.rate, "msg/s", baseline.rate),
            Measurement("CPU of the server", measured.cpu_us, "us/msg", baseline.cpu_us),
            Measurement("not yet in RocketMQ", measured.waiting, "msg"),
        ]

    return Experiment(run)


EXPERIMENTS = {
    "uplink-amqtt-qos1-1pub": _experiment(publish, "published"),
    "uplink-amqtt-qos1-20pub": _experiment(partial(publish, publishers=20), "published"),
    "uplink-amqtt-qos0-1pub": _experiment(partial(publish, qos=0), "published"),
    "uplink-amqtt-qos1-1pub-1sub": _experiment(_publish_to_subscriber, "delivered"),
}
