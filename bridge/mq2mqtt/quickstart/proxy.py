"""RocketMQ 5's proxy on a plain JVM, beside a name server and a broker: what gRPC clients talk to."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from mq2mqtt.quickstart.cluster import OPEN, Access, create_topic
from mq2mqtt.quickstart.ports import free_ports
from mq2mqtt.quickstart.process import Child
from mq2mqtt.quickstart.rocketmq import START_FAST, RocketMQStartError, class_path, java_options, keep_starting

__all__ = ["Proxy"]

_START_DEADLINE = 120.0
_POLL_INTERVAL = 0.1
_MEMORY = ("-Xms64m", "-Xmx512m", "-XX:MaxDirectMemorySize=512m")

_OWN_TOPIC = "DefaultHeartBeatSyncerTopic"

_CONF = {
    "proxyMode": "CLUSTER",
    "rocketMQClusterName": "DefaultCluster",
    # What it was told about a topic or group, or that there is none, it believes this long; 20 s by default.
    "topicRouteServiceCacheRefreshSeconds": 1,
    "topicConfigCacheRefreshSeconds": 1,
    "subscriptionGroupConfigCacheRefreshSeconds": 1,
    # How long a client waits at least for messages, and so for its end; 5 s by default.
    "grpcClientConsumerMinLongPollingTimeoutMillis": 1000,
    "enablePrintJstack": False,
}


class Proxy:
    """One proxy in cluster mode. It keeps nothing: killed and started again it is as before.

    It is killed with the process that started it. Methods may be called from any event loop.
    """

    def __init__(  # noqa: PLR0913 - keyword-only, each a thing of its own
        self,
        directory: Path,
        *,
        namesrv: str,
        jars: Path,
        conf: Mapping[str, object],
        java_properties: Mapping[str, str],
        java_flags: Sequence[str],
    ) -> None:
        self._directory = directory.absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        port, remoting_port = free_ports(2)
        self.address = f"127.0.0.1:{port}"
        """`HOST:PORT` for gRPC."""
        self._jars = jars
        self._java_options = java_options(java_flags, java_properties)
        settings = _CONF | {"namesrvAddr": namesrv, "grpcServerPort": port, "remotingListenPort": remoting_port}
        self._conf = self._directory / "rmq-proxy.json"
        self._conf.write_text(json.dumps(settings | dict(conf), indent=2))
        self._child: Child | None = None

    @classmethod
    async def on_jvm(  # noqa: PLR0913 - keyword-only, each a thing of its own
        cls,
        directory: Path,
        *,
        namesrv: str,
        jars: Path,
        conf: Mapping[str, object] | None = None,
        java_properties: Mapping[str, str] | None = None,
        java_flags: Sequence[str] = START_FAST,
        access: Access = OPEN,
    ) -> Self:
        """Start a proxy on free ports and wait until it serves.

        Args:
            directory: where it keeps its configuration and logs.
            namesrv: name server of the cluster, which has a broker already.
            jars: directory of RocketMQ's jars, 5.x.
            conf: fields of `rmq-proxy.json` beside, or instead of, this module's own.
            java_properties: of its JVM, such as `tls.server.mode`.
            java_flags: of its JVM, beside those without which RocketMQ does not run.
            access: how this launcher is let in by name server and broker, where they ask for something.

        Raises:
            LinkError: the broker does not make the topic that it needs.
            RocketMQStartError: it ended early or did not serve in time.
        """
        # It would make it itself, but ends when that takes more than 3 s.
        await create_topic(namesrv, _OWN_TOPIC, queues=1, access=access)
        proxy = cls(
            directory,
            namesrv=namesrv,
            jars=jars,
            conf=conf or {},
            java_properties=java_properties or {},
            java_flags=java_flags,
        )
        try:
            await proxy.start()
        except BaseException:
            proxy.kill()
            raise
        return proxy

    async def start(self) -> None:
        """Start it (again, at the same address) and wait until it serves.

        Raises:
            RocketMQStartError: it ended early or did not serve in time.
        """
        self._child = Child(
            [
                shutil.which("java") or "java",
                *_MEMORY,
                *self._java_options,
                # It writes its logs below the user's home directory.
                f"-Duser.home={self._directory}",
                "-cp",
                class_path(self._jars),
                "org.apache.rocketmq.proxy.ProxyStartup",
                "-pc",
                str(self._conf),
            ],
            output=self._directory / "proxy.out",
            cwd=self._directory,
            env={"RMQ_PROXY_HOME": str(self._directory), "ROCKETMQ_HOME": str(self._directory)},
        )
        deadline = asyncio.get_running_loop().time() + _START_DEADLINE
        while not await self._listens():
            if asyncio.get_running_loop().time() > deadline:
                raise RocketMQStartError(f"the proxy does not serve after {_START_DEADLINE:g} s; {self._child.tail()}")
            keep_starting(self._child, "the proxy")
            await asyncio.sleep(_POLL_INTERVAL)

    async def _listens(self) -> bool:
        host, _, port = self.address.rpartition(":")
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True

    def kill(self) -> None:
        """End it with SIGKILL. Idempotent."""
        if self._child is not None:
            self._child.kill()

    @property
    def has_ended(self) -> bool:
        """Whether it was killed or ended by itself."""
        return self._running.exit_code is not None

    def pause(self) -> None:
        """Freeze it: connections stay open, nothing answers."""
        self._running.pause()

    def resume(self) -> None:
        """Let a paused one go on."""
        self._running.resume()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._running.pid

    @property
    def _running(self) -> Child:
        if self._child is None:
            raise RocketMQStartError("the proxy was never started")
        return self._child
