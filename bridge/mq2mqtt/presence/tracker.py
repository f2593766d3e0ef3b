"""For the programs behind RocketMQ: who is online, from the messages of a status rule, in whatever order they come."""

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mq2mqtt.errors import MalformedEventError
from mq2mqtt.message import ClientEventType

__all__ = ["StatusTracker"]


@dataclass(frozen=True, slots=True)
class _Event:
    """What is read of a body. `seq` is `None` where another broker than this bridge made it."""

    type: ClientEventType
    client_id: str
    channel_id: str
    seq: int | None
    epoch: int
    node: str


@dataclass(frozen=True, slots=True)
class _Latest:
    """What the event with the highest `seq` says of a client at a node."""

    seq: int
    channel_id: str
    connected: bool


class _Tombstones:
    """Remembers what is over, so that an event that comes late does not bring it back."""

    def __init__(self, *, count: int, seconds: float, clock: Callable[[], float]) -> None:
        self._count = count
        self._seconds = seconds
        self._clock = clock
        # Oldest first; bounded by `_count`.
        self._since: OrderedDict[tuple[str, str], float] = OrderedDict()

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._since

    def add(self, key: tuple[str, str]) -> list[tuple[str, str]]:
        """Remember `key`; return what is forgotten for that."""
        now = self._clock()
        self._since[key] = now
        self._since.move_to_end(key)
        forgotten = []
        while self._since:
            oldest, since = next(iter(self._since.items()))
            if len(self._since) <= self._count and now - since <= self._seconds:
                break
            del self._since[oldest]
            forgotten.append(oldest)
        return forgotten

    def remove(self, key: tuple[str, str]) -> None:
        self._since.pop(key, None)


class StatusTracker:
    """Who is online, by the messages of status rules.

    The order and the number of times in which they are fed makes no difference. Of this bridge's own messages, the
    `connect` or `tcpclean` with the highest `seq` of a client counts, for each `node`; a connection of before the
    node's latest `epoch` is over, whether its `tcpclean` has come or not. Of messages without `seq` (ApsaraMQ's), a
    channel is open from its `connect` to its `tcpclean`. `disconnect` never decides.

    What is over is remembered for `tombstone_seconds` and for `tombstones` clients and channels at most: an event that
    comes later than that counts as new.
    """

    def __init__(
        self,
        *,
        tombstones: int = 100_000,
        tombstone_seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._epochs: dict[str, int] = {}
        self._latest: dict[str, dict[str, _Latest]] = {}
        self._over = _Tombstones(count=tombstones, seconds=tombstone_seconds, clock=clock)
        self._channels: dict[str, set[str]] = {}
        self._closed = _Tombstones(count=tombstones, seconds=tombstone_seconds, clock=clock)

    @property
    def online(self) -> frozenset[str]:
        """The client ids that are online."""
        connected = {
            client_id for clients in self._latest.values() for client_id, latest in clients.items() if latest.connected
        }
        return frozenset(connected.union(self._channels))

    def is_online(self, client_id: str) -> bool:
        """Whether a client is online."""
        return bool(self.channels(client_id))

    def channels(self, client_id: str) -> frozenset[str]:
        """Return the ids of a client's connections: none, one, or several where several brokers tell of it."""
        found = {
            latest.channel_id
            for clients in self._latest.values()
            if (latest := clients.get(client_id)) is not None and latest.connected
        }
        return frozenset(found.union(self._channels.get(client_id, ())))

    def feed(self, body: bytes | str | Mapping[str, Any]) -> None:
        """Take one message: its body, or what its JSON says.

        Raises:
            MalformedEventError: it is no body of a status message. Nothing has changed.
        """
        event = _read(body)
        if event.seq is None:
            self._feed_channel(event)
            return
        if event.epoch > self._epochs.get(event.node, -1):
            self._begin(event.node, event.epoch)
        if event.type is not ClientEventType.DISCONNECT:
            self._feed_latest(event, event.seq)

    def _begin(self, node: str, epoch: int) -> None:
        """The broker at `node` began a new life: what was connected before is over."""
        self._epochs[node] = epoch
        for client_id, latest in list(self._latest.get(node, {}).items()):
            if latest.connected and latest.seq < epoch:
                self._put(node, client_id, _Latest(latest.seq, latest.channel_id, connected=False))

    def _feed_latest(self, event: _Event, seq: int) -> None:
        known = self._latest.get(event.node, {}).get(event.client_id)
        if known is None or seq > known.seq:
            connected = event.type is ClientEventType.CONNECT and seq >= self._epochs[event.node]
            self._put(event.node, event.client_id, _Latest(seq, event.channel_id, connected=connected))

    def _put(self, node: str, client_id: str, latest: _Latest) -> None:
        self._latest.setdefault(node, {})[client_id] = latest
        if latest.connected:
            self._over.remove((node, client_id))
            return
        for old_node, old_client in self._over.add((node, client_id)):
            self._latest[old_node].pop(old_client, None)

    def _feed_channel(self, event: _Event) -> None:
        key = event.client_id, event.channel_id
        if event.type is ClientEventType.CONNECT and key not in self._closed:
            self._channels.setdefault(event.client_id, set()).add(event.channel_id)
        elif event.type is ClientEventType.TCPCLEAN:
            self._closed.add(key)
            if (channels := self._channels.get(event.client_id)) is not None:
                channels.discard(event.channel_id)
                if not channels:
                    del self._channels[event.client_id]


def _read(body: bytes | str | Mapping[str, Any]) -> _Event:
    try:
        fields = body if isinstance(body, Mapping) else json.loads(body)
        event = _Event(
            ClientEventType(fields["eventType"]),
            fields["clientId"],
            fields["channelId"],
            fields.get("seq"),
            fields.get("epoch", 0),
            fields.get("node", ""),
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise MalformedEventError(f"no client event: {error}") from error
    texts = (event.client_id, event.channel_id, event.node)
    numbers = (0 if event.seq is None else event.seq, event.epoch)
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise MalformedEventError("no client event: a field of another type")
    if min(numbers) < 0:
        raise MalformedEventError("no client event: a negative number")
    return event
