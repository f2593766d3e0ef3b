"""A device for the guided tour, made of amqtt's client."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from amqtt.client import MQTTClient
from amqtt.errors import AMQTTError, ClientError

from mq2mqtt.errors import BridgeError

__all__ = ["Device", "DeviceError", "Received"]

_ANSWER_DEADLINE = 20.0
_SUBACK_FAILURE = 0x80
_QOS = 1


class DeviceError(BridgeError):
    """The MQTT broker refused, closed the connection, or did not answer."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message that the device got."""

    topic: str
    payload: bytes
    qos: int


class Device:
    """One clean session. Use `connect`, then `subscribe` and `publish`; `receive` returns what comes."""

    def __init__(self, client_id: str) -> None:
        # Losing the bridge is told by the quickstart itself.
        logging.getLogger("amqtt").setLevel(logging.CRITICAL)
        self.client_id = client_id
        self._client = MQTTClient(client_id=client_id, config={"auto_reconnect": False, "plugins": {}})

    async def connect(self, host: str, port: int) -> Self:
        """Connect; raises `DeviceError`."""
        with _errors(f"no MQTT broker at {host}:{port}"):
            async with asyncio.timeout(_ANSWER_DEADLINE):
                await self._client.connect(f"mqtt://{host}:{port}", cleansession=True)
        return self

    async def close(self) -> None:
        """Say DISCONNECT and close. Idempotent."""
        with contextlib.suppress(AMQTTError, ClientError, OSError):
            await self._client.disconnect()

    async def subscribe(self, topic_filter: str) -> None:
        """Subscribe with QoS 1; raises `DeviceError`."""
        with _errors(f"no answer to the subscription to {topic_filter}"):
            async with asyncio.timeout(_ANSWER_DEADLINE):
                codes = await self._client.subscribe([(topic_filter, _QOS)])
        if _SUBACK_FAILURE in codes:
            raise DeviceError(f"the MQTT broker refused the subscription to {topic_filter}")

    async def publish(self, topic: str, payload: bytes) -> None:
        """Publish with QoS 1 and wait for PUBACK; raises `DeviceError`."""
        with _errors(f"no acknowledgement of the publish to {topic}"):
            async with asyncio.timeout(_ANSWER_DEADLINE):
                await self._client.publish(topic, payload, qos=_QOS)

    async def receive(self) -> Received:
        """Wait for the next message; raises `DeviceError` when the connection is lost."""
        with _errors("the connection to the MQTT broker is lost"):
            message = await self._client.deliver_message()
        if message is None:
            raise DeviceError("the connection to the MQTT broker is lost")
        return Received(message.topic, bytes(message.data), message.qos or 0)


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except (AMQTTError, ClientError, OSError) as error:
        raise DeviceError(f"{what}: {error or type(error).__name__}") from error
