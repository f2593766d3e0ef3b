"""What grows with the number of rules, subscriptions, waiting messages and connections. Baseline: the fewest."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from mq2mqtt.message import RocketMessage
from mq2mqtt.quickstart.ports import free_port
from mq2mqtt.rocketmq import Client
from mq2mqtt.spool.frame import encode_publish
from mq2mqtt.spool.lane import Lane
from tests.bench.downlink import BODY, TOPIC, receive
from tests.bench.drain import CLIENTS, MAX_BYTES, RULE, message
from tests.bench.experiment import Bench, Experiment, Measurement, gather_bounded
from tests.bench.servers import AloneServer, BridgeServer, Load, cpu_seconds, resident_bytes
from tests.bench.uplink import publish

RULES = (1, 100, 1000)
SUBSCRIPTIONS = (10, 1000, 100_000)
BACKLOG = (0, 1_000_000, 5_000_000)
CONNECTIONS = 1000
_LOOKED_UP = 40_000
_MIB = 1 << 20

Figures = dict[tuple[str, str], float]
"""(Metric, unit) -> value."""


async def _each(
    bench: Bench, sizes: tuple[int, ...], noun: str, measure: Callable[[int], Awaitable[Figures]]
) -> list[Measurement]:
    """Measure every size, in turn the smallest and the largest first; the smallest is the baseline."""
    sizes = tuple(size if size <= 10 else bench.scaled(size) for size in sizes)
    figures = {size: await measure(size) for size in (sizes if bench.run % 2 else sizes[::-1])}
    smallest, *others = sizes
    rows = [
        Measurement(f"{metric}, {noun}: {smallest:,}", value, unit)
        for (metric, unit), value in figures[smallest].items()
    ]
    for size in others:
        rows += [
            Measurement(f"{metric}, {noun}: {size:,}", value, unit, figures[smallest][metric, unit])
            for (metric, unit), value in figures[size].items()
        ]
    return rows


async def idle_percent(bench: Bench, server: AloneServer | BridgeServer) -> float:
    """Return the share of a core that `server` takes when nothing happens."""
    before, start = cpu_seconds(server.pid), time.perf_counter()
    await asyncio.sleep(bench.seconds)
    return (cpu_seconds(server.pid) - before) / (time.perf_counter() - start) * 100


class _Topics(list[str]):
    """Topics that stay until the experiment ends."""

    def close(self) -> None:
        """They go with their RocketMQ, or stay in one that was given."""


async def _make_topics(bench: Bench, count: int) -> _Topics:
    prefix = f"bench_{time.time_ns()}"
    topics = _Topics(f"{prefix}_{number:04}" for number in range(count))
    async with Client(namesrv=await bench.namesrv(), client_id="bench", request_timeout=30) as client:
        await gather_bounded(lambda number: client.create_topic(topics[number], queues=4), count=count, in_flight=8)
    return topics


async def rules(bench: Bench) -> list[Measurement]:
    """Outbound rules, each with a RocketMQ topic of its own; one of them has traffic."""
    topics = await bench.kept("topics", lambda: _make_topics(bench, bench.scaled(RULES[-1])))

    async def measure(count: int) -> Figures:
        configured = [
            {"id": f"rule-{number:04}", "type": "outbound", "source": f"sensors{number:04}", "target": topics[number]}
            for number in range(count)
        ]
        server = BridgeServer(bench, namesrv=await bench.namesrv(), rules=configured)
        server.topic = topics[0]
        try:
            start = await server.run()
            idle = await idle_percent(bench, server)
            resident = resident_bytes(server.pid)
            published = await publish(bench, server, topic="sensors0000/room1/temperature")
        finally:
            server.close()
        return {
            ("start until ready", "s"): start,
            ("idle CPU", "%"): idle,
            ("resident memory", "MiB"): resident / _MIB,
            ("published", "msg/s"): published.rate,
            ("CPU of the server", "us/msg"): published.cpu_us["server"],
        }

    return await _each(bench, RULES, "rules", measure)


def _for_one_of(filters: int, topic: str, number: int) -> RocketMessage:
    """Make a message for one subscription; 7919 is prime, so that neighbours are far from each other."""
    second = f"/room1/state/{number * 7919 % filters:06d}"
    return RocketMessage(topic, BODY, {"TAGS": "MQ2MQTT", "mqttSecondTopic": second, "qoslevel": "0"})


async def subscriptions(bench: Bench) -> list[Measurement]:
    """Different filters, spread over at most 100 clients; each message is for another one."""

    async def measure(count: int) -> Figures:
        server = await BridgeServer.inbound(bench)
        messages = bench.scaled(_LOOKED_UP)
        try:
            load = await Load.start(
                "subscribe", server, clients=min(100, count), filters=count, topic=TOPIC, messages=messages
            )
            resident = resident_bytes(server.pid)
            result = await receive(bench, server, load, count=messages, make=partial(_for_one_of, count))
        finally:
            server.close()
        return {
            ("delivered", "msg/s"): result.rate,
            ("CPU of the server", "us/msg"): result.cpu_us["server"],
            ("resident memory", "MiB"): resident / _MIB,
        }

    return await _each(bench, SUBSCRIPTIONS, "subscriptions", measure)


def _fill(path: Path, count: int) -> None:
    now = time.time_ns() // 1000
    frames = [encode_publish(message(number), accepted_us=now) for number in range(CLIENTS)]
    lane = Lane.open(path / "spool" / RULE, max_bytes=MAX_BYTES, target="bench")
    try:
        for number in range(count):
            lane.append(frames[number % CLIENTS])
    finally:
        lane.close()


async def _backlogged(bench: Bench, count: int) -> BridgeServer:
    """Make a bridge whose RocketMQ is away and whose lane holds `count` messages; it is not started."""
    rule = {"id": RULE, "type": "outbound", "source": "sensors", "target": "bench"}
    server = BridgeServer(bench, namesrv=f"127.0.0.1:{free_port()}", rules=[rule])
    server.rocketmq_away = True
    server.bridge.config["spool"]["max_bytes"] = MAX_BYTES
    await asyncio.to_thread(_fill, server.bridge.directory, count)
    return server


async def backlog(bench: Bench) -> list[Measurement]:
    """Messages that wait in a lane while RocketMQ is away, as long as the experiment lasts."""

    async def measure(count: int) -> Figures:
        server = await bench.kept(f"lane {count}", lambda: _backlogged(bench, count))
        try:
            start = await server.run(ready=False)
            published = await publish(bench, server)
            resident = resident_bytes(server.pid)
        finally:
            server.close()
        return {
            ("start until it listens", "s"): start,
            ("published", "msg/s"): published.rate,
            ("CPU of the server", "us/msg"): published.cpu_us["server"],
            ("resident memory", "MiB"): resident / _MIB,
        }

    return await _each(bench, BACKLOG, "waiting", measure)


async def connections(bench: Bench) -> list[Measurement]:
    """Clients that are connected and silent; baseline: on amqtt alone."""
    count = bench.scaled(CONNECTIONS)

    async def measure(server: AloneServer | BridgeServer) -> tuple[float, float, float]:
        before = resident_bytes(server.pid)
        start = cpu_seconds(server.pid)
        load = await Load.start("connect", server, clients=count)
        connecting = (cpu_seconds(server.pid) - start) / count * 1e6
        resident = (resident_bytes(server.pid) - before) / count / 1024
        idle = await idle_percent(bench, server)
        await load.result()
        return connecting, resident, idle

    async def alone() -> tuple[float, float, float]:
        server = await AloneServer.start(bench)
        try:
            return await measure(server)
        finally:
            server.close()

    async def bridge() -> tuple[float, float, float]:
        server = await BridgeServer.outbound(bench)
        try:
            return await measure(server)
        finally:
            server.close()

    baseline, measured = await bench.interleaved(alone, bridge)
    return [
        Measurement(f"{metric}, connections: {count:,}", value, unit, base)
        for (metric, unit), value, base in zip(
            (("CPU of a CONNECT", "us"), ("memory of each", "KiB"), ("idle CPU", "%")), measured, baseline, strict=True
        )
    ]


EXPERIMENTS = {
    "growth-rules": Experiment(rules, slow=True),
    "growth-subscriptions": Experiment(subscriptions, slow=True),
    "growth-backlog": Experiment(backlog, slow=True),
    "growth-connections": Experiment(connections, slow=True),
}
