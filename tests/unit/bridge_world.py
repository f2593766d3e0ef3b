"""A whole bridge between the in-process link and the in-process host, for the tests of its parts together."""

import functools
from pathlib import Path
from typing import Any, Self

import aiohttp

from mq2mqtt.bridge import Bridge
from mq2mqtt.host import LaneWriter, Subscriber
from mq2mqtt.host.memory import MemoryHost
from mq2mqtt.link.memory import MemoryCluster, MemoryLink
from mq2mqtt.message import MqttMessage, RocketMessage
from mq2mqtt.settings import Settings
from tests import waiting

OUT = {"id": "sensors-out", "type": "outbound", "source": "sensors", "target": "mq_sensors"}
IN = {"id": "commands-in", "type": "inbound", "source": "mq_commands", "target": "devices"}


class World:
    """A bridge, its host, and the RocketMQ behind it."""

    def __init__(  # noqa: PLR0913 - the parts that tests replace
        self,
        directory: Path,
        *rules: dict[str, Any],
        cluster: MemoryCluster | None = None,
        client_id: str = "bridge",
        writer: LaneWriter | None = None,
        subscriber: Subscriber | None = None,
        max_bytes: str = "32MiB",
        stop_deadline: float = 10,
    ) -> None:
        self._max_bytes = max_bytes
        self._stop_deadline = stop_deadline
        self.directory = directory
        self.cluster = cluster or MemoryCluster()
        self.host = MemoryHost()
        self.link = MemoryLink(cluster=self.cluster, client_id=client_id)
        self.bridge = Bridge(self.settings(*rules), self.host, link=self.link, writer=writer, subscriber=subscriber)
        self.host.intake = self.bridge.intake

    def settings(self, *rules: dict[str, Any]) -> Settings:
        return Settings.model_validate(
            {
                "node": "n1",
                "store": {"url": f"sqlite+aiosqlite:///{self.directory}.db"},
                "spool": {"path": self.directory, "max_bytes": self._max_bytes},
                "admin": {"listen": "127.0.0.1:0"},
                "stop_deadline": self._stop_deadline,
                "rules": list(rules),
            }
        )

    def reload(self, *rules: dict[str, Any]) -> None:
        self.bridge.reload(self.settings(*rules))

    def state(self, rule: str) -> str | None:
        telemetry = self.bridge.telemetry.rules.get(rule)
        return None if telemetry is None else str(telemetry.state)

    async def __aenter__(self) -> Self:
        for topic in ("mq_sensors", "mq_commands"):
            self.cluster.create_topic(topic, 1)
        await self.bridge.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.bridge.stop()

    def publish(self, topic: str, payload: bytes = b"x", *, qos: int = 1, client_id: str = "c1") -> None:
        route = self.bridge.intake.route(topic)
        assert route is not None
        message = MqttMessage(topic, payload, qos, client_id=client_id)
        assert self.bridge.intake.accept(route, message) is None
        if route.p2p_target is not None:
            self.bridge.intake.deliver_p2p(route, message)

    async def send(self, body: bytes, *, topic: str = "mq_commands", **properties: str) -> None:
        (queue,) = await self.link.queues(topic)
        await self.link.send(queue, [RocketMessage(topic, body, {"TAGS": "MQ2MQTT", **properties})])

    def count(self, rule: str, outcome: str) -> int:
        return self.bridge.telemetry.rules[rule].outcomes[outcome]

    def sent(self, topic: str = "mq_sensors") -> list[bytes]:
        return [message.body for message in self.cluster.queues(topic)[0]]

    async def get(self, path: str) -> tuple[int, str]:
        async with aiohttp.ClientSession() as session, session.get(self.bridge.admin.url + path) as response:
            return response.status, await response.text()


until = functools.partial(waiting.until, seconds=60)
