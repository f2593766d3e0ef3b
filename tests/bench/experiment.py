"""What an experiment is given and what it says."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, cast

from mq2mqtt.quickstart.rocketmq import START_FAST, RocketMQ


@dataclass(frozen=True)
class Measurement:
    """One figure of one run; `baseline` is what the same machine did another way in the same run."""

    metric: str
    value: float
    unit: str
    baseline: float | None = None


class Closeable(Protocol):
    """What an experiment keeps between its runs."""

    def close(self) -> None:
        """End it. Idempotent."""


_Kept = TypeVar("_Kept", bound=Closeable)
_First = TypeVar("_First")
_Second = TypeVar("_Second")


class Bench:
    """What experiments share: a directory that is removed afterwards, and a RocketMQ once one asks for it."""

    def __init__(self, *, namesrv: str | None, quick: bool = False) -> None:
        self._given = namesrv
        self._temporary = tempfile.TemporaryDirectory(prefix="mq2mqtt-bench-")
        self._server: RocketMQ | None = None
        self._kept: dict[str, Closeable] = {}
        self.quick = quick
        """Show that everything works, in little time; the figures mean nothing."""
        self.run = 0
        """Number of this run; 0 is the warm-up."""

    @property
    def directory(self) -> Path:
        """Where an experiment may write."""
        return Path(self._temporary.name)

    def scaled(self, amount: int) -> int:
        """Return `amount`, or a fiftieth of it with `quick`."""
        return max(1, amount // 50) if self.quick else amount

    @property
    def seconds(self) -> float:
        """How long a measurement by time lasts."""
        return 0.3 if self.quick else 3.0

    @property
    def java_flags(self) -> Sequence[str]:
        """For RocketMQ's JVMs: what is measured runs as RocketMQ does elsewhere."""
        return START_FAST if self.quick else ()

    async def namesrv(self) -> str:
        """Return the name server's address; start a RocketMQ the first time."""
        if self._given is None:
            self._server = await RocketMQ.on_jvm(self.directory / "rocketmq", java_flags=self.java_flags, say=print)
            self._given = self._server.namesrv
        return self._given

    @property
    def rocketmq_version(self) -> str | None:
        """Of the RocketMQ that was started here; `None` for one that was given."""
        return self._server.version if self._server else None

    async def kept(self, name: str, make: Callable[[], Awaitable[_Kept]]) -> _Kept:
        """Return what is kept under `name`, made the first time: for all experiments with `quick`, else for one."""
        if name not in self._kept:
            self._kept[name] = await make()
        return cast("_Kept", self._kept[name])

    async def interleaved(
        self, first: Callable[[], Awaitable[_First]], second: Callable[[], Awaitable[_Second]]
    ) -> tuple[_First, _Second]:
        """Measure both, in turn the one and the other first: what drifts then drifts for both."""
        if self.run % 2:
            early = await first()
            return early, await second()
        late = await second()
        return await first(), late

    def end_experiment(self) -> None:
        """Close what was kept."""
        while self._kept:
            self._kept.popitem()[1].close()

    def close(self) -> None:
        """Stop what was started and remove what was written."""
        self.end_experiment()
        if self._server is not None:
            self._server.kill()
        self._temporary.cleanup()


@dataclass(frozen=True)
class Experiment:
    """What `scripts/bench` runs under a name."""

    measure: Callable[[Bench], Awaitable[list[Measurement]]]
    """Called once for each run, and once before them to warm up; those figures are dropped."""
    slow: bool = False
    """Starts its servers anew in each run: no warm-up, and at most `SLOW_RUNS` runs."""
    long: bool = False
    """Takes minutes: runs where it is named, or with `quick`; no warm-up, and once."""


SLOW_RUNS = 3


async def gather_bounded(work: Callable[[int], Awaitable[object]], *, count: int, in_flight: int) -> None:
    """Run `work(0)` to `work(count - 1)`, `in_flight` at a time."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await work(number)

    await asyncio.gather(*(worker() for _ in range(in_flight)))
