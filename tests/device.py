"""A device: paho-mqtt as its users use it, with what a test waits for."""

import socket
import threading
from typing import Any, Literal, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from tests.bridge_process import wait_for

_SECONDS = 60.0


class Device:
    """An MQTT 3.1.1 client on loopback. `received` grows as messages come.

    With `reconnects` it comes back when the broker closes its connection, and sends again what was not acknowledged.
    """

    def __init__(
        self,
        port: int,
        client_id: str,
        *,
        clean: bool = True,
        reconnects: bool = False,
        transport: Literal["tcp", "websockets"] = "tcp",
    ) -> None:
        self._port = port
        self.client_id = client_id
        self.client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id,
            clean_session=clean,
            reconnect_on_failure=reconnects,
            transport=transport,
        )
        self.client.max_inflight_messages_set(100)
        self.client.reconnect_delay_set(1, 2)
        self.client.max_queued_messages_set(0)
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = self._on_subscribe
        self.client.on_message = self._on_message
        self.received: list[paho.MQTTMessage] = []
        self.client.on_publish = self._on_publish
        self._published: set[int] = set()
        self._acknowledged: set[int] = set()
        self._connected = threading.Event()
        self._subscribed = threading.Event()

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def connect(self) -> None:
        self.client.connect("127.0.0.1", self._port)
        self.client.loop_start()
        assert self._connected.wait(_SECONDS), "no CONNACK"

    def cut(self) -> None:
        """Lose the connection without DISCONNECT."""
        sock = self.client.socket()
        assert isinstance(sock, socket.socket)
        sock.shutdown(socket.SHUT_RDWR)
        self.client.loop_stop()

    def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool = False, wait: bool = True) -> None:
        info = self.client.publish(topic, payload, qos=qos, retain=retain)
        if wait:
            info.wait_for_publish(_SECONDS)
            assert info.is_published(), "not acknowledged"
        else:
            self._published.add(info.mid)

    def wait_published(self) -> None:
        # Not by paho's infos: one of a publish that found no connection has failed, though it is sent with the next.
        wait_for(lambda: self._published <= self._acknowledged, seconds=_SECONDS, what="not acknowledged")

    def subscribe(self, topic_filter: str, *, qos: int) -> None:
        self._subscribed.clear()
        self.client.subscribe(topic_filter, qos)
        assert self._subscribed.wait(_SECONDS), "no SUBACK"

    def _on_connect(self, *_: Any) -> None:  # noqa: ANN401 - paho's callbacks
        self._connected.set()

    def _on_subscribe(self, *_: Any) -> None:  # noqa: ANN401
        self._subscribed.set()

    def _on_publish(self, _: Any, __: Any, packet_id: int, *___: Any) -> None:  # noqa: ANN401
        self._acknowledged.add(packet_id)

    def _on_message(self, _: Any, __: Any, message: paho.MQTTMessage) -> None:  # noqa: ANN401
        self.received.append(message)
