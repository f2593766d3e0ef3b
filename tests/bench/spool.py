"""How fast a lane takes messages and gives them back: 64-byte payloads, one process, one thread."""

import asyncio
import os
import time
from pathlib import Path

from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.frame import encode_publish
from mq2mqtt.spool.lane import Durability, Lane
from mq2mqtt.spool.reader import LaneReader
from tests.bench.experiment import Bench, Experiment, Measurement

MESSAGES = 300_000
READ_AT_ONCE = 256
CLIENTS = 50
COMMITTED = 20_000
SYNCED_ALONE = 200
_MAX_BYTES = 1 << 30


def _open(bench: Bench, *, durability: Durability = "process") -> Lane:
    path = bench.directory / f"lane-{time.time_ns()}"
    return Lane.open(path, max_bytes=_MAX_BYTES, target="bench", durability=durability)


def _message(number: int) -> MqttMessage:
    return MqttMessage(f"sensors/room{number % 97}/temperature", b"x" * 64, client_id=f"device-{number % 1000:04}")


async def spool_append(bench: Bench) -> list[Measurement]:
    """Encode and append; baseline: the same bytes, already encoded, by bare `write` calls."""
    messages = [_message(number) for number in range(bench.scaled(MESSAGES))]
    frames = [encode_publish(message, accepted_us=1) for message in messages]
    written = _write_bare(bench.directory / "bare", frames)
    lane = _open(bench)
    start = time.perf_counter()
    for message in messages:
        lane.append(encode_publish(message, accepted_us=time.time_ns() // 1000))
    rate = len(messages) / (time.perf_counter() - start)
    lane.close()
    return [Measurement("appended", rate, "frames/s", written)]


def _write_bare(path: Path, frames: list[bytes]) -> float:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    start = time.perf_counter()
    for frame in frames:
        os.write(descriptor, frame)
    rate = len(frames) / (time.perf_counter() - start)
    os.close(descriptor)
    return rate


async def spool_read(bench: Bench) -> list[Measurement]:
    """Read and decode, and the same with settling every read; baseline of both: appending the same frames."""
    lane = _open(bench)
    count = bench.scaled(MESSAGES)
    frames = [encode_publish(_message(number), accepted_us=1) for number in range(count)]
    start = time.perf_counter()
    for frame in frames:
        lane.append(frame)
    appended = count / (time.perf_counter() - start)
    reader = LaneReader(lane)
    reading = 0.0
    begin = time.perf_counter()
    while True:
        start = time.perf_counter()
        entries = reader.read(max_messages=READ_AT_ONCE)
        reading += time.perf_counter() - start
        if not entries:
            break
        reader.settle([entry.offset for entry in entries])
    settled = count / (time.perf_counter() - begin)
    reader.close()
    lane.close()
    return [
        Measurement("read", count / reading, "frames/s", appended),
        Measurement("read and settled", settled, "frames/s", appended),
    ]


async def spool_commit(bench: Bench) -> list[Measurement]:
    """`durability: power` with 50 publishers, each waiting for its own message; baseline: one publisher."""
    lane = _open(bench, durability="power")
    count, few = bench.scaled(COMMITTED), bench.scaled(SYNCED_ALONE)
    frames = iter([encode_publish(_message(number), accepted_us=1) for number in range(count + few)])

    async def publish(count: int) -> None:
        for _ in range(count):
            lane.append(next(frames))
            durable = lane.durable()
            if durable is not None:
                await durable

    start = time.perf_counter()
    await publish(few)
    alone = few / (time.perf_counter() - start)
    start = time.perf_counter()
    await asyncio.gather(*(publish(count // CLIENTS) for _ in range(CLIENTS)))
    rate = count / (time.perf_counter() - start)
    lane.close()
    return [Measurement("committed", rate, "frames/s", alone)]


EXPERIMENTS = {
    "spool-append": Experiment(spool_append),
    "spool-read": Experiment(spool_read),
    "spool-commit": Experiment(spool_commit),
}
