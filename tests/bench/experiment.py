"""What an experiment is given and what it says."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from mq2mqtt.quickstart.rocketmq import RocketMQ


@dataclass(frozen=True)
class Measurement:
    """One figure of one run; `baseline` is what the same machine did another way in the same run."""

    metric: str
    value: float
    unit: str
    baseline: float | None = None


class Bench:
    """What experiments share: a directory that is removed afterwards, and a RocketMQ once one asks for it."""

    def __init__(self, *, namesrv: str | None) -> None:
        self._given = namesrv
        self._temporary = tempfile.TemporaryDirectory(prefix="mq2mqtt-bench-")
        self._server: RocketMQ | None = None

    @property
    def directory(self) -> Path:
        """Where an experiment may write."""
        return Path(self._temporary.name)

    async def namesrv(self) -> str:
        """Return the name server's address; start a RocketMQ the first time."""
        if self._given is None:
            self._server = await RocketMQ.on_jvm(self.directory / "rocketmq", say=print)
            self._given = self._server.namesrv
        return self._given

    def close(self) -> None:
        """Stop what was started and remove what was written."""
        if self._server is not None:
            self._server.kill()
        self._temporary.cleanup()


Experiment = Callable[[Bench], Awaitable[list[Measurement]]]
"""Called once for each run; the first run is a warm-up, whose figures are dropped."""


async def gather_bounded(work: Callable[[int], Awaitable[object]], *, count: int, in_flight: int) -> None:
    """Run `work(0)` to `work(count - 1)`, `in_flight` at a time."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await work(number)

    await asyncio.gather(*(worker() for _ in range(in_flight)))
