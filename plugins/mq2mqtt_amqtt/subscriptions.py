"""Who subscribes to a topic, out of amqtt's own table.

amqtt matches a topic against every filter, one by one. Here filters stand in a trie, and the answers for recent topics
are remembered until any subscription changes. No event tells of all changes (restored sessions, deleted sessions), so
the three methods of the broker that make them are wrapped.
"""

from typing import Final, NamedTuple

from amqtt.broker import Broker
from amqtt.session import Session

from mq2mqtt.topics import TopicTrie
from mq2mqtt_amqtt.patch import replace

__all__ = ["Subscriber", "Subscriptions"]

_REFUSED = 0x80
_REMEMBERED: Final = 10_000


class Subscriber(NamedTuple):
    """A session that subscribes, and the highest QoS that its matching filters were granted."""

    session: Session
    qos: int


class Subscriptions:
    """The subscribers of topics, one entry for each client however many of its filters match."""

    def __init__(self, broker: Broker) -> None:
        self._table = broker.subscriptions
        self._add = broker.add_subscription
        self._delete = broker._del_subscription  # noqa: SLF001 - see the module docstring
        self._delete_all = broker._del_all_subscriptions  # noqa: SLF001
        replace(broker, "add_subscription", self._on_add)
        replace(broker, "_del_subscription", self._on_delete)
        replace(broker, "_del_all_subscriptions", self._on_delete_all)
        self._filters: TopicTrie[str] = TopicTrie()
        self._known: set[str] = set()
        self._answers: dict[str, tuple[Subscriber, ...]] = {}
        for topic_filter in self._table:
            self._learn(topic_filter)

    def of(self, topic: str) -> tuple[Subscriber, ...]:
        """Return the subscribers of a legal topic name, connected or not."""
        answer = self._answers.get(topic)
        if answer is None:
            if len(self._answers) >= _REMEMBERED:
                self._answers.clear()
            answer = self._answers[topic] = self._find(topic)
        return answer

    def _find(self, topic: str) -> tuple[Subscriber, ...]:
        found: dict[str | None, Subscriber] = {}
        for topic_filter in self._filters.match(topic):
            for session, qos in self._table.get(topic_filter, ()):
                known = found.get(session.client_id)
                if known is None or known.qos < qos:
                    found[session.client_id] = Subscriber(session, qos)
        return tuple(found.values())

    def _learn(self, topic_filter: str) -> None:
        self._answers.clear()
        if topic_filter not in self._known:
            self._known.add(topic_filter)
            self._filters.add(topic_filter, topic_filter)

    def _forget_empty(self) -> None:
        self._answers.clear()
        for topic_filter in self._known.difference(self._table):
            self._known.remove(topic_filter)
            self._filters.remove(topic_filter, topic_filter)

    async def _on_add(self, subscription: tuple[str, int], session: Session) -> int:
        granted = await self._add(subscription, session)
        topic_filter = subscription[0]
        if granted != _REFUSED:
            # MQTT-3.8.4-3: subscribing again replaces the QoS; amqtt answers with the new one and keeps the old.
            entries = self._table[topic_filter]
            for index, (subscriber, qos) in enumerate(entries):
                if subscriber.client_id == session.client_id and qos != granted:
                    entries[index] = (subscriber, granted)
            self._learn(topic_filter)
        return granted

    def _on_delete(self, topic_filter: str, session: Session) -> int:
        deleted = self._delete(topic_filter, session)
        if deleted:
            self._answers.clear()
        return deleted

    async def _on_delete_all(self, session: Session) -> None:
        await self._delete_all(session)
        self._forget_empty()
