"""An offline queue between a `MemoryHost` and a `MemoryStore`."""

import asyncio
import functools
import time
from typing import Self, TypedDict, Unpack

from mq2mqtt.host import Delivery, Outcome
from mq2mqtt.host.memory import MemoryClient, MemoryHost
from mq2mqtt.message import ClientEvent, ClientEventType, MqttMessage
from mq2mqtt.offline import OfflineQueue
from mq2mqtt.settings import OfflineSettings
from mq2mqtt.telemetry import Direction, RuleTelemetry, Telemetry
from tests import waiting
from tests.unit.offline.memory_store import MemoryStore

RULE = "commands-in"


class More(TypedDict, total=False):
    """What else can be said of a message."""

    expires_ms: int
    receipt: str


class World:
    """With `sees_acknowledgements` false the host is one like Mosquitto."""

    def __init__(self, store: MemoryStore | None = None, *, sees_acknowledgements: bool = True, **limits: int) -> None:
        self.store = store or MemoryStore()
        self.host = MemoryHost()
        self.host.sees_acknowledgements = sees_acknowledgements
        self.host.intake = self  # type: ignore[assignment]  # only client events come
        self.telemetry = Telemetry()
        self.rule = self.telemetry.add(RuleTelemetry(RULE, direction=Direction.DOWNLINK))
        self.receipts: list[tuple[Outcome, str, str, str]] = []
        self.queue = OfflineQueue(self.host, OfflineSettings(**limits), telemetry=self.telemetry, receipts=self)

    async def __aenter__(self) -> Self:
        await self.queue.start(self.store)  # type: ignore[arg-type]  # the queue uses `offline` and `problem`
        return self

    async def __aexit__(self, *_: object) -> None:
        self.assert_invariant()
        await self.queue.stop()

    def on_client_event(self, event: ClientEvent) -> None:
        if event.type is ClientEventType.CONNECT:
            self.queue.came(event.client_id, event.channel_id, clean_session=event.clean_session)
        else:
            self.queue.gone(event.client_id, event.channel_id)

    def tell(self, rule_id: str, outcome: Outcome, receipt: str, *, client_id: str, topic: str) -> None:
        assert rule_id == RULE
        self.receipts.append((outcome, receipt, client_id, topic))

    def connect(self, client_id: str, *, acknowledges: bool = True, clean: bool = False) -> MemoryClient:
        client = self.host.connect(client_id, clean_session=clean)
        client.acknowledges = acknowledges
        return client

    def hand(
        self, client_id: str, payload: bytes, *, qos: int = 1, clean: bool = False, **more: Unpack[More]
    ) -> list[Delivery]:
        """Hand a P2P message over; the result gets its outcome."""
        outcomes: list[Delivery] = []
        message = MqttMessage(f"devices/p2p/{client_id}", payload, qos, clean_session=clean)
        self.queue.hand(client_id, message, outcomes.append, rule_id=RULE, handed=nothing, **more)
        return outcomes

    async def keep(self, client_id: str, *payloads: bytes, **more: Unpack[More]) -> None:
        """Have messages kept for a client that is away."""
        results = [self.hand(client_id, payload, **more) for payload in payloads]
        await until(lambda: all(results))
        assert [result[0].outcome for result in results] == ["queued"] * len(payloads)

    @property
    def kept(self) -> list[bytes]:
        """What the store holds, oldest first."""
        return [self.store.rows[number].payload for number in sorted(self.store.rows)]

    def count(self, outcome: str) -> int:
        return self.telemetry.offline.outcomes[outcome]

    def assert_invariant(self) -> None:
        offline = self.telemetry.offline
        left = sum(offline.outcomes[name] for name in ("delivered", "expired", "evicted", "dropped"))
        assert offline.outcomes["stored"] == left + offline.messages


def payloads(client: MemoryClient) -> list[bytes]:
    return [message.payload for message in client.received]


def nothing() -> None:
    """Nobody measures."""


def now_ms() -> int:
    return time.time_ns() // 1_000_000


async def settle() -> None:
    """Let everything happen that waits for nothing but its turn."""
    for _ in range(50):
        await asyncio.sleep(0)


until = functools.partial(waiting.until, seconds=60)
