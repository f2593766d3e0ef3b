"""The same RocketMQ in a container, where a Docker engine answers: no Java needed."""

import asyncio
import contextlib
import shutil
import subprocess
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Mapping
from typing import Self

from mq2mqtt.errors import BridgeError, LinkError
from mq2mqtt.quickstart.cluster import broker_addresses
from mq2mqtt.quickstart.ports import free_port
from mq2mqtt.quickstart.prerequisites import Say
from mq2mqtt.quickstart.process import die_with_parent
from mq2mqtt.quickstart.rocketmq import QUIET_BROKER

__all__ = ["DockerError", "RocketMQContainer", "engine_answers"]

_IMAGE = "apache/rocketmq"
_QUESTION_DEADLINE = 10.0
_CHANGE_DEADLINE = 60.0
_PULL_DEADLINE = 600.0
_START_DEADLINE = 120.0
_POLL_INTERVAL = 0.2

# One container for both: it is for one machine, and a container's end takes both along.
_START = 'echo "$BROKER_CONF" >/tmp/broker.conf; sh mqnamesrv & exec sh mqbroker -n 127.0.0.1:9876 -c /tmp/broker.conf'
# Appended to the image's own flags, which ask for gigabytes. Nobody asks this RocketMQ for its top speed.
_JVM_FLAGS = (
    "-Xms256m -Xmx512m -Xmn128m -XX:MaxDirectMemorySize=512m -XX:TieredStopAtLevel=1 -Dtls.server.mode=disabled"
)


class DockerError(BridgeError):
    """Docker cannot give a RocketMQ here; the text says why."""


async def engine_answers() -> bool:
    """Whether there is a `docker` command and an engine behind it."""
    if shutil.which("docker") is None:
        return False
    try:
        await _docker("version", "--format", "{{.Server.Version}}")
    except DockerError:
        return False
    return True


class RocketMQContainer:
    """Name server and broker of one version in one container, reachable on 127.0.0.1 alone."""

    def __init__(self, name: str, *, version: str) -> None:
        self.version = version
        self._name = name
        self._namesrv_port = free_port()
        self._broker_port = free_port()
        self.namesrv = f"127.0.0.1:{self._namesrv_port}"

    @classmethod
    async def run(cls, name: str, *, version: str, broker_conf: Mapping[str, str], say: Say) -> Self:
        """Pull the image if need be, start container `name` and wait until the broker is registered.

        A container of that name is what an earlier run left behind: it is removed.

        Raises:
            DockerError: no image, or it did not come up.
        """
        image = f"{_IMAGE}:{version}"
        await _need_image(image, say)
        server = cls(name, version=version)
        say(f"starting RocketMQ {version} in Docker: container {name}, name server {server.namesrv}")
        server.kill()
        try:
            await server._start(image, broker_conf)
            await server._wait_registered()
        except BaseException:
            server.kill()
            raise
        return server

    def kill(self) -> None:
        """Remove the container. Idempotent; blocks for up to a second or two."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(  # noqa: S603
                [_executable(), "rm", "--force", "--volumes", self._name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_CHANGE_DEADLINE,
                check=False,
            )

    async def _start(self, image: str, broker_conf: Mapping[str, str]) -> None:
        # The broker tells clients its address, so it must listen inside on the port that the host publishes.
        own = {"brokerIP1": "127.0.0.1", "listenPort": str(self._broker_port), **QUIET_BROKER}
        conf = "\n".join(f"{key}={value}" for key, value in {**broker_conf, **own}.items())
        await _docker(
            "run",
            "--detach",
            f"--name={self._name}",
            f"--publish=127.0.0.1:{self._namesrv_port}:9876",
            f"--publish=127.0.0.1:{self._broker_port}:{self._broker_port}",
            f"--env=BROKER_CONF={conf}",
            f"--env=JAVA_OPT_EXT={_JVM_FLAGS}",
            image,
            "sh",
            "-c",
            _START,
            seconds=_CHANGE_DEADLINE,
        )

    async def _wait_registered(self) -> None:
        try:
            async with asyncio.timeout(_START_DEADLINE):
                while not await self._is_registered():
                    if await _docker("inspect", "--format={{.State.Running}}", self._name) != "true":
                        raise DockerError(
                            f"RocketMQ's container ended: {await _docker('logs', '--tail=3', self._name)}"
                        )
                    await asyncio.sleep(_POLL_INTERVAL)
        except TimeoutError as exc:
            raise DockerError(f"RocketMQ in Docker does not serve after {_START_DEADLINE:g} s") from exc

    async def _is_registered(self) -> bool:
        try:
            return f"127.0.0.1:{self._broker_port}" in await broker_addresses(self.namesrv)
        except LinkError:
            return False


def _executable() -> str:
    return shutil.which("docker") or "docker"


async def _need_image(image: str, say: Say) -> None:
    try:
        await _docker("image", "inspect", "--format={{.Id}}", image)
    except DockerError:
        say(f"pulling {image}")
        await _docker("pull", image, seconds=_PULL_DEADLINE, say=say)


async def _docker(*arguments: str, seconds: float = _QUESTION_DEADLINE, say: Say = lambda _: None) -> str:
    """Run `docker ARGUMENTS`; return its output, each line of which `say` has shown.

    Raises:
        DockerError: exit code, or it took longer than `seconds`.
    """
    process = await asyncio.create_subprocess_exec(
        _executable(), *arguments, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, preexec_fn=die_with_parent
    )
    assert process.stdout is not None  # noqa: S101 - PIPE was asked for
    lines: list[str] = []
    try:
        async with asyncio.timeout(seconds):
            async for raw in process.stdout:
                lines.append(raw.decode(errors="replace").rstrip())
                say(f"  {lines[-1]}")
            exit_code = await process.wait()
    except TimeoutError as exc:
        raise DockerError(f"`docker {arguments[0]}` did not end within {seconds:g} s") from exc
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if exit_code != 0:
        raise DockerError(f"`docker {arguments[0]}` failed: {lines[-1] if lines else 'no output'}")
    return "\n".join(lines)
