"""MQTT clients that cost next to nothing: plain sockets, packets encoded beforehand, one write for what is due at once.

A program of its own, so that it takes nothing from the server under test but a core. It prints `ready` when its clients
are connected (and subscribed), and at the end its figures as JSON.
"""

# ruff: noqa: T201 - what it prints is its result

import argparse
import json
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice

from tests import mqtt_client as mqtt

# Every packet of a publisher has the same length; packet identifiers go round within this many.
_PACKETS = 60_000
_ACK_BYTES = 4
_TIMEOUT = 60.0
_STAY_SECONDS = 8.0
_QOS_0_AT_ONCE = 64
_PUBLISHES_EACH_REPLACEMENT = 10
# What waits in the kernel is not measured: keep it small.
_SEND_BUFFER = 64 * 1024
# A server may send each PUBACK by itself; waking up for each would take half a core. Fewer than the ten segments that a
# new TCP connection sends at once: the kernel delays its answer to them until somebody reads.
_ACKS_AT_ONCE = 8


class Connection:
    """A connected MQTT client on a blocking socket."""

    def __init__(self, port: int, client_id: str) -> None:
        self.client_id = client_id
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(_TIMEOUT)
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(mqtt.connect_packet(client_id, keep_alive=0))
        self.expect(mqtt.CONNACK)

    def expect(self, kind: int) -> bytes:
        """Read one packet, which must be of this kind; return its body."""
        first, length = self._exactly(2)
        shift = 7
        if length & 128:
            length &= 127
            while True:
                low = self._exactly(1)[0]
                length |= (low & 127) << shift
                shift += 7
                if not low & 128:
                    break
        body = self._exactly(length)
        if first >> 4 != kind:
            raise ConnectionError(f"{self.client_id}: packet {first >> 4} instead of {kind}")
        return body

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionError(f"{self.client_id}: the server closed the connection")
            data += more
        return data

    def subscribe(self, filters: list[str], *, qos: int) -> None:
        """Subscribe and wait for SUBACK."""
        wanted = b"".join(mqtt.text(topic_filter) + bytes((qos,)) for topic_filter in filters)
        self.socket.sendall(mqtt.packet(mqtt.SUBSCRIBE << 4 | 2, struct.pack("!H", 1) + wanted))
        if max(self.expect(mqtt.SUBACK)[2:]) > qos:
            raise ConnectionError(f"{self.client_id}: a subscription was refused")

    def wait_until_handled(self) -> None:
        """Wait until the server has routed everything that this client published: its last message is its own."""
        topic = f"marker/{self.client_id}"
        self.subscribe([topic], qos=0)
        self.socket.sendall(mqtt.publish_packet(topic, b"end"))
        self.expect(mqtt.PUBLISH)


class Publisher:
    """Keeps `window` publishes in flight at QoS 1; at QoS 0 writes as fast as the server reads."""

    def __init__(self, connection: Connection, *, topics: list[str], qos: int, window: int, limit: int) -> None:
        self.connection = connection
        self.sent = 0
        self._acknowledged = 0
        self._partial = 0  # bytes of a PUBACK whose rest is on its way
        self._qos = qos
        self._room = window
        self._limit = limit
        packets = [
            mqtt.publish_packet(topic, b"%064d" % number, qos=qos, packet_id=number + 1)
            for number, topic in zip(range(_PACKETS), cycle(topics), strict=False)
        ]
        self._packets = memoryview(b"".join(packets))
        self._size = len(packets[0])

    @property
    def in_flight(self) -> int:
        """Publishes without PUBACK."""
        return self.sent - self._acknowledged

    @property
    def unfinished(self) -> bool:
        """Whether there is more to publish."""
        return self.sent < self._limit

    def publish(self) -> None:
        """Send what the window has room for."""
        count = self._room - self.in_flight if self._qos else _QOS_0_AT_ONCE
        count = min(count, self._limit - self.sent)
        while count:
            first = self.sent % _PACKETS
            some = min(count, _PACKETS - first)
            self.connection.socket.sendall(self._packets[first * self._size : (first + some) * self._size])
            self.sent += some
            count -= some

    def take_acknowledgements(self) -> None:
        """Read what has come, at least one byte. A publisher gets nothing but PUBACKs."""
        data = self.connection.socket.recv(65_536)
        if not data:
            raise ConnectionError(f"{self.connection.client_id}: the server closed the connection")
        acknowledged, self._partial = divmod(self._partial + len(data), _ACK_BYTES)
        self._acknowledged += acknowledged

    def wake_after(self, acknowledgements: int) -> None:
        """Be ready to be read once that many have come; with 0, once anything has."""
        size = max(1, acknowledgements * _ACK_BYTES)
        self.connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)


def publish(arguments: argparse.Namespace) -> dict[str, float]:
    """Publish for some seconds, or `messages` each; the end is when the server has routed all of it."""
    publishers = [
        Publisher(
            Connection(arguments.port, f"GID_{arguments.mode}@@@{number:05d}"),
            topics=_filters(arguments),
            qos=arguments.qos,
            window=arguments.window,
            limit=arguments.messages or sys.maxsize,
        )
        for number in range(arguments.clients)
    ]
    print("ready", flush=True)
    cpu, start = time.process_time(), time.perf_counter()
    deadline = start + arguments.seconds
    if arguments.qos:
        _publish_acknowledged(publishers, deadline)
    else:
        _publish_unacknowledged(publishers, deadline)
    for publisher in publishers:
        publisher.connection.wait_until_handled()
    seconds = time.perf_counter() - start
    return {
        "messages": sum(publisher.sent for publisher in publishers),
        "seconds": seconds,
        "load_cpu": (time.process_time() - cpu) / seconds,
    }


def _publish_unacknowledged(publishers: list[Publisher], deadline: float) -> None:
    while time.perf_counter() < deadline and any(publisher.unfinished for publisher in publishers):
        for publisher in publishers:
            publisher.publish()


def _publish_acknowledged(publishers: list[Publisher], deadline: float) -> None:
    with selectors.DefaultSelector() as selector:
        for publisher in publishers:
            selector.register(publisher.connection.socket, selectors.EVENT_READ, publisher)
            publisher.publish()
            publisher.wake_after(_ACKS_AT_ONCE if publisher.unfinished else 0)
        while any(publisher.in_flight for publisher in publishers):
            go_on = time.perf_counter() < deadline
            for publisher in _ready(selector):
                publisher.take_acknowledgements()
                if go_on:
                    publisher.publish()
                if not (go_on and publisher.unfinished):
                    publisher.wake_after(0)


def _ready(selector: selectors.BaseSelector) -> Iterator["Publisher"]:
    ready = selector.select(_TIMEOUT)
    if not ready:
        raise TimeoutError(f"nothing came for {_TIMEOUT:g} s")
    for key, _ in ready:
        yield key.data


class Subscriber:
    """Counts PUBLISH packets, all of one length; acknowledges those of QoS 1."""

    def __init__(self, connection: Connection, *, topic_bytes: int) -> None:
        self.connection = connection
        self._id_at = 2 + 2 + topic_bytes
        self._rest = b""

    def take(self) -> int:
        """Read what has come; return the number of whole messages in it."""
        data = self._rest + self.connection.socket.recv(262_144)
        if len(data) == len(self._rest):
            raise ConnectionError(f"{self.connection.client_id}: the server closed the connection")
        if len(data) < 2:
            self._rest = data
            return 0
        if data[0] >> 4 != mqtt.PUBLISH or data[1] & 128:
            raise ConnectionError(f"{self.connection.client_id}: not the PUBLISH that was expected")
        size = 2 + data[1]
        count = len(data) // size
        if data[0] & 6 and count:
            acks = bytearray(bytes((mqtt.PUBACK << 4, 2, 0, 0)) * count)
            acks[2::4] = data[self._id_at : count * size : size]
            acks[3::4] = data[self._id_at + 1 : count * size : size]
            self.connection.socket.sendall(acks)
        self._rest = data[count * size :]
        return count


def subscribe(arguments: argparse.Namespace) -> dict[str, float]:
    """Subscribe and count until `messages` have come in all; measured from the first to the last."""
    subscribers = []
    filters = cycle(_filters(arguments))
    each = arguments.filters // arguments.clients or 1
    for number in range(arguments.clients):
        connection = Connection(arguments.port, f"GID_{arguments.mode}@@@{number:05d}")
        mine = list(islice(filters, each))
        for first in range(0, each, 500):
            connection.subscribe(mine[first : first + 500], qos=arguments.qos)
        subscribers.append(Subscriber(connection, topic_bytes=len(mine[0])))
    print("ready", flush=True)
    received = 0
    start = cpu = 0.0
    with selectors.DefaultSelector() as selector:
        for subscriber in subscribers:
            selector.register(subscriber.connection.socket, selectors.EVENT_READ, subscriber)
        while received < arguments.messages:
            ready = selector.select(_TIMEOUT)
            if not ready:
                raise TimeoutError(f"{received} of {arguments.messages} messages came")
            if not received:
                cpu, start = time.process_time(), time.perf_counter()
            for key, _ in ready:
                received += key.data.take()
    seconds = time.perf_counter() - start
    return {"messages": received, "seconds": seconds, "load_cpu": (time.process_time() - cpu) / seconds}


def come_back(arguments: argparse.Namespace) -> dict[str, float]:
    """Connect one client after another and count what each gets, subscribed to nothing, until `messages` have come.

    Then stay for a while: on Mosquitto a kept message is done with when its connection has outlived it by 5 s.
    """
    print("ready", flush=True)
    received = 0
    cpu, start = time.process_time(), time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for number in range(arguments.clients):
            connection = Connection(arguments.port, f"GID_{arguments.mode}@@@{number:05d}")
            subscriber = Subscriber(connection, topic_bytes=len(arguments.topic))
            selector.register(connection.socket, selectors.EVENT_READ, subscriber)
            received += sum(key.data.take() for key, _ in selector.select(0))
        while received < arguments.messages:
            ready = selector.select(_TIMEOUT)
            if not ready:
                raise TimeoutError(f"{received} of {arguments.messages} messages came")
            received += sum(key.data.take() for key, _ in ready)
        seconds, used = time.perf_counter() - start, time.process_time() - cpu
        time.sleep(_STAY_SECONDS)
    return {"messages": received, "seconds": seconds, "load_cpu": used / seconds}


def visit(arguments: argparse.Namespace) -> dict[str, float]:
    """Come and go `messages` times: CONNECT and DISCONNECT in one write, `window` visits at a time, until the end."""
    print("ready", flush=True)
    cpu, start = time.process_time(), time.perf_counter()
    begun = ended = 0
    with selectors.DefaultSelector() as selector:
        while ended < arguments.messages:
            while begun < arguments.messages and begun - ended < arguments.window:
                visitor = socket.create_connection(("127.0.0.1", arguments.port), timeout=_TIMEOUT)
                client_id = f"GID_{arguments.mode}@@@{begun:06d}"
                visitor.sendall(mqtt.connect_packet(client_id) + bytes((mqtt.DISCONNECT << 4, 0)))
                selector.register(visitor, selectors.EVENT_READ)
                begun += 1
            for key, _ in selector.select(_TIMEOUT):
                assert isinstance(key.fileobj, socket.socket)
                if not _has_ended(key.fileobj):
                    continue
                selector.unregister(key.fileobj)
                key.fileobj.close()
                ended += 1
    seconds = time.perf_counter() - start
    return {"messages": ended, "seconds": seconds, "load_cpu": (time.process_time() - cpu) / seconds}


def _has_ended(visitor: socket.socket) -> bool:
    try:
        return not visitor.recv(64)
    except ConnectionResetError:
        return True


def _filters(arguments: argparse.Namespace) -> list[str]:
    """One topic, or `filters` different ones of equal length below it."""
    if not arguments.filters:
        return [arguments.topic]
    return [f"{arguments.topic}/{number:06d}" for number in range(arguments.filters)]


def connect(arguments: argparse.Namespace) -> dict[str, float]:
    """Connect, and stay until standard input ends."""
    start = time.perf_counter()
    connections = [
        Connection(arguments.port, f"GID_{arguments.mode}@@@{number:05d}") for number in range(arguments.clients)
    ]
    seconds = time.perf_counter() - start
    print("ready", flush=True)
    sys.stdin.read()
    return {"messages": len(connections), "seconds": seconds, "load_cpu": 0.0}


class Churn:
    """Devices that come, publish now and then, and go again; half of them for good, half without a goodbye."""

    def __init__(self, port: int, clients: int, topic: str) -> None:
        self._port = port
        self._topic = topic
        self._selector = selectors.DefaultSelector()
        self._devices: list[Connection] = []
        self._made = 0
        self.acknowledged = 0
        for number in range(clients):
            self._come(f"GID_churn@@@{number:05d}")

    def _come(self, client_id: str) -> None:
        self._made += 1
        device = Connection(self._port, client_id)
        self._selector.register(device.socket, selectors.EVENT_READ)
        self._devices.append(device)

    def replace(self) -> None:
        """Have the device go that is connected longest, and another one or the same come."""
        device = self._devices.pop(0)
        # Its PUBACK may be on its way.
        self.read(0)
        self._selector.unregister(device.socket)
        if self._made % 2:
            device.socket.sendall(bytes((mqtt.DISCONNECT << 4, 0)))
        device.socket.close()
        self._come(device.client_id if self._made % 4 < 2 else f"GID_churn@@@{self._made:05d}")

    def publish(self, number: int) -> None:
        """Publish from one of them, at QoS 1."""
        device = self._devices[number * 7919 % len(self._devices)]
        packet = mqtt.publish_packet(self._topic, b"%064d" % number, qos=1, packet_id=number % 60_000 + 1)
        device.socket.sendall(packet)

    def read(self, seconds: float) -> None:
        """Take what comes for a while."""
        deadline = time.perf_counter() + seconds
        while True:
            for key, _ in self._selector.select(max(0, deadline - time.perf_counter())):
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(65_536)
                if not data:
                    raise ConnectionError("the server closed a connection")
                self._count(data)
            if time.perf_counter() >= deadline:
                return

    def _count(self, data: bytes) -> None:
        # Servers write whole packets, and all of them are short here.
        position = 0
        while position + 1 < len(data):
            self.acknowledged += data[position] >> 4 == mqtt.PUBACK
            position += 2 + data[position + 1]


def churn(arguments: argparse.Namespace) -> dict[str, float]:
    """Keep `clients` connected and `rate` publishes a second coming; every tenth as often one is replaced."""
    devices = Churn(arguments.port, arguments.clients, arguments.topic)
    print("ready", flush=True)
    cpu, start = time.process_time(), time.perf_counter()
    number = 0
    while (now := time.perf_counter() - start) < arguments.seconds:
        if number <= now * arguments.rate:
            devices.publish(number)
            number += 1
            if number % _PUBLISHES_EACH_REPLACEMENT == 0:
                devices.replace()
        devices.read(max(0.0, start + number / arguments.rate - time.perf_counter()))
    devices.read(1.0)
    seconds = time.perf_counter() - start
    return {
        "messages": devices.acknowledged,
        "seconds": seconds,
        "load_cpu": (time.process_time() - cpu) / seconds,
    }


_MODES: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "publish": publish,
    "subscribe": subscribe,
    "connect": connect,
    "churn": churn,
    "come_back": come_back,
    "visit": visit,
}


def main() -> None:
    """Run one mode."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=_MODES)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--topic", default="")
    parser.add_argument("--qos", type=int, default=0)
    parser.add_argument("--window", type=int, default=100, help="publishes in flight of each client")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=1.0, help="publishes a second")
    parser.add_argument("--messages", type=int, default=0)
    parser.add_argument(
        "--filters", type=int, default=0, help="different topics below --topic, spread over the clients"
    )
    arguments = parser.parse_args()
    print(json.dumps(_MODES[arguments.mode](arguments)), flush=True)


if __name__ == "__main__":
    main()
