"""Retained messages at the beginning of a connection.

amqtt 0.12.1 sends every client that connects the retained messages of all filters in its table, whoever subscribed to
them; and it waits while it goes through that table, so that another client's subscription in that moment ends the new
connection ("dictionary changed size during iteration"). Here a connecting client gets those of its own filters.
"""

from amqtt.broker import Broker
from amqtt.session import Session

from mq2mqtt_amqtt.connection import Connection
from mq2mqtt_amqtt.patch import replace

__all__ = ["Retained"]


class Retained:
    """Sends them; a resumed session gets those of its filters again, at QoS 0, as amqtt means it to."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._publish = broker._publish_retained_messages_for_subscription  # noqa: SLF001 - see the module docstring
        self._serve = broker._client_message_loop  # noqa: SLF001
        replace(broker, "_publish_retained_messages_for_subscription", self._on_publish)
        replace(broker, "_client_message_loop", self._on_serve)

    async def _on_publish(self, subscription: tuple[str, int], session: Session) -> None:
        handler = self._broker._get_handler(session)  # noqa: SLF001
        if isinstance(handler, Connection) and handler.serving:
            await self._publish(subscription, session)

    async def _on_serve(self, session: Session, handler: Connection) -> None:
        if self._broker.retained_messages:
            own = [
                topic_filter
                for topic_filter, subscribers in self._broker.subscriptions.items()
                if any(subscriber.client_id == session.client_id for subscriber, _ in subscribers)
            ]
            for topic_filter in own:
                await self._publish((topic_filter, 0), session)
        handler.serving = True
        await self._serve(session, handler)
