"""What RocketMQ on a plain JVM, Mosquitto's hook and the tests' PostgreSQL need.

Found, installed by root with apt, or named in one line.
"""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mq2mqtt.errors import BridgeError

__all__ = [
    "PrerequisiteError",
    "Say",
    "find_program",
    "require_java",
    "require_mosquitto",
    "require_postgresql",
    "require_programs",
]

Say = Callable[[str], None]
"""Shows one line of progress to the user."""

OLDEST_JAVA = 17
_PACKAGES = {
    "java": "default-jre-headless",
    "javac": "default-jdk-headless",
    "mvn": "maven",
    "mosquitto": "mosquitto",
    "mosquitto_plugin.h": "mosquitto-dev",
    "cc": "gcc",
    "stdlib.h": "libc6-dev",
    "make": "make",
    "initdb": "postgresql",
    "postgres": "postgresql",
}
_SERVICES = frozenset({"mosquitto", "postgresql"})
_ROCKETMQS_OWN = frozenset({"java", "mvn"})
_HOOK_BUILD = ("cc", "make", "mosquitto_plugin.h", "stdlib.h")
_INCLUDES = (Path("/usr/include"), Path("/usr/local/include"))
# Where Debian has daemons, which only root's PATH names.
_SYSTEM_PROGRAMS = "/usr/local/sbin:/usr/sbin"
# Where Debian has PostgreSQL's, which no PATH names; by version.
_POSTGRESQL = Path("/usr/lib/postgresql")
_POLICY = Path("/usr/sbin/policy-rc.d")
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


async def require_mosquitto(say: Say, *, build: bool = True) -> str:
    """Make sure that Mosquitto is there and, for `build`, what its hook is built with; return Mosquitto's file.

    Raises:
        PrerequisiteError: something is missing and could not be installed.
    """
    await require_programs(["mosquitto", *(_HOOK_BUILD if build else ())], say)
    return str(find_program("mosquitto"))


async def require_postgresql(say: Say) -> None:
    """Make sure that a PostgreSQL server can be started here.

    Raises:
        PrerequisiteError: it is missing and could not be installed.
    """
    await require_programs(["initdb", "postgres"], say)


async def require_programs(programs: Iterable[str], say: Say) -> None:
    """Make sure that `programs` are on the PATH, and C headers (`stdlib.h`) there; as root on Debian, install them.

    Raises:
        PrerequisiteError: something is missing and could not be installed.
    """
    missing = [name for name in programs if _is_missing(name)]
    if not missing:
        return
    if os.geteuid() == 0 and shutil.which("apt-get") is not None:
        await _apt_install(missing, say)
        missing = [name for name in missing if _is_missing(name)]
    if missing:
        raise PrerequisiteError(f"missing here: {', '.join(missing)}; {_advice(missing)}")


def find_program(name: str) -> str | None:
    """Return the file of a program on the PATH, or where daemons are."""
    places = [_SYSTEM_PROGRAMS, *map(str, sorted(_POSTGRESQL.glob("*/bin"), reverse=True))]
    return shutil.which(name) or shutil.which(name, path=":".join(places))


def _is_missing(name: str) -> bool:
    if name.endswith(".h"):
        return not any((directory / name).exists() for directory in _INCLUDES)
    return find_program(name) is None


def _advice(programs: Iterable[str]) -> str:
    names = list(programs)
    advice = f"`apt install {' '.join(_packages(names))}`"
    if _ROCKETMQS_OWN.isdisjoint(names):
        return advice
    return f"{advice}, or name a RocketMQ that runs already: --rocketmq HOST:PORT"


def _packages(programs: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(_PACKAGES[name] for name in programs))


async def _apt_install(programs: list[str], say: Say) -> None:
    packages = _packages(programs)
    say(f"installing {' '.join(packages)} with apt")
    install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    with contextlib.nullcontext() if _SERVICES.isdisjoint(packages) else _services_stay_down():
        for command in (["apt-get", "update"], install):
            problem = await _run_apt(command, say)
            if problem is not None:
                raise PrerequisiteError(f"`{' '.join(command)}` failed: {problem}; {_advice(programs)}")


async def _run_apt(command: list[str], say: Say) -> str | None:
    """Return the last words of a command that failed."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    )
    assert process.stdout is not None  # noqa: S101 - PIPE was asked for
    last_line = ""
    async for raw in process.stdout:
        last_line = raw.decode(errors="replace").rstrip()
        if last_line.startswith(("Get:", "Unpacking", "Setting up")):
            say(f"  {last_line}")
    return None if await process.wait() == 0 else last_line


@contextlib.contextmanager
def _services_stay_down() -> Iterator[None]:
    """Let no package that is installed now start its service: Mosquitto would take port 1883, PostgreSQL 5432."""
    try:
        with _POLICY.open("x") as file:
            file.write(
                "#!/bin/sh\n# mq2mqtt installs packages. When it does not run any more, this file may go.\nexit 101\n"
            )
    except FileExistsError:
        # The machine's own policy, which containers have.
        yield
        return
    try:
        _POLICY.chmod(0o755)
        yield
    finally:
        _POLICY.unlink()
