"""Runs `e2e/java/Peer.java`: the official Java client, driven line by line."""

import asyncio
import atexit
import functools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_SOURCE = Path(__file__).parent / "e2e" / "java" / "Peer.java"
_DEADLINE = 60.0
_MAX_LINE = 16 * 1024 * 1024


@functools.cache
def _compiled(jars: Path) -> Path:
    """Compile the peer once for all tests: running it from its source costs seconds each time."""
    classes = Path(tempfile.mkdtemp(prefix="mq2mqtt-java-peer-"))
    atexit.register(shutil.rmtree, classes, ignore_errors=True)
    command = ["javac", "-encoding", "UTF-8", "-d", str(classes), "-cp", f"{jars}{os.sep}*", str(_SOURCE)]
    subprocess.run(command, check=True, capture_output=True)
    return classes


class JavaPeer:
    """One process of the Java client. Use as a context manager; leaving it ends the process in order.

    `lines` grows as the process prints.
    """

    def __init__(self, jars: Path, *arguments: str, home: Path) -> None:
        self.lines: list[dict[str, Any]] = []
        self._command = ["-Xmx256m", f"-Duser.home={home}", "-Dfile.encoding=UTF-8", "-cp", f"{jars}{os.sep}*"]
        self._command[-1] += f"{os.pathsep}{_compiled(jars)}"
        self._command += ["Peer", *arguments]
        self._stderr = home / f"peer-{arguments[0]}-{id(self)}.log"
        self._printed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        with self._stderr.open("wb") as stderr:
            self._process = await asyncio.create_subprocess_exec(
                "java",
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                limit=_MAX_LINE,
            )
        self._reader = asyncio.create_task(self._read(), name="java-peer")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.end()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
            raise
        finally:
            await asyncio.wait([self._reader])

    async def wait_for(self, key: str, *, count: int = 1) -> list[dict[str, Any]]:
        """Return the lines that have `key`, as soon as there are `count` of them."""
        async with asyncio.timeout(_DEADLINE), self._printed:
            while len(found := self.having(key)) < count:
                if self._reader.done():
                    raise AssertionError(f"the Java peer has ended: {self._stderr.read_text()[-2000:]}")
                await self._printed.wait()
            return found

    def having(self, key: str) -> list[dict[str, Any]]:
        """Return the lines printed so far that have `key`."""
        return [line for line in self.lines if key in line]

    async def end(self) -> None:
        """Close its standard input and wait until it has ended."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        async with asyncio.timeout(_DEADLINE):
            code = await self._process.wait()
        assert code == 0, self._stderr.read_text()[-2000:]

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            async for line in self._process.stdout:
                # RocketMQ's own logger may print a line before it finds its files.
                if line.startswith(b"{"):
                    async with self._printed:
                        self.lines.append(json.loads(line))
                        self._printed.notify_all()
        finally:
            async with self._printed:
                self._printed.notify_all()


async def run_java_peer(jars: Path, *arguments: str, home: Path) -> list[dict[str, Any]]:
    """Run the peer to its end and return what it printed."""
    async with JavaPeer(jars, *arguments, home=home) as peer:
        await peer.end()
    return peer.lines
