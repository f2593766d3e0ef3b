"""Who subscribes to a topic, out of amqtt's own table.

amqtt matches a topic against every filter, one by one, and looks at every filter when a session ends. Here filters
stand in a trie, those of each client are at hand, and the answers for recent topics are remembered until any
subscription changes. No event tells of all changes (restored sessions, deleted sessions), so the three methods of the
broker that make them are wrapped.
"""

from typing import Final, NamedTuple, Protocol

from amqtt.broker import Broker
from amqtt.session import Session

from mq2mqtt.topics import TopicTrie
from mq2mqtt_amqtt.patch import replace

__all__ = ["Subscriber", "Subscriptions", "Watcher"]

_REFUSED = 0x80
_REMEMBERED: Final = 10_000


class Subscriber(NamedTuple):
    """A session that subscribes, and the highest QoS that its matching filters were granted."""

    session: Session
    qos: int


class Watcher(Protocol):
    """Who is told of each change. What it does must not wait."""

    def added(self, session: Session, topic_filter: str, qos: int) -> None:
        """A session subscribes, maybe again, with the QoS that is granted."""

    def removed(self, session: Session, topic_filter: str) -> None:
        """A session subscribes to this no more."""

    def forgotten(self, session: Session) -> None:
        """A session has ended; `removed` may be called for its filters after this."""


class _Table(dict[str, list[tuple[Session, int]]]):
    """amqtt makes a text of its whole table for each SUBSCRIBE, for a debug log: 0.25 s with 100 000 filters."""

    def __repr__(self) -> str:
        return f"<{len(self)} filters>"


class Subscriptions:
    """The subscribers of topics, one entry for each client however many of its filters match."""

    def __init__(self, broker: Broker) -> None:
        self._sessions = broker.sessions
        self._table = _Table(broker.subscriptions)
        self._add = broker.add_subscription
        self._delete = broker._del_subscription  # noqa: SLF001 - see the module docstring
        replace(broker, "_subscriptions", self._table)
        replace(broker, "add_subscription", self._on_add)
        replace(broker, "_del_subscription", self._on_delete)
        replace(broker, "_del_all_subscriptions", self._on_delete_all)
        self._filters: TopicTrie[str] = TopicTrie()
        self._of_client: dict[str, set[str]] = {}
        self._answers: dict[str, tuple[Subscriber, ...]] = {}
        self.watcher: Watcher | None = None
        for topic_filter, entries in self._table.items():
            self._filters.add(topic_filter, topic_filter)
            for session, _ in entries:
                self._of_client.setdefault(session.client_id or "", set()).add(topic_filter)

    def of(self, topic: str) -> tuple[Subscriber, ...]:
        """Return the subscribers of a legal topic name, connected or not."""
        answer = self._answers.get(topic)
        if answer is None:
            if len(self._answers) >= _REMEMBERED:
                self._answers.clear()
            answer = self._answers[topic] = self._find(topic)
        return answer

    def matching(self, topic: str) -> list[tuple[Session, int]]:
        """Return the subscribers of a legal topic name, once for each of their filters that matches, with its QoS."""
        return [entry for topic_filter in self._filters.match(topic) for entry in self._table.get(topic_filter, ())]

    def filters_of(self, client_id: str) -> tuple[str, ...]:
        """Return what a client subscribes to."""
        return tuple(self._of_client.get(client_id, ()))

    def restore(self, session: Session, topic_filter: str, qos: int) -> None:
        """Subscribe a session to what it was permitted before; its watcher is not told."""
        self._table.setdefault(topic_filter, []).append((session, qos))
        self._learn(topic_filter, session)

    def clear(self) -> None:
        """Take it that there are none any more: the broker stops, and would take them out one by one."""
        self._table.clear()
        self._filters = TopicTrie()
        self._of_client.clear()
        self._answers.clear()

    def _find(self, topic: str) -> tuple[Subscriber, ...]:
        found: dict[str | None, Subscriber] = {}
        for topic_filter in self._filters.match(topic):
            for session, qos in self._table.get(topic_filter, ()):
                known = found.get(session.client_id)
                if known is None or known.qos < qos:
                    found[session.client_id] = Subscriber(session, qos)
        return tuple(found.values())

    def _learn(self, topic_filter: str, session: Session) -> None:
        self._answers.clear()
        self._filters.add(topic_filter, topic_filter)
        self._of_client.setdefault(session.client_id or "", set()).add(topic_filter)

    async def _on_add(self, subscription: tuple[str, int], session: Session) -> int:
        granted = await self._add(subscription, session)
        if granted == _REFUSED:
            return granted
        topic_filter = subscription[0]
        entries = self._table[topic_filter]
        if self._is_over(session):
            entries[:] = [entry for entry in entries if entry[0] is not session]
            if not entries:
                del self._table[topic_filter]
            return _REFUSED
        # MQTT-3.8.4-3: subscribing again replaces the QoS; amqtt answers with the new one and keeps the old.
        for index, (subscriber, qos) in enumerate(entries):
            if subscriber.client_id == session.client_id and qos != granted:
                entries[index] = (subscriber, granted)
        self._learn(topic_filter, session)
        if self.watcher is not None:
            self.watcher.added(session, topic_filter, granted)
        return granted

    def _is_over(self, session: Session) -> bool:
        """Whether it ended while a plugin was asked what it may subscribe to."""
        now, _ = self._sessions.get(session.client_id or "", (None, None))
        return now is not session

    def _on_delete(self, topic_filter: str, session: Session) -> int:
        deleted = self._delete(topic_filter, session)
        if deleted:
            self._answers.clear()
            if own := self._of_client.get(session.client_id or ""):
                own.discard(topic_filter)
            if not self._table[topic_filter]:
                del self._table[topic_filter]
                self._filters.remove(topic_filter, topic_filter)
            if self.watcher is not None:
                self.watcher.removed(session, topic_filter)
        return deleted

    async def _on_delete_all(self, session: Session) -> None:
        if self.watcher is not None:
            self.watcher.forgotten(session)
        for topic_filter in self._of_client.pop(session.client_id or "", ()):
            self._on_delete(topic_filter, session)
