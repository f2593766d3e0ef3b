"""An `MqttHost` without a network: for tests and dry runs."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from mq2mqtt.host import Delivery, DropReason, Intake, Missed, Outcome, Settled
from mq2mqtt.message import ClientEvent, ClientEventType, MqttMessage
from mq2mqtt.topics import match

__all__ = ["MemoryClient", "MemoryHost"]


@dataclass
class MemoryClient:
    """A client of a `MemoryHost`. `received` grows as messages come.

    With `acknowledges` false it takes messages and acknowledges none; `MemoryHost.time_out` settles those.
    """

    client_id: str
    clean_session: bool = True
    acknowledges: bool = True
    subscriptions: dict[str, int] = field(default_factory=dict)
    received: list[MqttMessage] = field(default_factory=list)
    unsettled: list[Callable[[Delivery], None]] = field(default_factory=list)
    channel_id: str = ""


class MemoryHost:
    """Connects `MemoryClient`s. A client with cleanSession=false keeps its subscriptions while it is away."""

    def __init__(self) -> None:
        self.intake: Intake | None = None
        self.problem: str | None = None
        self.shows_topics = True
        self.sees_clients = True
        self.sees_acknowledgements = True
        self.hears_late = False
        self._reachable = asyncio.Event()
        self._reachable.set()
        self._clients: dict[str, MemoryClient] = {}
        self._away: dict[str, MemoryClient] = {}
        self._channels = 0

    @property
    def connected_clients(self) -> int:
        """How many clients are connected now."""
        return len(self._clients)

    def go_away(self, problem: str) -> None:
        """Be out of reach from now on."""
        self.problem = problem
        self._reachable.clear()

    def come_back(self) -> None:
        """Be in reach again."""
        self.problem = None
        self._reachable.set()

    async def available(self) -> None:
        """See `mq2mqtt.host.MqttHost.available`."""
        await self._reachable.wait()

    def connect(self, client_id: str, *, clean_session: bool = True) -> MemoryClient:
        """Connect a client; the one with its client id, if there is one, is closed first."""
        self.disconnect(client_id)
        client = MemoryClient(client_id, clean_session=clean_session)
        stored = self._away.pop(client_id, None)
        if stored is not None and not clean_session:
            client.subscriptions = stored.subscriptions
        self._channels += 1
        client.channel_id = f"{self._channels:032x}"
        self._clients[client_id] = client
        self._tell(client, ClientEventType.CONNECT)
        return client

    def disconnect(self, client_id: str) -> None:
        """Close the client's connection, if it has one."""
        client = self._clients.pop(client_id, None)
        if client is None:
            return
        if not client.clean_session:
            self._away[client_id] = client
        self._settle(client, DropReason.DISCONNECTED)
        self._tell(client, ClientEventType.TCPCLEAN)

    async def kick(self, client_id: str) -> None:
        """See `disconnect`."""
        self.disconnect(client_id)

    def time_out(self, client_id: str) -> None:
        """Let `DELIVERY_TIMEOUT` pass for what the client has not acknowledged."""
        self._settle(self._clients[client_id], DropReason.SLOW_DEVICE)

    def is_online(self, client_id: str) -> bool:
        """Whether `client_id` has a live connection."""
        return client_id in self._clients

    def publish(
        self,
        message: MqttMessage,
        settled: Settled,
        *,
        shown_topic: str | None = None,
        handed: Callable[[], None],
        missed: Missed | None = None,
    ) -> None:
        """See `mq2mqtt.host.MqttHost.publish`."""
        outcomes = _Outcomes(settled)
        for client in (*self._clients.values(), *self._away.values()):
            granted = max(
                (qos for name, qos in client.subscriptions.items() if match(name, message.topic)), default=None
            )
            if granted is None:
                continue
            qos = min(message.qos, granted)
            receiver = outcomes.receiver()
            if missed is not None and qos and not client.clean_session:
                receiver = _keeping(client.client_id, qos, receiver, missed)
            if client.client_id in self._clients:
                self._hand(client, shown_topic or message.topic, message, qos, receiver, handed)
            elif qos:
                receiver(Delivery(Outcome.DROPPED, DropReason.NOT_PERSISTENT))
            else:
                receiver(Delivery(Outcome.NO_SUBSCRIBER))
        outcomes.complete()

    def deliver(self, client_id: str, message: MqttMessage, settled: Settled, *, handed: Callable[[], None]) -> None:
        """See `mq2mqtt.host.MqttHost.deliver`."""
        client = self._clients.get(client_id)
        if client is None:
            settled(Delivery(Outcome.DROPPED, DropReason.NOT_PERSISTENT))
        else:
            self._hand(client, message.topic, message, message.qos, settled, handed)

    def _hand(  # noqa: PLR0913, PLR0917 - one receiver of one message
        self,
        client: MemoryClient,
        topic: str,
        message: MqttMessage,
        qos: int,
        settled: Settled,
        handed: Callable[[], None],
    ) -> None:
        client.received.append(MqttMessage(topic, message.payload, qos, properties=message.properties))
        handed()
        if qos == 0 or client.acknowledges:
            settled(Delivery(Outcome.DELIVERED))
        else:
            client.unsettled.append(settled)

    def _settle(self, client: MemoryClient, reason: DropReason) -> None:
        waiting, client.unsettled = client.unsettled, []
        for settled in waiting:
            settled(Delivery(Outcome.DROPPED, reason))

    def _tell(self, client: MemoryClient, kind: ClientEventType) -> None:
        if self.intake is not None:
            self.intake.on_client_event(
                ClientEvent(kind, client.client_id, client.channel_id, "127.0.0.1:0", 0, client.clean_session)
            )


def _keeping(client_id: str, qos: int, settled: Settled, missed: Missed) -> Settled:
    """Return what settles a receiver whose session keeps what it misses."""

    def keep(delivery: Delivery) -> None:
        if delivery.outcome is Outcome.DROPPED:
            missed(client_id, qos, settled)
        else:
            settled(delivery)

    return keep


class _Outcomes:
    """The best outcome of the receivers of one message, told once all of them have settled."""

    def __init__(self, settled: Settled) -> None:
        self._settled = settled
        self._best = Delivery(Outcome.NO_SUBSCRIBER)
        self._open = 1  # `complete` is the last

    def receiver(self) -> Settled:
        self._open += 1
        return self._done

    def complete(self) -> None:
        self._done(self._best)

    def _done(self, delivery: Delivery) -> None:
        order = list(Outcome)
        if order.index(delivery.outcome) < order.index(self._best.outcome):
            self._best = delivery
        self._open -= 1
        if not self._open:
            self._settled(self._best)
