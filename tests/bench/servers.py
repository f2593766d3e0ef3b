"""The servers under test, each a process of its own, and the load on them, another one."""

# ruff: noqa: T201 - a program for the terminal

import asyncio
import json
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, Self

from mq2mqtt.quickstart.cluster import create_topic
from mq2mqtt.quickstart.ports import free_port
from mq2mqtt.quickstart.process import Child
from tests.bench.experiment import Bench, Measurement
from tests.bridge_process import BridgeProcess

ROOT = Path(__file__).parents[2]
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_START_SECONDS = 30.0
_READY_SECONDS = 120.0
_POLL_SECONDS = 0.05
_LOAD_CPU = 0.85


class Server(Protocol):
    """A process that clients connect to."""

    @property
    def port(self) -> int:
        """Its MQTT port."""

    @property
    def processes(self) -> dict[str, int]:
        """Name -> id of each process that it consists of."""


class Alone(Server, Protocol):
    """A broker without the bridge."""

    @classmethod
    async def start(cls, bench: Bench) -> Self:
        """Start it and wait until it listens."""

    def close(self) -> None:
        """End it."""


def cpu_seconds(pid: int) -> float:
    """Return the processor time of all threads of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def cpu_of(server: Server) -> dict[str, float]:
    """Return the processor time of each process of `server`."""
    return {name: cpu_seconds(pid) for name, pid in server.processes.items()}


def cpu_since(before: dict[str, float], server: Server, *, messages: int) -> dict[str, float]:
    """Return the microseconds that each process has taken for each message since `before`."""
    return {name: (now - before[name]) / messages * 1e6 for name, now in cpu_of(server).items()}


def cpu_measurements(
    used: dict[str, float], baseline: dict[str, float] | None = None, *, of: str = ""
) -> list[Measurement]:
    """Return a figure for each process."""
    return [
        Measurement(f"CPU of the {name}{of}", value, "us/msg", None if baseline is None else baseline.get(name))
        for name, value in used.items()
    ]


def resident_bytes(pid: int) -> int:
    """Return the memory of a process that is resident."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES


class AloneServer:
    """amqtt without the bridge (`plain_amqtt`)."""

    def __init__(self, child: Child, port: int) -> None:
        self._child = child
        self.port = port

    @classmethod
    async def start(cls, bench: Bench) -> Self:
        """Start it and wait until it listens."""
        port = free_port()
        command = [sys.executable, "-m", "tests.bench.plain_amqtt", str(port)]
        child = Child(command, output=bench.directory / f"amqtt-{port}.log", cwd=ROOT)
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except OSError:
                if child.exit_code is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"amqtt did not start: {child.tail()}") from None
                await asyncio.sleep(0.05)
            else:
                return cls(child, port)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    @property
    def processes(self) -> dict[str, int]:
        """Its only process."""
        return {"server": self.pid}

    def close(self) -> None:
        """Kill it."""
        self._child.kill()


class BridgeServer:
    """amqtt with the bridge, by `mq2mqtt run`."""

    topic = ""
    """RocketMQ topic of its rule."""
    rocketmq_away = False
    """Nothing will leave its lanes."""

    def __init__(self, bench: Bench, *, namesrv: str, rules: list[dict[str, Any]]) -> None:
        name = f"bridge-{uuid.uuid4().hex[:8]}"
        self.bridge = self._make_bridge(bench.directory / name, namesrv=namesrv, rules=rules)
        # Several may serve one RocketMQ, each with consumer groups of its own.
        self.bridge.config["node"] = name

    def _make_bridge(self, directory: Path, *, namesrv: str, rules: list[dict[str, Any]]) -> BridgeProcess:
        return BridgeProcess(directory, namesrv=namesrv, rules=rules)

    @classmethod
    async def start(cls, bench: Bench, rules: list[dict[str, Any]], *, topic: str = "") -> Self:
        """Start it on the bench's RocketMQ and wait until its rules are up."""
        server = cls(bench, namesrv=await bench.namesrv(), rules=rules)
        server.topic = topic
        await server.run()
        return server

    @classmethod
    async def outbound(cls, bench: Bench) -> Self:
        """Start one with a rule from `sensors` to `topic`."""
        topic = await new_topic(bench)
        rule = {"id": "bench-out", "type": "outbound", "source": "sensors", "target": topic}
        return await cls.start(bench, [rule], topic=topic)

    @classmethod
    async def inbound(cls, bench: Bench) -> Self:
        """Start one with a rule from `topic` to `devices`."""
        topic = await new_topic(bench, queues=8)
        rule = {"id": "bench-in", "type": "inbound", "source": topic, "target": "devices"}
        return await cls.start(bench, [rule], topic=topic)

    @classmethod
    async def both_ways(cls, bench: Bench) -> Self:
        """Start one with a rule from `sensors` to the first word of `topic`, and one from the second to `devices`."""
        up, down = await new_topic(bench), await new_topic(bench)
        rules = [
            {"id": "bench-out", "type": "outbound", "source": "sensors", "target": up},
            {"id": "bench-in", "type": "inbound", "source": down, "target": "devices"},
        ]
        return await cls.start(bench, rules, topic=f"{up} {down}")

    async def run(self, *, ready: bool = True) -> float:
        """Start the process; return how many seconds it took until it was ready, or listened."""
        start = time.perf_counter()
        await asyncio.to_thread(self.bridge.start, ready=False)
        if ready:
            async with asyncio.timeout(_READY_SECONDS):
                while (await asyncio.to_thread(self.bridge.get, "/readyz"))[0] != HTTPStatus.OK:
                    await asyncio.sleep(_POLL_SECONDS)
        return time.perf_counter() - start

    @property
    def port(self) -> int:
        """Its MQTT port."""
        return self.bridge.mqtt_port

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.bridge.process is not None
        return self.bridge.process.pid

    @property
    def processes(self) -> dict[str, int]:
        """Its only process."""
        return {"server": self.pid}

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Have it stand still (SIGSTOP) for a while; its connections stay."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill it."""
        self.bridge.kill()


@dataclass(frozen=True)
class LoadResult:
    """What a load program measured."""

    messages: int
    seconds: float
    load_cpu: float
    """Share of one core that the load itself took. Near 1, it was the load that was measured."""

    @property
    def rate(self) -> float:
        """Messages per second."""
        return self.messages / self.seconds


class Load:
    """A running load program (`tests.bench.load`)."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, mode: str, server: Server, **options: float | str) -> Self:
        """Start it and wait until its clients are connected, and subscribed."""
        arguments = [f"--{name}={value}" for name, value in options.items()]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.bench.load",
            mode,
            f"--port={server.port}",
            *arguments,
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        load = cls(process)
        await load._line()
        return load

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load program ended with {await self._process.wait()}, see above")
        return line

    async def result(self) -> LoadResult:
        """Wait for its end, or end it if it waits for that."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        result = LoadResult(**json.loads(await self._line()))
        await self._process.wait()
        if result.load_cpu > _LOAD_CPU:
            print(
                f"the load program took {result.load_cpu:.0%} of a core: it may be what was measured", file=sys.stderr
            )
        return result


async def new_topic(bench: Bench, *, queues: int = 4) -> str:
    """Create a RocketMQ topic."""
    topic = f"bench_{uuid.uuid4().hex[:12]}"
    await create_topic(await bench.namesrv(), topic, queues=queues)
    return topic
