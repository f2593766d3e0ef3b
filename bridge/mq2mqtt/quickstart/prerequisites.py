"""Programs that a RocketMQ on a plain JVM needs: found, or installed by root with apt, or named in one line."""

import asyncio
import os
import re
import shutil
import subprocess
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Callable, Iterable

from mq2mqtt.errors import BridgeError

__all__ = ["PrerequisiteError", "Say", "require_java", "require_programs"]

Say = Callable[[str], None]
"""Shows one line of progress to the user."""

OLDEST_JAVA = 17
_PACKAGES = {"java": "default-jre-headless", "javac": "default-jdk-headless", "mvn": "maven"}
_JAVA_VERSION = re.compile(r'version "(?:1\.)?(\d+)')


class PrerequisiteError(BridgeError):
    """This machine lacks something; the text is one line that says what, and how to get it. Exit code 2."""


async def require_java(say: Say) -> None:
    """Make sure that `java` is there and new enough.

    Raises:
        PrerequisiteError: it is not, and could not be installed.
    """
    await require_programs(["java"], say)
    answer = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False)  # noqa: ASYNC221, S607
    found = _JAVA_VERSION.search(answer.stderr)
    if found is None:
        raise PrerequisiteError(f"`java -version` does not work here: {answer.stderr.strip()[:200]}")
    if int(found[1]) < OLDEST_JAVA:
        raise PrerequisiteError(
            f"Java {found[1]} is on the PATH, RocketMQ's flags here need {OLDEST_JAVA} or newer; {_advice(['java'])}"
        )


async def require_programs(programs: Iterable[str], say: Say) -> None:
    """Make sure that `programs` (of java, javac, mvn) are on the PATH; as root on Debian, install what is missing.

    Raises:
        PrerequisiteError: something is missing and could not be installed.
    """
    missing = [program for program in programs if shutil.which(program) is None]
    if not missing:
        return
    if os.geteuid() == 0 and shutil.which("apt-get") is not None:
        await _apt_install(missing, say)
        missing = [program for program in missing if shutil.which(program) is None]
    if missing:
        raise PrerequisiteError(f"missing here: {', '.join(missing)}; {_advice(missing)}")


def _advice(programs: Iterable[str]) -> str:
    packages = " ".join(_PACKAGES[program] for program in programs)
    return f"`apt install {packages}`, or name a RocketMQ that runs already: --rocketmq HOST:PORT"


async def _apt_install(programs: list[str], say: Say) -> None:
    packages = [_PACKAGES[program] for program in programs]
    say(f"installing {' '.join(packages)} with apt")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    last_line = ""
    for command in (["apt-get", "update"], install):
        process = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=environment
        )
        assert process.stdout is not None  # noqa: S101 - PIPE was asked for
        async for raw in process.stdout:
            last_line = raw.decode(errors="replace").rstrip()
            if last_line.startswith(("Get:", "Unpacking", "Setting up")):
                say(f"  {last_line}")
        if await process.wait() != 0:
            raise PrerequisiteError(f"`{' '.join(command)}` failed: {last_line}; {_advice(programs)}")
