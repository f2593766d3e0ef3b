"""What the bridge costs publishers: amqtt with the bridge, RocketMQ reachable, against amqtt alone.

On amqtt alone nobody subscribes, so both sides only take and acknowledge the messages; the bridge also keeps them in
its lane, maps them and sends them to RocketMQ, in the same process.
"""

from dataclasses import dataclass

from tests.bench.experiment import Bench, Experiment, Measurement
from tests.bench.servers import AloneServer, BridgeServer, Load, Server, cpu_seconds, new_topic

WINDOW = 100
_TOPIC = "sensors/room1/temperature"


@dataclass(frozen=True)
class _Result:
    rate: float
    cpu_us: float
    waiting: float = 0.0


async def _publish(bench: Bench, server: Server, *, qos: int, publishers: int) -> _Result:
    before = cpu_seconds(server.pid)
    load = await Load.start(
        "publish", server, clients=publishers, qos=qos, window=WINDOW, seconds=bench.seconds, topic=_TOPIC
    )
    result = await load.result()
    waiting = 0.0
    if isinstance(server, BridgeServer):
        waiting = await server.metric("mq2mqtt_lane_messages")
        await server.wait_drained()
    return _Result(result.rate, (cpu_seconds(server.pid) - before) / result.messages * 1e6, waiting)


async def _bridge(bench: Bench) -> BridgeServer:
    rule = {"id": "bench-out", "type": "outbound", "source": "sensors", "target": await new_topic(bench)}
    return await BridgeServer.start(bench, [rule])


def _experiment(*, qos: int, publishers: int) -> Experiment:
    async def run(bench: Bench) -> list[Measurement]:
        alone = await bench.kept("alone", lambda: AloneServer.start(bench))
        bridge = await bench.kept("bridge", lambda: _bridge(bench))
        baseline, measured = await bench.interleaved(
            lambda: _publish(bench, alone, qos=qos, publishers=publishers),
            lambda: _publish(bench, bridge, qos=qos, publishers=publishers),
        )
        return [
            Measurement("published", measured.rate, "msg/s", baseline.rate),
            Measurement("CPU of the server", measured.cpu_us, "us/msg", baseline.cpu_us),
            Measurement("left in the lane", measured.waiting, "msg"),
        ]

    return run


EXPERIMENTS = {
    "uplink-amqtt-qos1-1pub": _experiment(qos=1, publishers=1),
    "uplink-amqtt-qos1-20pub": _experiment(qos=1, publishers=20),
    "uplink-amqtt-qos0-1pub": _experiment(qos=0, publishers=1),
}
