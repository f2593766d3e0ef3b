"""The hook's side of the control protocol, for tests: what the product only sends is read, what it reads is made."""

import struct
from dataclasses import dataclass

from mq2mqtt_mosquitto.control import AnswerKind, Clients, Stats, Welcome

_HEADER = struct.Struct("<BBHI")
_OPERATION = struct.Struct("<BBHHHI")


@dataclass(frozen=True)
class Operation:
    code: int
    client_id: str = ""
    topic: str = ""
    qos: int = 0
    properties: bytes = b""
    payload: bytes = b""


def decode_batch(data: bytes) -> tuple[int, list[Operation]]:
    version, reserved, count, number = _HEADER.unpack_from(data)
    assert (version, reserved) == (1, 0)
    operations = []
    position = _HEADER.size
    for _ in range(count):
        code, qos, *sizes = _OPERATION.unpack_from(data, position)
        position += _OPERATION.size
        fields = []
        for size in sizes:
            assert position + size <= len(data)
            fields.append(data[position : position + size])
            position += size
        client_id, topic, properties, payload = fields
        operations.append(Operation(code, client_id.decode(), topic.decode(), qos, properties, payload))
    assert position == len(data)
    return number, operations


def answer(kind: AnswerKind, number: int, body: bytes, *, count: int = 0) -> bytes:
    return _HEADER.pack(1, kind, count, number) + body


def text(value: str) -> bytes:
    return struct.pack("<I", len(value.encode())) + value.encode()


def welcome(number: int, value: Welcome) -> bytes:
    head = struct.pack("<HHQIB", *value.version, value.boot_epoch, value.table_crc, value.flags)
    lines = "".join(f"{line}\n" for line in (value.broker_version, value.spool_path, *value.problems))
    return answer(AnswerKind.WELCOME, number, head + text(lines))


def results(number: int, values: bytes) -> bytes:
    return answer(AnswerKind.RESULTS, number, values, count=len(values))


def table(number: int, *, ok: bool, reason: str = "") -> bytes:
    return answer(AnswerKind.TABLE, number, bytes((ok,)) + text(reason))


def clients(number: int, value: Clients) -> bytes:
    body = struct.pack("<BQ", value.last, value.offset)
    for client in value.clients:
        for field in (client.client_id, client.channel_id, client.ip):
            body += struct.pack("<H", len(field.encode())) + field.encode()
        body += struct.pack("<QB", client.connected_ms, client.clean_session)
    return answer(AnswerKind.CLIENTS, number, body, count=len(value.clients))


def refused(number: int, position: int, reason: str) -> bytes:
    return answer(AnswerKind.REFUSED, number, struct.pack("<I", position) + reason.encode())


def stats(number: int, value: Stats) -> bytes:
    lines = "".join(f"{name}\t{rule}\t{count}\n" for (rule, name), count in value.counters.items())
    lines += "".join(f"problem\t{rule}\t{problem}\n" for rule, problem in value.problems.items())
    return answer(AnswerKind.STATS, number, text(lines), count=len(value.counters) + len(value.problems))
