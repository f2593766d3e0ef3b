"""A QoS 1 or 2 publisher that goes on through broken connections, and knows what was acknowledged to it."""

import socket
import struct
import threading
import time

_WINDOW = 50
_PUBACK, _PUBREC, _PUBREL, _PUBCOMP = 0x40, 0x50, 0x62, 0x70


class Stream(threading.Thread):
    """Publishes 0, 1, 2 ... to `topic` at `rate` per second; a number is given up on only after PUBACK or PUBCOMP.

    What is not acknowledged is sent again in its order after a reconnect, as MQTT asks (MQTT-4.6.0-1); at QoS 2 from
    PUBLISH on when the broker has no session any more. `longest_stall` is the longest time in seconds without an
    acknowledgement while something waited for one, reconnecting included; `connections` counts how often it connected.
    """

    def __init__(self, port: int, topic: str, *, rate: float, qos: int = 1, client_id: str = "GID_stream@@@1") -> None:
        super().__init__(name=f"stream {topic}", daemon=True)
        self._address = ("127.0.0.1", port)
        self._topic = topic.encode()
        self.client_id = client_id
        self._qos = qos
        self._interval = 1 / rate
        self._stopping = threading.Event()
        self._next = 0
        self._pending: dict[int, int] = {}  # packet id -> number, in order; at most _WINDOW
        self._released: set[int] = set()  # packet ids that have their PUBREC
        self.acknowledged: set[bytes] = set()
        self.longest_stall = 0.0
        self.connections = 0
        self._acknowledged_at = 0.0

    def stop(self) -> None:
        """End after what is pending is acknowledged, at most 10 s later."""
        self._stopping.set()
        self.join(30)
        assert not self.is_alive()

    def give_up(self) -> None:
        """End without waiting for anything."""
        self._pending.clear()
        self._stopping.set()

    def run(self) -> None:
        deadline = None
        while not (self._stopping.is_set() and not self._pending):
            if self._stopping.is_set():
                deadline = deadline or time.monotonic() + 10
                if time.monotonic() > deadline:
                    return
            try:
                with socket.create_connection(self._address, timeout=10) as sock:
                    self.connections += 1
                    self._resume(sock)
                    self._publish(sock)
            except (OSError, EOFError):
                time.sleep(0.05)

    def _resume(self, sock: socket.socket) -> None:
        client_id = self.client_id.encode()
        body = b"\x00\x04MQTT\x04\x00\x00\x3c" + struct.pack("!H", len(client_id)) + client_id
        sock.sendall(b"\x10" + bytes([len(body)]) + body)
        session_present = _read_exactly(sock, 4)[2] & 1
        if not session_present:
            self._released.clear()
        for packet_id, number in self._pending.items():
            if packet_id in self._released:
                sock.sendall(_packet(_PUBREL, packet_id))
            else:
                self._send(sock, packet_id, number, dup=bool(session_present))

    def _publish(self, sock: socket.socket) -> None:
        due = time.monotonic()
        sock.settimeout(0.002)
        received = b""
        while not (self._stopping.is_set() and not self._pending):
            now = time.monotonic()
            if now >= due and len(self._pending) < _WINDOW and not self._stopping.is_set():
                due = max(due + self._interval, now - 0.1)
                if not self._pending:
                    self._acknowledged_at = now
                number = self._next
                packet_id = number % 65_000 + 1
                # Pending before it is sent: where sending fails, the next connection sends it.
                self._pending[packet_id] = number
                self._next += 1
                self._send(sock, packet_id, number)
            try:
                data = sock.recv(4096)
            except TimeoutError:
                if self._stopping.is_set() and time.monotonic() - self._acknowledged_at > 10:
                    return
                continue
            if not data:
                raise EOFError
            received += data
            while len(received) >= 4:
                self._take(sock, received[0], int.from_bytes(received[2:4], "big"))
                received = received[4:]

    def _take(self, sock: socket.socket, kind: int, packet_id: int) -> None:
        if kind == _PUBREC:
            self._released.add(packet_id)
            sock.sendall(_packet(_PUBREL, packet_id))
        elif kind in {_PUBACK, _PUBCOMP}:
            now = time.monotonic()
            self.longest_stall = max(self.longest_stall, now - self._acknowledged_at)
            self._acknowledged_at = now
            self._released.discard(packet_id)
            number = self._pending.pop(packet_id, None)
            if number is not None:  # else it has been given up on
                self.acknowledged.add(b"%d" % number)

    def _send(self, sock: socket.socket, packet_id: int, number: int, *, dup: bool = False) -> None:
        body = struct.pack("!H", len(self._topic)) + self._topic + struct.pack("!H", packet_id) + b"%d" % number
        sock.sendall(bytes([0x30 | self._qos << 1 | (8 if dup else 0), len(body)]) + body)


def _packet(kind: int, packet_id: int) -> bytes:
    return bytes([kind, 2]) + struct.pack("!H", packet_id)


def _read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data
