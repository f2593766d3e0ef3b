"""Which RocketMQ the quickstart uses: the one that is named, else one in Docker, else one on the JVM."""

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mq2mqtt.errors import LinkError
from mq2mqtt.quickstart.cluster import broker_addresses
from mq2mqtt.quickstart.docker import DockerError, RocketMQContainer, engine_answers
from mq2mqtt.quickstart.prerequisites import PrerequisiteError, Say
from mq2mqtt.quickstart.rocketmq import DEFAULT_VERSION, RocketMQ

__all__ = ["Server", "find_rocketmq"]

# Consumers' offsets are written each 5 s by default; an own server is killed, once they are written.
_BROKER_CONF = {"autoCreateTopicEnable": "false", "flushConsumerOffsetInterval": "1000"}
_OFFSETS_WRITTEN_AFTER = 1.5


class Server(Protocol):
    """A RocketMQ that can be used now."""

    @property
    def namesrv(self) -> str:
        """`HOST:PORT` of its name server."""

    async def stop(self) -> None:
        """End it, if it is ours."""


@dataclass(frozen=True)
class _GivenServer:
    namesrv: str

    async def stop(self) -> None:
        """Leave it to its owner."""


@dataclass(frozen=True)
class _OwnServer:
    server: RocketMQ | RocketMQContainer

    @property
    def namesrv(self) -> str:
        """`HOST:PORT` of its name server."""
        return self.server.namesrv

    async def stop(self) -> None:
        """Let the broker write what consumers committed just now, then kill it."""
        await asyncio.sleep(_OFFSETS_WRITTEN_AFTER)
        self.server.kill()


async def find_rocketmq(directory: Path, *, given: str | None, say: Say) -> Server:
    """Return a RocketMQ that serves; one that is started here keeps its files in `directory`.

    Raises:
        BridgeError: there is none; the text says what to do.
    """
    if given is not None:
        return await _reach(given, say)
    if await engine_answers():
        # Of this directory alone: quickstarts elsewhere have containers of their own.
        name = f"mq2mqtt-quickstart-{hashlib.sha256(str(directory).encode()).hexdigest()[:8]}"
        try:
            container = await RocketMQContainer.run(name, version=DEFAULT_VERSION, broker_conf=_BROKER_CONF, say=say)
        except DockerError as exc:
            say(f"  not with Docker ({exc})")
        else:
            return _OwnServer(container)
    return _OwnServer(await RocketMQ.on_jvm(directory, broker_conf=_BROKER_CONF, say=say))


async def _reach(address: str, say: Say) -> Server:
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise PrerequisiteError(f"--rocketmq {address}: write the name server as HOST:PORT")
    try:
        brokers = await broker_addresses(address)
    except LinkError as exc:
        raise PrerequisiteError(f"--rocketmq {address}: no name server of RocketMQ answers there ({exc})") from exc
    if not brokers:
        raise PrerequisiteError(f"--rocketmq {address}: no broker is registered at this name server")
    say(f"using RocketMQ at {address}, brokers {', '.join(brokers)}")
    return _GivenServer(address)
