"""Batches for `$CONTROL/mq2mqtt/v1`, packed as docs/mosquitto-protocol.md says."""

import struct
from typing import Final, NamedTuple

HELLO, TABLE, DELIVER, PUBLISH, KICK, LIST, STATS = range(1, 8)
BATCH_BYTES: Final = 8
"""Of the header."""


class Operation(NamedTuple):
    code: int
    qos: int = 0
    client_id: bytes = b""
    topic: bytes = b""
    properties: bytes = b""
    payload: bytes = b""

    def pack(self) -> bytes:
        fields = self[2:]
        return struct.pack("<BBHHHI", self.code, self.qos, *map(len, fields)) + b"".join(fields)


def batch(*operations: Operation, number: int = 7, count: int | None = None) -> bytes:
    packed = b"".join(operation.pack() for operation in operations)
    return struct.pack("<BBHI", 1, 0, len(operations) if count is None else count, number) + packed
