"""What ten minutes of devices that come and go leave behind in the memory of broker and sidecar.

Baseline: Mosquitto without the hook, with the same devices in the same ten minutes, and without messages to them.
"""

import asyncio
import time
from pathlib import Path

from mq2mqtt.message import RocketMessage
from tests.bench.experiment import Bench, Experiment, Measurement
from tests.bench.hosts import MOSQUITTO
from tests.bench.rocketmq_client import Target, target
from tests.bench.servers import Load, Server, resident_bytes

DEVICES = 2000
PUBLISHES = 200.0
"""A second; for every tenth one, a device goes and one comes."""
DELIVERIES = 100
"""P2P messages a second, some of them to clients that are gone."""
SECONDS = 600.0
_SAMPLES = {"start": 0.03, "middle": 0.5, "end": 0.97}
"""When the memory is looked at, as a share of the time."""
_STEPS = 10  # a second
_MIB = 1 << 20

Figures = dict[tuple[str, str], float]
"""(Metric, unit) -> value."""


def look_at(server: Server, when: str) -> Figures:
    """Return what the processes of `server` occupy."""
    figures: Figures = {}
    for name, pid in server.processes.items():
        figures[f"resident memory of the {name}, {when}", "MiB"] = resident_bytes(pid) / _MIB
        figures[f"open files of the {name}, {when}", "files"] = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return figures


async def _deliver(rocketmq: Target, devices: int) -> None:
    """Send messages to devices until cancelled."""
    number = 0
    while True:
        messages = []
        for _ in range(DELIVERIES // _STEPS):
            properties = {
                "TAGS": "MQ2MQTT",
                "mqttSecondTopic": f"/p2p/GID_churn@@@{number % devices:05d}",
                "qoslevel": "0",
            }
            messages.append(RocketMessage(rocketmq.topic, b"x" * 64, properties))
            number += 1
        await rocketmq.send(number, messages)
        await asyncio.sleep(1 / _STEPS)


async def _soak(bench: Bench, server: Server, topic: str) -> tuple[Figures, int]:
    """Return what was occupied, and how many publishes were acknowledged."""
    devices, seconds = bench.scaled(DEVICES), SECONDS / 200 if bench.quick else SECONDS
    load = await Load.start("churn", server, clients=devices, topic=topic, rate=PUBLISHES, seconds=seconds)
    start = time.monotonic()
    figures: Figures = {}
    for when, share in _SAMPLES.items():
        await asyncio.sleep(start + share * seconds - time.monotonic())
        figures |= look_at(server, when)
    result = await load.result()
    return figures, result.messages


async def soak(bench: Bench) -> list[Measurement]:
    """Measure both brokers at once: neither has much to do."""
    alone = await MOSQUITTO.keep_alone(bench)
    bridge = await bench.kept("soak", lambda: MOSQUITTO.bridge.both_ways(bench))
    up, down = bridge.topic.split()
    async with target(bench, up) as exported, target(bench, down) as imported:
        delivering = asyncio.create_task(_deliver(imported, bench.scaled(DEVICES)), name="bench.deliver")
        topic = "sensors/room1/temperature"
        (baseline, _), (measured, acknowledged) = await asyncio.gather(
            _soak(bench, alone, topic), _soak(bench, bridge, topic)
        )
        delivering.cancel()
        await exported.wait_shown(acknowledged)
    return [
        *(Measurement(metric, value, unit, baseline.get((metric, unit))) for (metric, unit), value in measured.items()),
        Measurement("acknowledged, and in RocketMQ", acknowledged, "msg"),
    ]


EXPERIMENTS = {"soak-mosquitto": Experiment(soak, long=True)}
