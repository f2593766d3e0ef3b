"""The offline queue: P2P messages and what persistent sessions missed, kept for clients that are away."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from mq2mqtt import expiry
from mq2mqtt.errors import UnstorableError
from mq2mqtt.host import Delivery, DropReason, MqttHost, Outcome, Settled
from mq2mqtt.message import MqttMessage
from mq2mqtt.offline.replay import AWAY, Replay
from mq2mqtt.offline.shelf import Receipts, Shelf
from mq2mqtt.offline.upkeep import Upkeep
from mq2mqtt.settings import OfflineSettings
from mq2mqtt.store import MessageKind, Store, StoredMessage
from mq2mqtt.telemetry import Telemetry

__all__ = ["OfflineQueue"]

_NOT_KEPT: Final = Delivery(Outcome.DROPPED, DropReason.NOT_PERSISTENT)
_QUEUED: Final = Delivery(Outcome.QUEUED)


class OfflineQueue:
    """Delivers now, or keeps for later and delivers then.

    Kept is what has QoS 1 or 2 and `clean_session` false, on hosts that see their clients. `came` and `gone` tell who
    is there. Nothing may be handed before `start`.
    """

    def __init__(self, host: MqttHost, settings: OfflineSettings, *, telemetry: Telemetry, receipts: Receipts) -> None:
        self._host = host
        self._receipts = receipts
        self._shelf = Shelf(settings, telemetry=telemetry, receipts=receipts)
        self._replay = Replay(self._shelf, host)
        self._upkeep = Upkeep(self._shelf)
        self._shelf.on_kept = self._kept_one
        self._store: Store | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.available = self._shelf.available
        self.came = self._replay.came
        """To be called with client id and channel id of each connection, and whether it is one with a clean session."""
        self.gone = self._replay.gone
        """To be called with client id and channel id of each connection that has ended."""

    async def start(self, store: Store) -> None:
        """Keep messages in `store`, and hand over what is in it.

        Raises:
            StoreError: it cannot be read.
        """
        await self._shelf.open(store.offline)
        self._store = store
        self._tasks = [
            asyncio.create_task(self._replay.run(), name="mq2mqtt.offline.replay"),
            asyncio.create_task(self._upkeep.run(), name="mq2mqtt.offline.upkeep"),
        ]

    @property
    def problem(self) -> str | None:
        """Why nothing can be kept, or brought out again, at the moment."""
        return None if self._store is None else self._store.problem

    def count(self, client_id: str) -> int:
        """Return how many messages are kept for a client."""
        return self._shelf.ledger.counts.get(client_id, 0)

    def hand(  # noqa: PLR0913 - a message and its circumstances
        self,
        client_id: str,
        message: MqttMessage,
        settled: Settled,
        *,
        rule_id: str,
        handed: Callable[[], None],
        expires_ms: int | None = None,
        receipt: str | None = None,
    ) -> None:
        """Deliver a P2P message, or keep it; `settled` is called exactly once, maybe before this returns.

        Args:
            client_id: whom it is for.
            message: what the client gets; QoS and `clean_session` say whether it is to be kept.
            settled: gets `delivered`, `queued` when it is in the store, `expired`, or why it is dropped.
            rule_id: whose message it is.
            handed: see `MqttHost`.
            expires_ms: when it is worth nothing any more, milliseconds since 1970.
            receipt: text for `Receipts`, where its sender asked for one.
        """
        now_ms = time.time_ns() // 1_000_000
        tell = (
            settled if receipt is None else partial(self._answer, settled, rule_id, receipt, client_id, message.topic)
        )
        if expiry.is_over(expires_ms, now_ms):
            tell(Delivery(Outcome.EXPIRED))
            return
        keeps = message.qos > 0 and not message.clean_session and self._host.sees_clients
        keep = partial(
            self._shelf.put,
            client_id,
            message,
            kind=MessageKind.P2P,
            rule_id=rule_id,
            expires_ms=expires_ms,
            receipt=receipt,
        )
        if keeps and not self._host.sees_acknowledgements:
            keep(partial(self._kept_first, settled, tell))
        elif self._host.is_online(client_id):
            done = partial(self._delivered_or_keep, keep, tell) if keeps else tell
            self._host.deliver(client_id, expiry.aged(message, expires_ms, now_ms), done, handed=handed)
        elif keeps:
            keep(partial(_kept, tell))
        else:
            tell(_NOT_KEPT)

    def missed(  # noqa: PLR0913 - a message and its circumstances
        self,
        client_id: str,
        message: MqttMessage,
        settled: Settled,
        *,
        rule_id: str,
        expires_ms: int | None = None,
        receipt: str | None = None,
    ) -> None:
        """Keep for a client's persistent session what it missed, with the QoS that it gets it with; see `hand`.

        Its sender gets a receipt for the message as a whole; here only for what becomes of it later.
        """
        self._shelf.put(
            client_id,
            message,
            partial(_kept, settled),
            kind=MessageKind.SESSION,
            rule_id=rule_id,
            expires_ms=expires_ms,
            receipt=receipt,
        )

    def _delivered_or_keep(
        self,
        keep: Callable[[Callable[[StoredMessage | UnstorableError], None]], None],
        tell: Settled,
        delivery: Delivery,
    ) -> None:
        if delivery.outcome is not Outcome.DELIVERED and (delivery.reason is None or delivery.reason in AWAY):
            keep(partial(_kept, tell))
        else:
            tell(delivery)

    def _kept_first(self, settled: Settled, tell: Settled, result: StoredMessage | UnstorableError) -> None:
        """It is in the store; hand it over at once if its client is there.

        Receipts are then told by what the connection does, not by what the host says.
        """
        if isinstance(result, UnstorableError) or not self._replay.hand_live(result, settled):
            _kept(tell, result)

    def _answer(  # noqa: PLR0913, PLR0917 - a message and its circumstances
        self, settled: Settled, rule_id: str, receipt: str, client_id: str, topic: str, delivery: Delivery
    ) -> None:
        self._receipts.tell(rule_id, delivery.outcome, receipt, client_id=client_id, topic=topic)
        settled(delivery)

    def _kept_one(self, client_id: str) -> None:
        self._upkeep.kept(client_id)
        self._replay.news(client_id)

    # -- the end --

    async def finish(self) -> None:
        """Hand nothing more over; return when it is known what became of what was handed over. Idempotent."""
        self._replay.finish()
        await self._replay.landed()

    async def stop(self) -> None:
        """Keep nothing more, and end all work. What is under way is handed over again after the next start."""
        self._replay.finish()
        self._replay.close()
        self._shelf.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []


def _kept(tell: Settled, result: StoredMessage | UnstorableError) -> None:
    if isinstance(result, UnstorableError):
        tell(Delivery(Outcome.DROPPED, DropReason.NOT_STORABLE))
    else:
        tell(_QUEUED)
