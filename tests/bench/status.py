"""What it costs to tell of clients that come and go: visits of clients to a broker with a status rule, and without."""

import time
from dataclasses import dataclass
from functools import partial

from tests.bench.experiment import Bench, Experiment, Measurement
from tests.bench.hosts import AMQTT, MOSQUITTO, Host
from tests.bench.rocketmq_client import target
from tests.bench.servers import BridgeServer, Load, Server, cpu_measurements, cpu_of, cpu_since, new_topic

VISITS = 10_000
AT_ONCE = 50
EVENTS_EACH = 3
"""connect, disconnect, tcpclean."""


@dataclass(frozen=True)
class _Visits:
    rate: float
    cpu_us: dict[str, float]


async def _with_rule(bench: Bench, host: Host) -> BridgeServer:
    topic = await new_topic(bench, queues=8)
    rule = {"id": "bench-status", "type": "status", "source": "GID_visit", "target": topic}
    return await host.bridge.start(bench, [rule], topic=topic)


async def _visit(server: Server, count: int) -> float:
    load = await Load.start("visit", server, messages=count, window=AT_ONCE)
    return (await load.result()).rate


async def _alone(bench: Bench, host: Host, count: int) -> _Visits:
    server = await host.keep_alone(bench)
    before = cpu_of(server)
    rate = await _visit(server, count)
    return _Visits(rate, cpu_since(before, server, messages=count))


async def _told(bench: Bench, host: Host, count: int) -> tuple[_Visits, float]:
    """Return also how many events a second reached RocketMQ, from the first visit to the last event."""
    server = await bench.kept(f"{host.name} status", partial(_with_rule, bench, host))
    async with target(bench, server.topic) as rocketmq:
        events = EVENTS_EACH * count
        end = await rocketmq.shown() + events
        before, begin = cpu_of(server), time.perf_counter()
        rate = await _visit(server, count)
        await rocketmq.wait_shown(end)
        seconds = time.perf_counter() - begin
    return _Visits(rate, cpu_since(before, server, messages=count)), events / seconds


async def status(bench: Bench, host: Host) -> list[Measurement]:
    """Have clients connect and disconnect, `AT_ONCE` at a time; baseline: the broker alone."""
    count = bench.scaled(VISITS)
    alone, (visits, events) = await bench.interleaved(
        partial(_alone, bench, host, count), partial(_told, bench, host, count)
    )
    return [
        Measurement("visits", visits.rate, "visits/s", alone.rate),
        *cpu_measurements(visits.cpu_us, alone.cpu_us, of=", each visit"),
        Measurement("told in RocketMQ", events, "events/s"),
    ]


EXPERIMENTS = {
    "status-amqtt": Experiment(partial(status, host=AMQTT)),
    "status-mosquitto": Experiment(partial(status, host=MOSQUITTO)),
}
