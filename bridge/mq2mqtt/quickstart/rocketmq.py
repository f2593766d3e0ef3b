"""A real RocketMQ, name server and broker, on a plain JVM: for the first steps of a user and for tests."""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from mq2mqtt.errors import BridgeError, LinkError
from mq2mqtt.quickstart.cluster import OPEN, Access, ask, broker_addresses, create_topic
from mq2mqtt.quickstart.jars import rocketmq_jars
from mq2mqtt.quickstart.ports import free_base, free_port
from mq2mqtt.quickstart.prerequisites import Say, require_java
from mq2mqtt.quickstart.process import Child

__all__ = [
    "DEFAULT_VERSION",
    "QUIET_BROKER",
    "START_FAST",
    "RocketMQ",
    "RocketMQStartError",
    "class_path",
    "java_options",
    "keep_starting",
]

DEFAULT_VERSION = "5.3.3"

_UPDATE_BROKER_CONFIG = 25
_GET_BROKER_CONFIG = 26
_START_DEADLINE = 120.0
_POLL_INTERVAL = 0.1
# For what a server that starts may end, and not the next time: a network interface went just then, as containers' do;
# the proxy did not find its own topic within 3 s.
_PASSING = ("NetworkUtil.getLocalAddress", "RemotingUtil.getLocalAddress", "create system broadcast topic")

# The broker listens on its own port N, on N - 2 (the VIP channel) and on N + 1 (replication).
_BROKER_PORT_OFFSETS = (-2, 0, 1)

START_FAST = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-Dtls.server.mode=disabled")
"""For what runs for minutes: both are up after 4 s of CPU, not 10; for TLS that nobody asked for they make keys.

What is measured takes the JVM's own way.
"""
QUIET_BROKER = {
    # It compares 38 MB of timers byte by byte, by default each second: 15 % of a core.
    "timerFlushIntervalMs": "600000",
    # It spins for that long after its start: 3 s by default.
    "transactionMetricFlushInterval": "300",
}
"""Lines of `broker.conf` that cost less CPU where others need it."""
_JVM_FLAGS = (
    "--add-exports=java.base/sun.nio.ch=ALL-UNNAMED",
    "--add-opens=java.base/java.nio=ALL-UNNAMED",
    "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
    "--add-opens=java.base/java.lang=ALL-UNNAMED",
    # Without it 4.9.7 does not come back on its store after kill -9.
    "--add-opens=java.base/jdk.internal.ref=ALL-UNNAMED",
    # By default a broker refuses messages on a disk that is 90 % full, as many a laptop's is.
    "-Drocketmq.broker.diskSpaceWarningLevelRatio=0.99",
    "-Drocketmq.broker.diskSpaceCleanForciblyRatio=0.98",
)
_NAMESRV_MEMORY = ("-Xms64m", "-Xmx256m")
_BROKER_MEMORY = ("-Xms256m", "-Xmx1g", "-XX:MaxDirectMemorySize=1g")

_BROKER_CONF = {
    "brokerClusterName": "DefaultCluster",
    "brokerName": "broker-a",
    "brokerIP1": "127.0.0.1",
    "autoCreateTopicEnable": "false",
    "autoCreateSubscriptionGroup": "true",
    # 1 GB files by default.
    "mappedFileSizeCommitLog": str(128 << 20),
    # How soon a name server that came back knows the broker again; 10 s is the least it takes.
    "registerNameServerPeriod": "10000",
    # 200 ms by default, which a small machine under load exceeds: sends would fail as "broker busy".
    "waitTimeMillsInSendQueue": "3000",
    **QUIET_BROKER,
}


# 4.x reads its log settings from files of its distribution and does not start without; 5.x ignores them.
_LOGBACK = """<configuration>
  <appender name="out" class="ch.qos.logback.core.ConsoleAppender">
    <encoder><pattern>%d %p %t - %m%n</pattern></encoder>
  </appender>
  <root level="WARN"><appender-ref ref="out"/></root>
</configuration>
"""


def class_path(jars: Path) -> str:
    """Return the class path of all jars in the directory `jars`."""
    return f"{jars}{os.sep}*"


def java_options(flags: Sequence[str], properties: Mapping[str, str]) -> list[str]:
    """Return the options of a JVM that RocketMQ runs on: what it needs, `flags`, system `properties`."""
    return [*_JVM_FLAGS, *flags, *(f"-D{name}={value}" for name, value in properties.items())]


def keep_starting(child: Child, name: str) -> None:
    """See that a server which does not serve yet runs: one that ended for a reason that passes is started again.

    Raises:
        RocketMQStartError: it ended for another.
    """
    if child.exit_code is not None:
        said = child.tail()
        if not any(reason in said for reason in _PASSING):
            raise RocketMQStartError(f"{name} ended with exit code {child.exit_code}: {said}")
        child.start_again()


class RocketMQStartError(BridgeError):
    """RocketMQ did not come up; the text ends with its last words."""


class RocketMQ:
    """One name server and one broker on this machine.

    Everything they write is in `directory` (store, logs, configuration), so one that is started again there has its
    messages. They are killed with the process that started them. Methods may be called from any event loop.
    """

    def __init__(  # noqa: PLR0913 - keyword-only, each a thing of its own
        self,
        directory: Path,
        *,
        version: str,
        jars: Path,
        broker_conf: Mapping[str, str],
        java_properties: Mapping[str, str],
        java_flags: Sequence[str],
        access: Access,
    ) -> None:
        self.directory = directory.absolute()
        (self.directory / "conf").mkdir(parents=True, exist_ok=True)
        for program in ("namesrv", "broker"):
            (self.directory / "conf" / f"logback_{program}.xml").write_text(_LOGBACK)
        self.version = version
        self.jars = jars
        """Directory of jars; `DIRECTORY/*` is a class path for RocketMQ's tools and Java client too."""
        self.namesrv = f"127.0.0.1:{free_port()}"
        self.broker_address = f"127.0.0.1:{free_base(_BROKER_PORT_OFFSETS)}"
        self._broker_conf = broker_conf
        self._java_options = java_options(java_flags, java_properties)
        self._access = access
        self._namesrv: Child | None = None
        self._broker: Child | None = None

    @classmethod
    async def on_jvm(  # noqa: PLR0913 - keyword-only, each a thing of its own
        cls,
        directory: Path,
        *,
        version: str = DEFAULT_VERSION,
        broker_conf: Mapping[str, str] | None = None,
        java_properties: Mapping[str, str] | None = None,
        java_flags: Sequence[str] = START_FAST,
        access: Access = OPEN,
        say: Say = lambda _: None,
    ) -> Self:
        """Start a name server and a broker on free ports and wait until they serve.

        Args:
            directory: where they keep everything; also `ROCKETMQ_HOME`, so `conf/plain_acl.yml` goes below it.
            version: of RocketMQ, as Maven knows it.
            broker_conf: lines of `broker.conf` beside, or instead of, this module's own.
            java_properties: of both JVMs, such as `tls.server.mode`.
            java_flags: of both JVMs, beside those without which RocketMQ does not run.
            access: how this launcher is let in, where those settings ask for something.
            say: shows progress.

        Raises:
            PrerequisiteError: Java or Maven is missing, or the jars cannot be fetched.
            RocketMQStartError: a process ended early or did not serve in time.
        """
        await require_java(say)
        jars = await rocketmq_jars(version, say)
        server = cls(
            directory,
            version=version,
            jars=jars,
            broker_conf=broker_conf or {},
            java_properties=java_properties or {},
            java_flags=java_flags,
            access=access,
        )
        try:
            say(f"starting RocketMQ {version} on the JVM: name server {server.namesrv}")
            await server.start_namesrv()
            say(f"starting RocketMQ {version} on the JVM: broker {server.broker_address}")
            await server.start_broker()
        except BaseException:
            server.kill()
            raise
        return server

    async def start_namesrv(self) -> None:
        """Start the name server (again) and wait until it answers.

        Brokers that run already register with it within 10 s: `wait_registered`.
        """
        port = self.namesrv.rpartition(":")[2]
        conf = self._write_conf("namesrv.conf", {"listenPort": port})
        self._namesrv = self._java("org.apache.rocketmq.namesrv.NamesrvStartup", conf, memory=_NAMESRV_MEMORY)
        await self._wait(self._namesrv, self._namesrv_answers)

    async def start_broker(self) -> None:
        """Start the broker (again, on the same store) and wait until it is registered and answers."""
        store = self.directory / "store"
        conf = self._write_conf(
            "broker.conf",
            _BROKER_CONF
            | {
                "namesrvAddr": self.namesrv,
                "listenPort": self.broker_address.rpartition(":")[2],
                "storePathRootDir": str(store),
                "storePathCommitLog": str(store / "commitlog"),
            }
            | dict(self._broker_conf),
        )
        self._broker = self._java("org.apache.rocketmq.broker.BrokerStartup", conf, memory=_BROKER_MEMORY)
        await self.wait_registered()

    async def wait_registered(self) -> None:
        """Wait until the name server lists the broker, with its topics, and the broker answers requests."""
        await self._wait(self._running_broker, self._broker_serves)

    async def create_topic(self, topic: str, *, queues: int = 4) -> None:
        """Create `topic` and wait until it has a route; raises `LinkError`."""
        await create_topic(self.namesrv, topic, queues=queues, access=self._access)

    def kill_broker(self) -> None:
        """End the broker with SIGKILL; the store stays as it is."""
        self._running_broker.kill()

    def kill_namesrv(self) -> None:
        """End the name server with SIGKILL."""
        if self._namesrv is not None:
            self._namesrv.kill()

    def pause_broker(self) -> None:
        """Freeze the broker: connections stay open, nothing answers."""
        self._running_broker.pause()

    def resume_broker(self) -> None:
        """Let a paused broker go on."""
        self._running_broker.resume()

    def kill(self) -> None:
        """End both with SIGKILL, the only way to end them. Idempotent.

        On SIGTERM the broker of 5.3.3 takes 17 s (measured). Killed, it loses no message: they are in the system's
        page cache, and it reads them again at the next start.
        """
        for child in (self._broker, self._namesrv):
            if child is not None:
                child.kill()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the name server and the broker, those that were started."""
        return tuple(child.pid for child in (self._namesrv, self._broker) if child is not None)

    @property
    def _running_broker(self) -> Child:
        if self._broker is None:
            raise RocketMQStartError("the broker was never started")
        return self._broker

    def _write_conf(self, name: str, lines: Mapping[str, str]) -> Path:
        path = self.directory / name
        path.write_text("".join(f"{key}={value}\n" for key, value in lines.items()))
        return path

    def _java(self, main: str, conf: Path, *, memory: tuple[str, ...]) -> Child:
        return Child(
            [
                shutil.which("java") or "java",
                *memory,
                *self._java_options,
                # RocketMQ writes its logs, and the name server its settings, below the user's home directory.
                f"-Duser.home={self.directory}",
                "-cp",
                class_path(self.jars),
                main,
                "-c",
                str(conf),
            ],
            output=conf.with_suffix(".out"),
            cwd=self.directory,
            env={"ROCKETMQ_HOME": str(self.directory)},
        )

    async def _wait(self, child: Child, ready: Callable[[], Awaitable[None]]) -> None:
        deadline = asyncio.get_running_loop().time() + _START_DEADLINE
        problem = "no answer yet"
        while asyncio.get_running_loop().time() < deadline:
            keep_starting(child, "RocketMQ")
            try:
                await ready()
            except LinkError as exc:
                problem = str(exc)
            else:
                return
            await asyncio.sleep(_POLL_INTERVAL)
        raise RocketMQStartError(f"RocketMQ does not serve after {_START_DEADLINE:g} s: {problem}; {child.tail()}")

    async def _namesrv_answers(self) -> None:
        await broker_addresses(self.namesrv, access=self._access)

    async def _broker_serves(self) -> None:
        registered = self.broker_address in await broker_addresses(self.namesrv, access=self._access)
        # Any answer will do: who has access may still not be allowed this.
        await ask(self.broker_address, _GET_BROKER_CONFIG, access=self._access)
        if not registered:
            # A broker that starts fast registers before its client has found a name server, and again after 10 s only.
            # That its permission is set makes it do so at once.
            permission = f"brokerPermission={self._broker_conf.get('brokerPermission', 6)}".encode()
            await ask(self.broker_address, _UPDATE_BROKER_CONFIG, body=permission, access=self._access)
            raise LinkError(f"the broker {self.broker_address} is not registered at {self.namesrv}")
