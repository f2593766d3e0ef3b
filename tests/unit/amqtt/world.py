"""An amqtt broker in the test's own loop, with the bridge's host in it and lanes that are lists."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from amqtt.broker import Broker

from mq2mqtt.host import Delivery, Outcome, Settled, TopicRoute
from mq2mqtt.message import ClientEvent, MqttMessage
from mq2mqtt.store import SubscriptionStore
from mq2mqtt.topics import p2p_address
from mq2mqtt_amqtt.host import AmqttHost
from tests.certificates import Certificate
from tests.mqtt_client import SECONDS, Client

AUTH = "mq2mqtt_amqtt.AuthPlugin"


class ListIntake:
    """An `Intake` with one lane for each parent topic that begins with `lane`; a full lane keeps publishes waiting."""

    def __init__(self) -> None:
        self.lanes: dict[str, list[MqttMessage]] = {}
        self.full: set[str] = set()
        self.waiting: list[tuple[MqttMessage, asyncio.Future[None]]] = []
        self.wills: list[MqttMessage] = []
        self.private: list[tuple[str | None, MqttMessage]] = []
        self.relay_is_full = False
        self.unkept: list[tuple[str | None, MqttMessage, asyncio.Future[None]]] = []
        self.events: list[ClientEvent] = []
        self.max_payload: int | None = None

    def route(self, topic: str) -> TopicRoute | None:
        parent = topic.partition("/")[0]
        if not parent.startswith(("lane", "into")):
            return None
        outbound = parent if parent.startswith("lane") else None
        address = p2p_address(topic)
        if address is not None:
            return TopicRoute(outbound, address.client_id, parent)
        return TopicRoute(outbound) if outbound else None

    def over_limit(self, topic: str, payload_bytes: int) -> bool:  # noqa: ARG002 - the interface's
        return self.max_payload is not None and payload_bytes > self.max_payload

    def accept(self, route: TopicRoute, message: MqttMessage, *, will: bool = False) -> Awaitable[None] | None:
        assert route.outbound is not None
        if will:
            self.wills.append(message)
        if route.outbound not in self.full:
            self.lane(route.outbound).append(message)
            return None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((message, future))
        return future

    def lane(self, name: str) -> list[MqttMessage]:
        return self.lanes.setdefault(name, [])

    def make_space(self) -> None:
        """Take what waits, as a lane does that has been read."""
        self.full.clear()
        waiting, self.waiting = self.waiting, []
        for message, future in waiting:
            if not future.done():
                self.lane(message.topic.partition("/")[0]).append(message)
                future.set_result(None)

    def deliver_p2p(self, route: TopicRoute, message: MqttMessage) -> Awaitable[None] | None:
        if not self.relay_is_full:
            self.private.append((route.p2p_target, message))
            return None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.unkept.append((route.p2p_target, message, future))
        return future

    def keep_private(self) -> None:
        """Take the P2P messages that wait to be kept."""
        self.relay_is_full = False
        unkept, self.unkept = self.unkept, []
        for target, message, future in unkept:
            if not future.done():
                self.private.append((target, message))
                future.set_result(None)

    def on_client_event(self, event: ClientEvent) -> None:
        self.events.append(event)

    def told(self, client_id: str) -> list[str]:
        """Types of the events of a client."""
        return [event.type.value for event in self.events if event.client_id == client_id]


class World:
    """The broker, its host, its intake."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.host = AmqttHost(broker)
        self.intake = ListIntake()
        self.host.intake = self.intake
        self.clients: list[Client] = []
        self._stopped = False

    @classmethod
    async def start(
        cls,
        *,
        plugins: dict[str, Any] | None = None,
        listener: str = "tcp",
        tls: Certificate | None = None,
        subscriptions: SubscriptionStore | None = None,
        **config: Any,  # noqa: ANN401 - amqtt's
    ) -> "World":
        chosen = {AUTH: {"allow_anonymous": True}} if plugins is None else plugins
        default: dict[str, Any] = {"type": listener, "bind": "127.0.0.1:0"}
        if tls is not None:
            default |= {"ssl": True, "certfile": str(tls.certificate), "keyfile": str(tls.key)}
        world = cls(Broker({"listeners": {"default": default}, "plugins": chosen, **config}))
        await world.broker.start()
        if subscriptions is not None:
            await world.host.restore(subscriptions)
        return world

    @property
    def port(self) -> int:
        port: int = self._server.instance.sockets[0].getsockname()[1]
        return port

    @property
    def open_connections(self) -> int:
        """As amqtt counts them."""
        count: int = self._server.conn_count
        return count

    @property
    def _server(self) -> Any:  # noqa: ANN401 - asyncio's or websockets'
        return self.broker._servers["default"]  # noqa: SLF001

    def buffered(self, client_id: str) -> int:
        """Bytes in the write buffer of a client's connection."""
        return self.host._lifecycle.online[client_id].wire.buffered  # noqa: SLF001

    async def client(self, client_id: str, **options: Any) -> Client:  # noqa: ANN401 - those of Client.connect
        client = await Client.connect(self.port, client_id, **options)
        self.clients.append(client)
        return client

    async def stop(self) -> None:
        """Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        for client in self.clients:
            await client.drop()
        await self.host.close()
        await self.broker.shutdown()

    def publish(self, topic: str, payload: bytes = b"x", *, qos: int = 1, shown: str | None = None) -> "Receipt":
        receipt = Receipt()
        message = MqttMessage(topic, payload, qos)
        self.host.publish(message, receipt.settled, shown_topic=shown, handed=receipt.hand, missed=receipt.miss)
        return receipt

    def deliver(self, client_id: str, topic: str, payload: bytes = b"x", *, qos: int = 1) -> "Receipt":
        receipt = Receipt()
        self.host.deliver(client_id, MqttMessage(topic, payload, qos), receipt.settled, handed=receipt.hand)
        return receipt


class Receipt:
    """What the host said about one message."""

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.handed = 0
        self.missed: list[tuple[str, int]] = []

    def settled(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)

    def hand(self) -> None:
        self.handed += 1

    def miss(self, client_id: str, qos: int, settled: Settled) -> None:
        self.missed.append((client_id, qos))
        settled(Delivery(Outcome.QUEUED))

    async def outcome(self) -> tuple[str, str | None]:
        """Wait until it is settled, which happens once."""
        await until(lambda: bool(self.deliveries))
        assert len(self.deliveries) == 1
        delivery = self.deliveries[0]
        return delivery.outcome.value, delivery.reason.value if delivery.reason else None


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that no packet announces."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)
