"""Runs `mq2mqtt` and notes how long its event loop stood still: `python watched_loop.py NOTES ARGUMENT ...`.

`BridgeProcess.watch_loop` starts it; `pauses` reads the notes.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mq2mqtt import cli

_PERIOD_SECONDS = 0.01
_NOTED_SECONDS = 0.02


@dataclass(frozen=True)
class Pause:
    """The loop was late.

    Attributes:
        at: when it ended, seconds since 1970.
        late: seconds.
        own: seconds of it that were the process's own doing: without those in which one of its threads could have run
            and the system ran others.
    """

    at: float
    late: float
    own: float


def pauses(notes: Path) -> list[Pause]:
    """Read what has been noted; a line that a kill has torn does not count."""
    lines = notes.read_text().splitlines(keepends=True)
    return [Pause(*map(float, line.split())) for line in lines if line.endswith("\n")]


def core_waits() -> dict[str, float]:
    """Return for how many seconds each thread of this process has waited for a core, by its id.

    A thread that waits for one may hold the interpreter's lock, and keep the loop from it.
    """
    waits: dict[str, float] = {}
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            waits[thread.name] = int((thread / "schedstat").read_text().split()[1]) / 1e9
    return waits


def waited_since(before: dict[str, float]) -> float:
    """Return for how many seconds threads have waited for a core since `core_waits` returned `before`."""
    return sum(seconds - before.get(thread, 0.0) for thread, seconds in core_waits().items())


async def _watch(notes: Path) -> None:
    with notes.open("a", buffering=1) as file:
        while True:
            before, due = core_waits(), time.monotonic() + _PERIOD_SECONDS
            await asyncio.sleep(_PERIOD_SECONDS)
            late = time.monotonic() - due
            if late > _NOTED_SECONDS:
                file.write(f"{time.time():.3f} {late:.4f} {max(0.0, late - waited_since(before)):.4f}\n")


async def _beside(work: Coroutine[Any, Any, int], notes: Path) -> int:
    watching = asyncio.create_task(_watch(notes), name="watch")
    try:
        return await work
    finally:
        watching.cancel()


def main() -> None:
    notes = Path(sys.argv.pop(1))
    run = cli._run  # noqa: SLF001 - where every command's coroutine is run
    cli._run = lambda work: run(_beside(work, notes))  # noqa: SLF001
    cli.main()


if __name__ == "__main__":
    main()
