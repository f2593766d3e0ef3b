"""A QoS 1 publisher that goes on through broken connections, and knows what was acknowledged to it."""

import socket
import struct
import threading
import time

_WINDOW = 50


class Stream(threading.Thread):
    """Publishes 0, 1, 2 ... to `topic` at `rate` per second; a number is given up on only after its PUBACK.

    Unacknowledged numbers are sent again in their order after a reconnect, as MQTT asks (MQTT-4.6.0-1).
    """

    def __init__(self, port: int, topic: str, *, rate: float) -> None:
        super().__init__(name="stream", daemon=True)
        self._address = ("127.0.0.1", port)
        self._topic = topic.encode()
        self._interval = 1 / rate
        self._stopping = threading.Event()
        self._next = 0
        self._pending: dict[int, int] = {}  # packet id -> number, in order; at most _WINDOW
        self.acknowledged: set[bytes] = set()
        self.longest_stall = 0.0

    def stop(self) -> None:
        """End after what is pending is acknowledged, at most 10 s later."""
        self._stopping.set()
        self.join(15)
        assert not self.is_alive()

    def run(self) -> None:
        deadline = None
        while not (self._stopping.is_set() and not self._pending):
            if self._stopping.is_set():
                deadline = deadline or time.monotonic() + 10
                if time.monotonic() > deadline:
                    return
            try:
                with socket.create_connection(self._address, timeout=2) as sock:
                    self._talk(sock)
            except (OSError, EOFError):
                time.sleep(0.05)

    def _talk(self, sock: socket.socket) -> None:
        client_id = b"GID_stream@@@1"
        body = b"\x00\x04MQTT\x04\x00\x00\x3c" + struct.pack("!H", len(client_id)) + client_id
        sock.sendall(b"\x10" + bytes([len(body)]) + body)
        _read_exactly(sock, 4)
        for packet_id, number in self._pending.items():
            self._send(sock, packet_id, number, dup=True)
        last_ack = due = time.monotonic()
        sock.settimeout(0.002)
        received = b""
        while not (self._stopping.is_set() and not self._pending):
            now = time.monotonic()
            if now >= due and len(self._pending) < _WINDOW and not self._stopping.is_set():
                due = max(due + self._interval, now - 0.1)
                if not self._pending:
                    last_ack = now
                packet_id = self._next % 65_000 + 1
                self._pending[packet_id] = self._next
                self._send(sock, packet_id, self._next)
                self._next += 1
            try:
                data = sock.recv(4096)
            except TimeoutError:
                if self._stopping.is_set() and time.monotonic() - last_ack > 10:
                    return
                continue
            if not data:
                raise EOFError
            received += data
            while len(received) >= 4:
                packet, received = received[:4], received[4:]
                if packet[0] == 0x40:
                    self.longest_stall = max(self.longest_stall, time.monotonic() - last_ack)
                    last_ack = time.monotonic()
                    number = self._pending.pop(int.from_bytes(packet[2:4], "big"))
                    self.acknowledged.add(b"%d" % number)

    def _send(self, sock: socket.socket, packet_id: int, number: int, *, dup: bool = False) -> None:
        body = struct.pack("!H", len(self._topic)) + self._topic + struct.pack("!H", packet_id) + b"%d" % number
        sock.sendall(bytes([0x3A if dup else 0x32, len(body)]) + body)


def _read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data
