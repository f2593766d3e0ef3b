"""What the bridge costs publishers: amqtt with the bridge, RocketMQ reachable, against amqtt alone.

On amqtt alone nobody subscribes, so both sides only take and acknowledge the messages; the bridge also keeps them in
its lane, maps them and sends them to RocketMQ, in the same process.
"""

from dataclasses import dataclass

from tests.bench.experiment import Bench, Experiment, Measurement
from tests.bench.servers import AloneServer, BridgeServer, Load, Server, cpu_seconds

WINDOW = 100
_TOPIC = "sensors/room1/temperature"


@dataclass(frozen=True)
class UplinkResult:
    """What publishing cost."""

    rate: float
    cpu_us: float
    """Of the server for each message, until its lanes are empty."""
    waiting: float = 0.0
    """Messages in the lane when the last was acknowledged."""


async def publish(
    bench: Bench, server: Server, *, qos: int = 1, publishers: int = 1, topic: str = _TOPIC
) -> UplinkResult:
    """Publish to `server` for a while, and wait until a bridge's lanes are empty where they can be."""
    before = cpu_seconds(server.pid)
    load = await Load.start(
        "publish", server, clients=publishers, qos=qos, window=WINDOW, seconds=bench.seconds, topic=topic
    )
    result = await load.result()
    waiting = 0.0
    if isinstance(server, BridgeServer) and not server.rocketmq_away:
        waiting = await server.metric("mq2mqtt_lane_messages")
        await server.wait_drained()
    return UplinkResult(result.rate, (cpu_seconds(server.pid) - before) / result.messages * 1e6, waiting)


def _experiment(*, qos: int, publishers: int) -> Experiment:
    async def run(bench: Bench) -> list[Measurement]:
        alone = await bench.kept("alone", lambda: AloneServer.start(bench))
        bridge = await bench.kept("bridge", lambda: BridgeServer.outbound(bench))
        baseline, measured = await bench.interleaved(
            lambda: publish(bench, alone, qos=qos, publishers=publishers),
            lambda: publish(bench, bridge, qos=qos, publishers=publishers),
        )
        return [
            Measurement("published", measured.rate, "msg/s", baseline.rate),
            Measurement("CPU of the server", measured.cpu_us, "us/msg", baseline.cpu_us),
            Measurement("left in the lane", measured.waiting, "msg"),
        ]

    return Experiment(run)


EXPERIMENTS = {
    "uplink-amqtt-qos1-1pub": _experiment(qos=1, publishers=1),
    "uplink-amqtt-qos1-20pub": _experiment(qos=1, publishers=20),
    "uplink-amqtt-qos0-1pub": _experiment(qos=0, publishers=1),
}
