"""The round trip that the quickstart shows: one message from a device, two to it."""

import asyncio
import json
import time
from collections.abc import Callable

from mq2mqtt.errors import BridgeError
from mq2mqtt.link import ConsumeFrom, RocketLink, Subscription
from mq2mqtt.message import ReceivedMessage, RocketMessage
from mq2mqtt.quickstart.bridge import INBOUND_TOPIC, OUTBOUND_TOPIC
from mq2mqtt.quickstart.device import Device, Received
from mq2mqtt.quickstart.prerequisites import Say

__all__ = ["DEVICE_ID", "Tour", "TourFailedError"]

DEVICE_ID = "GID_dev@@@sensor-1"

# The same in every run, so that one that was killed is not taken for another member of the group.
_GROUP = "GID_mq2mqtt_quickstart_viewer"
_STEP_DEADLINE = 30.0
_POLL_INTERVAL = 0.05


class TourFailedError(BridgeError):
    """A message did not arrive in time; the text says which."""


class Tour:
    """A device and a RocketMQ application beside the bridge, and what each of them sees.

    `start` begins to watch RocketMQ. From then on every message that arrives is shown, also after the round trip.
    """

    def __init__(self, device: Device, link: RocketLink, say: Say) -> None:
        self._device = device
        self._link = link
        self._say = say
        # Every run's messages are its own: an older one that comes late is shown, not mistaken.
        self._mark = int(time.time() * 1000)
        self._awaited: tuple[bytes, asyncio.Event] = (b"", asyncio.Event())
        self._watchers: list[asyncio.Task[None]] = []
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Subscribe the device, join RocketMQ's topic, and wait until both would get a message."""
        await self._device.subscribe("devices/#")
        self._subscription = await self._link.subscribe(OUTBOUND_TOPIC, _GROUP, tags="*", start=ConsumeFrom.LATEST)
        self._watchers = [
            asyncio.create_task(self._watch_device(), name="quickstart.watch.device"),
            asyncio.create_task(self._watch_rocketmq(self._subscription), name="quickstart.watch.rocketmq"),
        ]
        subscription = self._subscription
        await self._until(lambda: subscription.problem is None, "RocketMQ does not let the viewer read")

    async def close(self) -> None:
        """Stop watching. Idempotent."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        if self._subscription is not None:
            await self._subscription.close()

    async def round_trip(self) -> None:
        """Send one message up and two down, and wait for each.

        Raises:
            TourFailedError: one did not arrive within 30 s.
            BridgeError: it could not even be sent.
        """
        await self._uplink()
        await self._downlink("/room1/set", "to the subscribers of devices/room1/set")
        await self._downlink(f"/p2p/{DEVICE_ID}", f"to the one device {DEVICE_ID} (P2P)")

    async def _uplink(self) -> None:
        payload = json.dumps({"celsius": 21.5, "at": self._mark}).encode()
        self._say("")
        self._say(f"device {DEVICE_ID} publishes: sensors/room1/temp  qos 1  {payload.decode()}")
        arrived = self._expect(payload)
        await self._device.publish("sensors/room1/temp", payload)
        self._say("  PUBACK: the message is on this machine's disk, in the lane of rule telemetry-out")
        await self._until(arrived.is_set, f"the device's message did not reach RocketMQ topic {OUTBOUND_TOPIC}")

    async def _downlink(self, second_topic: str, whom: str) -> None:
        payload = json.dumps({"set": "on", "to": second_topic, "at": self._mark}).encode()
        self._say("")
        self._say(f"RocketMQ producer sends to topic {INBOUND_TOPIC}, {whom}: {payload.decode()}")
        properties = {"TAGS": "MQ2MQTT", "mqttSecondTopic": second_topic, "qoslevel": "1"}
        _show(properties, self._say)
        arrived = self._expect(payload)
        queues = await self._link.queues(INBOUND_TOPIC)
        await self._link.send(queues[0], [RocketMessage(INBOUND_TOPIC, payload, properties)])
        await self._until(arrived.is_set, f"RocketMQ's message did not reach the device ({second_topic})")

    def _expect(self, payload: bytes) -> asyncio.Event:
        arrived = asyncio.Event()
        self._awaited = (payload, arrived)
        return arrived

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(_STEP_DEADLINE):
                while not condition():  # noqa: ASYNC110 - other programs are awaited
                    await asyncio.sleep(_POLL_INTERVAL)
        except TimeoutError as exc:
            raise TourFailedError(f"{what} within {_STEP_DEADLINE:g} s") from exc

    def _arrived(self, payload: bytes) -> None:
        awaited, event = self._awaited
        if payload == awaited:
            event.set()

    async def _watch_device(self) -> None:
        while True:
            message: Received = await self._device.receive()
            text = message.payload.decode(errors="replace")
            self._say(f"  device {DEVICE_ID} received: {message.topic}  qos {message.qos}  {text}")
            self._arrived(message.payload)

    async def _watch_rocketmq(self, subscription: Subscription) -> None:
        async for batch in subscription:
            for message in batch:
                self._show_rocket(message)
                subscription.settle(message)
                self._arrived(message.body)

    def _show_rocket(self, message: ReceivedMessage) -> None:
        self._say(
            f"  RocketMQ topic {message.topic} received (queue {message.queue_id}, offset {message.offset}): "
            f"{message.body.decode(errors='replace')}"
        )
        _show(message.properties, self._say)


def _show(properties: dict[str, str], say: Say) -> None:
    width = max(map(len, properties), default=0)
    for key in sorted(properties):
        say(f"    {key:<{width}}  {properties[key]}")
