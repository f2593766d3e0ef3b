"""Retained messages at the beginning of a connection.

amqtt 0.12.1 sends every client that connects the retained messages of all filters in its table, whoever subscribed to
them. `Lifecycle` leaves that out; here a connecting client gets those of its own filters.
"""

from amqtt.broker import Broker
from amqtt.session import Session

from mq2mqtt_amqtt.connection import Connection
from mq2mqtt_amqtt.patch import replace
from mq2mqtt_amqtt.subscriptions import Subscriptions

__all__ = ["Retained"]


class Retained:
    """Sends them; a resumed session gets those of its filters again, at QoS 0, as amqtt means it to."""

    def __init__(self, broker: Broker, subscriptions: Subscriptions) -> None:
        self._broker = broker
        self._subscriptions = subscriptions
        self._serve = broker._client_message_loop  # noqa: SLF001 - see the module docstring
        replace(broker, "_client_message_loop", self._on_serve)

    async def _on_serve(self, session: Session, handler: Connection) -> None:
        if self._broker.retained_messages:
            for topic_filter in self._subscriptions.filters_of(handler.client_id):
                await self._broker._publish_retained_messages_for_subscription((topic_filter, 0), session)  # noqa: SLF001
        await self._serve(session, handler)
