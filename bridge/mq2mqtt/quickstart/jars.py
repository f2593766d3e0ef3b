"""RocketMQ's own jars, resolved by Maven once and kept in the user's cache directory."""

import asyncio
import os
import re
import shutil
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from mq2mqtt.quickstart.prerequisites import PrerequisiteError, Say, require_programs
from mq2mqtt.quickstart.process import die_with_parent

__all__ = ["cache_directory", "rocketmq_jars"]

# A line of Maven 3: `Downloaded from NAME: ADDRESS/netty-4.1.65.jar (4.3 MB at 9.1 MB/s)`
_DOWNLOADED = re.compile(r"Downloaded from [^(]*\.jar \((\d+(?:\.\d+)?) (B|kB|MB)")
_BYTES = {"B": 1, "kB": 1000, "MB": 1_000_000}
_REPORT_INTERVAL = 2.0
_KEPT_LINES = 400


def cache_directory() -> Path:
    """Return `$XDG_CACHE_HOME/mq2mqtt`, by default `~/.cache/mq2mqtt`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mq2mqtt"


async def rocketmq_jars(version: str, say: Say) -> Path:
    """Return the directory that holds the jars of RocketMQ `version`, fetching them if it is not there.

    The directory appears by one rename when everything is in it: an interrupted fetch leaves nothing to trust.

    Raises:
        PrerequisiteError: Maven is missing or fails.
    """
    directory = cache_directory() / f"rocketmq-{version}"
    if directory.is_dir():
        return directory
    await require_programs(["mvn"], say)
    say(f"fetching RocketMQ {version} with Maven, once (about 90 MB into {directory})")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="fetching-") as scratch:
        jars = Path(scratch) / "jars"
        with _pom() as pom:
            await _copy_dependencies(pom, jars, version=version, say=say)
        try:
            jars.rename(directory)
        except OSError:
            # Another process was faster: a directory that is not empty is never replaced.
            if not directory.is_dir():
                raise
    say(f"RocketMQ {version}: {len(list(directory.glob('*.jar')))} jars ready")
    return directory


@contextmanager
def _pom() -> Iterator[Path]:
    with resources.as_file(resources.files("mq2mqtt.quickstart") / "rocketmq-pom.xml") as pom:
        yield pom


async def _copy_dependencies(pom: Path, target: Path, *, version: str, say: Say) -> None:
    process = await asyncio.create_subprocess_exec(
        shutil.which("mvn") or "mvn",
        "--batch-mode",
        f"--file={pom}",
        f"-Drocketmq.version={version}",
        *(["-Dno.proxy"] if version.startswith("4.") else []),
        "-DincludeScope=runtime",
        f"-DoutputDirectory={target}",
        "dependency:copy-dependencies",
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        preexec_fn=die_with_parent,
    )
    try:
        lines = await _show_progress(process, say)
        exit_code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if exit_code != 0:
        reason = next((line for line in lines if line.startswith("[ERROR]")), lines[-1] if lines else "no output")
        raise PrerequisiteError(f"Maven could not fetch RocketMQ {version}: {reason.removeprefix('[ERROR]').strip()}")


async def _show_progress(process: Process, say: Say) -> list[str]:
    """Follow Maven's output to its end; return its last lines."""
    assert process.stdout is not None  # noqa: S101 - PIPE was asked for
    loop = asyncio.get_running_loop()
    lines: list[str] = []
    jars, size, reported = 0, 0.0, loop.time()
    async for raw in process.stdout:
        line = raw.decode(errors="replace").rstrip()
        lines = [*lines[-_KEPT_LINES:], line] if not line.startswith("Download") else lines
        if downloaded := _DOWNLOADED.match(line.removeprefix("[INFO] ")):
            jars += 1
            size += float(downloaded[1]) * _BYTES[downloaded[2]]
        if jars and loop.time() - reported >= _REPORT_INTERVAL:
            say(f"  {jars} jars, {size / 1e6:.0f} MB")
            reported = loop.time()
    return lines
