"""What is published on one connection: in order, in a window, and again where the broker has not answered."""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from loguru import logger

from mq2mqtt.host import Delivery, DropReason, Outcome, Settled
from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.properties import encode_properties
from mq2mqtt.topics import parent_of
from mq2mqtt_mosquitto.client import NO_SUBSCRIBER, MqttClient

__all__ = ["WINDOW", "Job", "Outbox"]

WINDOW: Final = 256
"""Messages that are published and not answered, at most; fewer where the broker takes fewer."""

_ENOUGH: Final = 1024
"""Messages that wait for the window at which `room` says that there is none."""

_FAILURE: Final = 0x80
_REFUSALS: Final = {0x87: DropReason.NOT_AUTHORIZED, 0x95: DropReason.TOO_LARGE}

# A PUBLISH besides topic, properties and payload: the fixed header, three lengths, the packet identifier.
_PACKET_BYTES: Final = 5 + 2 + 4 + 2


class Job(NamedTuple):
    """A message for the broker. `settled` is called once; `handed` before it if the broker has taken the message."""

    message: MqttMessage
    settled: Settled
    handed: Callable[[], None]
    is_private: bool = False
    """For one client, which is away if nobody subscribes."""

    def end(self, reason: int) -> None:
        """The broker has answered with this reason code; 0 also for a message of QoS 0 that is written."""
        if reason == NO_SUBSCRIBER:
            self.settled(_AWAY if self.is_private else _NO_SUBSCRIBER)
        elif reason >= _FAILURE:
            self.drop(_REFUSALS.get(reason, DropReason.HOST_REFUSED))
        else:
            self.handed()
            self.settled(_DELIVERED)

    def drop(self, reason: DropReason) -> None:
        """Nobody gets it."""
        self.settled(Delivery(Outcome.DROPPED, reason))


_DELIVERED: Final = Delivery(Outcome.DELIVERED)
_NO_SUBSCRIBER: Final = Delivery(Outcome.NO_SUBSCRIBER)
_AWAY: Final = Delivery(Outcome.DROPPED, DropReason.NOT_PERSISTENT)


class Outbox:
    """Messages in the order in which the bridge gives them. It outlives the connection it is `connected` to."""

    def __init__(self) -> None:
        self._client: MqttClient | None = None
        self._waiting: deque[Job] = deque()  # bounded by the windows of the inbound rules
        self._unanswered: dict[int, Job] = {}
        self._number = 0
        self._refused: set[int] = set()
        self._flushing = False
        self._room = asyncio.Event()
        self._room.set()

    def add(self, job: Job) -> None:
        """Publish a message, now or when there is a connection with room."""
        self._waiting.append(job)
        if len(self._waiting) >= _ENOUGH:
            self._room.clear()
        self._flush_soon()

    async def room(self) -> None:
        """Return when there are not too many messages waiting."""
        await self._room.wait()

    def connected(self, client: MqttClient) -> None:
        """Publish what waits, and all that comes, on `client`."""
        self._client = client
        self.flush()

    def disconnected(self) -> None:
        """Keep what the broker has not answered, to be published again first. Idempotent."""
        self._client = None
        self._waiting.extendleft(reversed(self._unanswered.values()))
        self._unanswered.clear()

    def take_over(self, other: "Outbox", parent: str) -> None:
        """Publish what waits in another one for topics under `parent`."""
        for job in other.give_up(parent):
            self.add(job)

    def give_up(self, parent: str) -> list[Job]:
        """Return what waits for topics under `parent`, and forget it."""
        given = [job for job in self._waiting if parent_of(job.message.topic) == parent]
        others = (job for job in self._waiting if parent_of(job.message.topic) != parent)
        self._waiting = deque(others)  # bounded as before
        self._flush_soon()
        return given

    def _flush_soon(self) -> None:
        # Not at once: an answer comes within a callback of the client.
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Publish as much of what waits as the window and the connection allow."""
        self._flushing = False
        client = self._client
        if client is not None:
            window = min(WINDOW, client.limits.receive_maximum)
            while self._waiting and len(self._unanswered) < window and not client.is_full:
                self._publish(client, self._waiting.popleft())
        if len(self._waiting) < _ENOUGH:
            self._room.set()

    def _publish(self, client: MqttClient, job: Job) -> None:
        message, limits = job.message, client.limits
        if limits.packet_bytes is not None and _packet_bytes(message) > limits.packet_bytes:
            job.drop(DropReason.TOO_LARGE)
            return
        self._number += 1
        number = self._number
        self._unanswered[number] = job
        try:
            client.publish(
                message.topic,
                message.payload,
                qos=min(message.qos, limits.qos),
                properties=message.properties,
                done=partial(self._answered, number),
            )
        except ValueError as error:
            del self._unanswered[number]
            logger.error("a message for the broker cannot be written: {}", error)
            job.drop(DropReason.HOST_REFUSED)

    def _answered(self, number: int, reason: int) -> None:
        job = self._unanswered.pop(number, None)
        if job is None:
            return
        if reason >= _FAILURE and reason not in self._refused:
            self._refused.add(reason)
            logger.warning(
                "the broker refuses to take a message of {}: reason code {:#04x} (told once)", job.message.topic, reason
            )
        job.end(reason)
        self._flush_soon()


def _packet_bytes(message: MqttMessage) -> int:
    properties = b"" if message.properties is None else encode_properties(message.properties)
    topic = message.topic.encode("utf-8", "surrogateescape")
    return _PACKET_BYTES + len(topic) + len(properties) + len(message.payload)
