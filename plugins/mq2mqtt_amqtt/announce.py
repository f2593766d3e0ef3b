"""amqtt's own objects and plugin events: made only where its routing, or a plugin of others, wants them."""

from collections.abc import Coroutine
from typing import Any, TypeVar

from amqtt.adapters import BufferReader
from amqtt.errors import NoDataError
from amqtt.events import Events, MQTTEvents
from amqtt.mqtt import packet_class
from amqtt.mqtt.packet import MQTTFixedHeader
from amqtt.mqtt.publish import PublishPacket
from amqtt.plugins.manager import PluginManager
from amqtt.session import IncomingApplicationMessage, Session

from mq2mqtt_amqtt.packets import MalformedPacketError, Publish
from mq2mqtt_amqtt.wire import Wire

__all__ = ["AnnouncingWire", "announce", "application_message", "decode", "listens"]

_Result = TypeVar("_Result")
_CONTINUE = 0x80


def listens(manager: PluginManager[Any], event: Events) -> bool:
    """Whether any plugin handles `event`."""
    return event in manager._event_plugin_callbacks  # noqa: SLF001 - else everything is decoded for nobody


def announce(manager: PluginManager[Any], event: Events, **arguments: Any) -> None:  # noqa: ANN401 - the event's own
    """Fire `event`: amqtt makes a task for each listener and waits for none."""
    _complete(manager.fire_event(event, **arguments))


def decode(first: int, body: bytes) -> Any:  # noqa: ANN401 - any of amqtt's packets
    """Return amqtt's object for a packet: its first byte, and what follows the fixed header.

    Raises:
        MalformedPacketError: it ends too early.
    """
    header = MQTTFixedHeader(first >> 4, first & 0x0F, len(body))
    try:
        return _complete(packet_class(header).from_stream(BufferReader(body), fixed_header=header))
    except NoDataError:
        raise MalformedPacketError("the packet ends too early") from None


def application_message(publish: Publish) -> IncomingApplicationMessage:
    """Return what amqtt routes, and tells plugins of, for `publish`."""
    number = publish.packet_id or None
    message = IncomingApplicationMessage(number, publish.topic, publish.qos, publish.payload, publish.retain)
    message.publish_packet = PublishPacket.build(
        publish.topic, publish.payload, number, publish.dup, publish.qos, publish.retain
    )
    return message


def _complete(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: _Result = done.value
        return result
    coroutine.close()
    raise RuntimeError("amqtt waits where 0.12.1 does not")


class AnnouncingWire:
    """A `Wire` that tells plugins of the packets which the bridge writes, as amqtt tells them of its own."""

    def __init__(self, wire: Wire, manager: PluginManager[Any], session: Session) -> None:
        self._wire = wire
        self._manager = manager
        self._session = session
        self.drained = wire.drained
        self.close = wire.close

    @property
    def buffered(self) -> int:
        """See `Wire.buffered`."""
        return self._wire.buffered

    @property
    def lost(self) -> bool:
        """See `Wire.lost`."""
        return self._wire.lost

    def write(self, data: bytes) -> None:
        """See `Wire.write`."""
        self._wire.write(data)
        start = 1
        while data[start] & _CONTINUE:
            start += 1
        packet = decode(data[0], data[start + 1 :])
        announce(self._manager, MQTTEvents.PACKET_SENT, packet=packet, session=self._session)
