"""How fast a lane that filled while RocketMQ was away goes there."""

import asyncio
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.frame import encode_publish
from mq2mqtt.spool.lane import Lane
from tests.bench.experiment import Bench, Experiment, Measurement
from tests.bench.mosquitto_servers import MosquittoServer
from tests.bench.rocketmq_client import DRAIN_SECONDS, batches_of, target
from tests.bench.servers import BridgeServer, cpu_measurements, cpu_of, cpu_since

MESSAGES = 300_000
FOR_MOSQUITTO = 1_000_000
CLIENTS = 1000
QUEUES = 8
RULE = "bench-out"
MAX_BYTES = 4 << 30
_POLL_SECONDS = 0.02


def message(number: int) -> MqttMessage:
    """Make a publish of one of `CLIENTS` devices; each has a topic of its own."""
    client = number % CLIENTS
    return MqttMessage(
        f"sensors/site{client % 7}/device{client:04}/temperature",
        b"%064d" % number,
        1,
        client_id=f"GID_dev@@@device-{client:04}",
    )


def fill(path: Path, count: int) -> None:
    """Fill the lane of the rule `RULE` below `path` with `count` messages."""
    lane = Lane.open(path / RULE, max_bytes=MAX_BYTES, target="bench")
    try:
        for number in range(count):
            lane.append(encode_publish(message(number), accepted_us=time.time_ns() // 1000))
    finally:
        lane.close()


@dataclass(frozen=True)
class FilledLane:
    """A lane on disk, to be copied."""

    path: Path

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path)


async def _filled(bench: Bench, count: int) -> FilledLane:
    path = bench.directory / f"filled-{count}"
    await asyncio.to_thread(fill, path, count)
    return FilledLane(path)


async def drain(
    bench: Bench, *, kind: type[BridgeServer] = BridgeServer, messages: int = MESSAGES
) -> list[Measurement]:
    """Start a bridge on a filled lane; baseline: the same number of messages by the bridge's client alone, batched.

    Measured in RocketMQ, from the first messages that its queues show to the last.
    """
    count = bench.scaled(messages)
    lane = await bench.kept(f"lane of {count}", lambda: _filled(bench, count))

    async def client_alone() -> float:
        async with target(bench) as client:
            batches = batches_of(client.topic, count)
            start = time.perf_counter()
            await client.fill(batches)
            return count / (time.perf_counter() - start)

    async def by_bridge() -> tuple[float, dict[str, float]]:
        async with target(bench) as client:
            rule = {"id": RULE, "type": "outbound", "source": "sensors", "target": client.topic}
            server = kind(bench, namesrv=await bench.namesrv(), rules=[rule])
            server.bridge.config["spool"]["max_bytes"] = MAX_BYTES
            shutil.copytree(lane.path, server.bridge.directory / "spool")
            starting = asyncio.create_task(server.run(ready=False), name="bench.start")
            try:
                async with asyncio.timeout(DRAIN_SECONDS):
                    while not (first := await client.shown()):
                        if starting.done():
                            starting.result()
                        await asyncio.sleep(_POLL_SECONDS)
                    start, before = time.perf_counter(), cpu_of(server)
                    while (shown := await client.shown()) < count:
                        await asyncio.sleep(_POLL_SECONDS)
                    seconds, used = time.perf_counter() - start, cpu_since(before, server, messages=shown - first)
            finally:
                await starting
                server.close()
            shutil.rmtree(server.bridge.directory)
        return (shown - first) / seconds, used

    alone, (rate, cpu_us) = await bench.interleaved(client_alone, by_bridge)
    return [Measurement("drained", rate, "msg/s", alone), *cpu_measurements(cpu_us)]


EXPERIMENTS = {
    "drain": Experiment(drain),
    "drain-mosquitto": Experiment(partial(drain, kind=MosquittoServer, messages=FOR_MOSQUITTO)),
}
