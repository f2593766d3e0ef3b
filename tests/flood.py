"""A QoS 1 publisher at full speed that goes on through broken connections, and knows what was acknowledged to it."""

import socket
import struct
import sys
import threading
import time

from tests.mqtt_client import connect_packet

_WINDOW = 1000
_IDS = 65_000
_TIMEOUT_SECONDS = 30.0
_CONNACK_BYTES = _PUBACK_BYTES = 4


class Flood(threading.Thread):
    """Publishes 0, 1, 2 ... to `topic`, at most `limit`, each padded to 64 bytes; `_WINDOW` are in flight.

    A broker acknowledges in order (MQTT-4.6.0-2), so `acknowledged`, a count, says which. After a reconnect it goes on
    behind them. `longest_stall` is as in `tests.stream.Stream`.
    """

    def __init__(self, port: int, topic: str, *, client_id: str = "GID_flood@@@1", limit: int = sys.maxsize) -> None:
        super().__init__(name=f"flood {topic}", daemon=True)
        self._address = ("127.0.0.1", port)
        self.client_id = client_id
        name = topic.encode()
        self._head = b"\x32" + bytes([2 + len(name) + 2 + 64]) + struct.pack("!H", len(name)) + name
        self._limit = limit
        self._ending = threading.Event()
        self._given_up = False
        self.acknowledged = 0
        self.connections = 0
        self.longest_stall = 0.0
        self._acknowledged_at = 0.0

    @property
    def bodies(self) -> set[bytes]:
        """What was acknowledged."""
        return {b"%064d" % number for number in range(self.acknowledged)}

    def stop(self) -> None:
        """End when what was sent is acknowledged."""
        self._ending.set()
        self.join(2 * _TIMEOUT_SECONDS)
        assert not self.is_alive()

    def give_up(self) -> None:
        """End without waiting for anything."""
        self._given_up = True
        self._ending.set()

    def run(self) -> None:
        self._acknowledged_at = time.monotonic()
        while not self._given_up:
            try:
                with socket.create_connection(self._address, timeout=_TIMEOUT_SECONDS) as sock:
                    self._connect(sock)
                    self._publish(sock)
                    return
            except (OSError, EOFError):
                time.sleep(0.02)

    def _connect(self, sock: socket.socket) -> None:
        sock.sendall(connect_packet(self.client_id))
        if len(sock.recv(_CONNACK_BYTES, socket.MSG_WAITALL)) < _CONNACK_BYTES:
            raise EOFError
        self.connections += 1

    def _publish(self, sock: socket.socket) -> None:
        """Return when all is acknowledged."""
        sent, partial = self.acknowledged, 0
        while not self._given_up:
            end = sent if self._ending.is_set() else min(self.acknowledged + _WINDOW, self._limit)
            sock.sendall(b"".join(map(self._packet, range(sent, end))))
            sent = max(sent, end)
            if self.acknowledged == sent:
                return
            data = sock.recv(65_536)
            if not data:
                raise EOFError
            count, partial = divmod(partial + len(data), _PUBACK_BYTES)
            self.acknowledged += count
            now = time.monotonic()
            self.longest_stall = max(self.longest_stall, now - self._acknowledged_at)
            self._acknowledged_at = now

    def _packet(self, number: int) -> bytes:
        return b"%b%b%064d" % (self._head, struct.pack("!H", number % _IDS + 1), number)
