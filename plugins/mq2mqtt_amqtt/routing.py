"""What clients publish to each other, to the subscribers whom our own table names.

amqtt compares a message with every filter of every client, which takes 85 ms of the loop with 100 000 of them; and
where a plugin that filters topics waits meanwhile, another client's SUBSCRIBE loses the message ("dictionary changed
size during iteration").
"""

import asyncio
from typing import TYPE_CHECKING, Any

from amqtt.broker import Broker
from amqtt.session import Session

from mq2mqtt_amqtt.patch import replace
from mq2mqtt_amqtt.roles import Receivers, is_kept
from mq2mqtt_amqtt.subscriptions import Subscriptions

if TYPE_CHECKING:
    from collections import deque

__all__ = ["Routing"]


class Routing:
    """In place of the broker's method; what it does for a receiver is what amqtt does."""

    def __init__(self, broker: Broker, receivers: Receivers, subscriptions: Subscriptions) -> None:
        self._broker = broker
        self._receivers = receivers
        self._subscriptions = subscriptions
        replace(broker, "_run_broadcast", self._on_broadcast)

    async def _on_broadcast(self, running: "deque[asyncio.Task[Any]]") -> None:
        """Take the next message; `running` gets a task for each receiver that is connected."""
        message = await self._broker._broadcast_queue.get()  # noqa: SLF001 - see the module docstring
        for session, granted in self._subscriptions.matching(message["topic"]):
            if not self._receivers.restricted or await self._receivers.may_receive(session, message["topic"]):
                await self._send(message, session, message.get("qos", granted), running)

    async def _send(
        self, message: dict[str, Any], session: Session, qos: int, running: "deque[asyncio.Task[Any]]"
    ) -> None:
        broker = self._broker
        if session.transitions.state != "connected":
            if qos and is_kept(session):
                await broker._retain_broadcast_message(message, qos, session)  # noqa: SLF001
        elif (handler := broker._get_handler(session)) is not None:  # noqa: SLF001
            sending = handler.mqtt_publish(message["topic"], message["data"], qos, retain=False)
            running.append(asyncio.create_task(sending, name=f"mq2mqtt.route[{session.client_id}]"))
