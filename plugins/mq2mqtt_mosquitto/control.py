"""What the sidecar and the hook say to each other: batches of operations, and the answers. Sans-I/O.

`docs/mosquitto-protocol.md` is the specification, `tests/data/control_v1.json` holds golden vectors that the hook
shares. All integers are little-endian.
"""

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from itertools import accumulate
from typing import Final

__all__ = [
    "ANSWER_TOPIC",
    "BATCH_BYTES",
    "BATCH_OPERATIONS",
    "CONTROL_TOPIC",
    "RESULTS_TOPIC",
    "Answer",
    "AnswerKind",
    "Clients",
    "ConnectedClient",
    "ControlError",
    "OperationCode",
    "Refused",
    "Result",
    "Results",
    "Stats",
    "Table",
    "Welcome",
    "WelcomeFlags",
    "decode_answer",
    "encode_batch",
    "encode_operation",
    "operation_at",
]

VERSION: Final = 1
CONTROL_TOPIC: Final = "$CONTROL/mq2mqtt/v1"
ANSWER_TOPIC: Final = "$mq2mqtt/v1"
RESULTS_TOPIC: Final = "$mq2mqtt/v1/results"

BATCH_OPERATIONS: Final = 256
"""Operations in a batch, at most."""
BATCH_BYTES: Final = 512 * 1024
"""Bytes of a batch, at most, unless a single operation is longer."""

_HEADER = struct.Struct("<BBHI")  # a batch's, and an answer's with its kind in place of the reserved byte
_OPERATION = struct.Struct("<BBHHHI")
_WELCOME = struct.Struct("<HHQIB")
_CLIENTS = struct.Struct("<BQ")
_SINCE = struct.Struct("<QB")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")


class ControlError(Exception):
    """Bytes that no hook of this version sends."""


class OperationCode(IntEnum):
    """What the hook is to do."""

    HELLO = 1
    """Say who you are: `Welcome`, then `Stats`."""
    TABLE = 2
    """Go by this lane table from now on: `Table`."""
    DELIVER = 3
    """Hand a message to one connected client."""
    PUBLISH = 4
    """Hand a message to the subscribers of its topic."""
    KICK = 5
    """Close a client's connection."""
    LIST = 6
    """Say who is connected: `Clients`, then `Stats`."""
    STATS = 7
    """Say what was counted, and what is wrong now: `Stats`."""


class AnswerKind(IntEnum):
    """What an answer is."""

    WELCOME = 1
    RESULTS = 2
    TABLE = 3
    CLIENTS = 4
    REFUSED = 5
    STATS = 6


class Result(IntEnum):
    """How one operation ended."""

    DELIVERED = 0
    """Handed to the broker for at least one session."""
    NO_SUBSCRIBER = 1
    OFFLINE = 2
    REFUSED = 3
    """By the broker."""


class WelcomeFlags(IntFlag):
    """What the hook works with."""

    EVENTS_2_1 = 1
    """Mosquitto 2.1's own connect and disconnect events."""
    ACL_ALLOW = 2
    AUTH_ALLOW = 4
    LANES_WITH_PROBLEMS = 8


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answer to HELLO."""

    version: tuple[int, int]
    """Of the hook."""
    boot_epoch: int
    """When it was loaded: microseconds since 1970."""
    table_crc: int
    """CRC-32 of the table in force; 0 for none."""
    flags: WelcomeFlags
    broker_version: str
    spool_path: str
    problems: tuple[str, ...]
    """One line for each lane that takes nothing now."""


@dataclass(frozen=True, slots=True)
class Results:
    """What became of a batch's operations, in their order."""

    results: bytes
    """A `Result` each."""


@dataclass(frozen=True, slots=True)
class Table:
    """Answer to TABLE."""

    ok: bool
    text: str
    """Why not, or one line for each lane that takes nothing now."""


@dataclass(frozen=True, slots=True)
class ConnectedClient:
    """One connected client."""

    client_id: str
    channel_id: str
    ip: str
    connected_ms: int
    """Milliseconds since 1970."""
    clean_session: bool


@dataclass(frozen=True, slots=True)
class Clients:
    """Answer to LIST, in chunks."""

    last: bool
    offset: int
    """Of the next event in the lane of client events when the list was made."""
    clients: tuple[ConnectedClient, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """A batch that was not understood; nothing of it was done."""

    position: int
    """Byte of the batch where the first bad operation begins."""
    text: str


@dataclass(frozen=True, slots=True)
class Stats:
    """What the hook has counted since it was loaded, and what is wrong now."""

    counters: dict[tuple[str, str], int]
    """By rule id (empty for the hook's own) and name."""
    problems: dict[str, str]
    """Why a lane takes nothing now: by rule id, or the name of the lane of client events."""


Answer = Welcome | Results | Table | Clients | Refused | Stats


def encode_operation(  # noqa: PLR0913 - the fields of an operation
    code: OperationCode,
    *,
    client_id: str = "",
    topic: str = "",
    qos: int = 0,
    properties: bytes = b"",
    payload: bytes = b"",
) -> bytes:
    """Return the bytes of one operation.

    Raises:
        ValueError: a field does not fit its place.
    """
    client = client_id.encode("utf-8", "surrogateescape")
    name = topic.encode("utf-8", "surrogateescape")
    try:
        header = _OPERATION.pack(code, qos, len(client), len(name), len(properties), len(payload))
    except struct.error as error:
        raise ValueError(f"a field does not fit into an operation: {error}") from error
    return b"".join((header, client, name, properties, payload))


def encode_batch(number: int, operations: Sequence[bytes]) -> bytes:
    """Return the payload of one publish to `CONTROL_TOPIC`; its answer bears `number`."""
    return b"".join((_HEADER.pack(VERSION, 0, len(operations), number), *operations))


def operation_at(operations: Sequence[bytes], position: int) -> int:
    """Return the index of the operation of a batch that holds byte `position`; of the last one if none does."""
    ends = accumulate((len(operation) for operation in operations), initial=_HEADER.size)
    return max(0, min(bisect_right(list(ends), position) - 1, len(operations) - 1))


def decode_answer(payload: bytes) -> tuple[int, Answer]:
    """Return the number of the batch that is answered, and the answer.

    Raises:
        ControlError: these bytes are no answer.
    """
    try:
        version, kind, count, number = _HEADER.unpack_from(payload)
        if version != VERSION:
            raise ControlError(f"an answer of protocol version {version}, this program knows {VERSION}")
        return number, _DECODERS[kind](payload[_HEADER.size :], count)
    except struct.error:
        raise ControlError("an answer is cut off") from None
    except KeyError:
        raise ControlError(f"an answer of unknown kind {kind}") from None


def _welcome(body: bytes, _count: int) -> Welcome:
    major, minor, epoch, crc, flags = _WELCOME.unpack_from(body)
    broker_version, _, rest = _text(body, _WELCOME.size).partition("\n")
    spool_path, _, problems = rest.partition("\n")
    return Welcome(
        (major, minor),
        epoch,
        crc,
        WelcomeFlags(flags & 0x0F),
        broker_version,
        spool_path,
        tuple(problems.splitlines()),
    )


def _results(body: bytes, count: int) -> Results:
    if len(body) != count or any(result > Result.REFUSED for result in body):
        raise ControlError(f"{len(body)} bytes of results for {count} operations, or an unknown result")
    return Results(body)


def _table(body: bytes, _count: int) -> Table:
    _need(body, 1)
    return Table(body[0] != 0, _text(body, 1))


def _clients(body: bytes, count: int) -> Clients:
    last, offset = _CLIENTS.unpack_from(body)
    clients = []
    position = _CLIENTS.size
    for _ in range(count):
        client_id, position = _field(body, position)
        channel_id, position = _field(body, position)
        ip, position = _field(body, position)
        connected_ms, clean = _SINCE.unpack_from(body, position)
        position += _SINCE.size
        clients.append(ConnectedClient(client_id, channel_id, ip, connected_ms, clean != 0))
    if position != len(body):
        raise ControlError(f"{len(body) - position} bytes after the last client")
    return Clients(last != 0, offset, tuple(clients))


def _refused(body: bytes, _count: int) -> Refused:
    (position,) = _U32.unpack_from(body)
    return Refused(position, body[_U32.size :].decode("utf-8", "replace"))


def _stats(body: bytes, count: int) -> Stats:
    counters = {}
    problems = {}
    *lines, rest = _text(body, 0).split("\n")
    for line in lines:
        name, _, rest_of_line = line.partition("\t")
        rule, _, value = rest_of_line.partition("\t")
        if name == "problem":
            problems[rule] = value
        elif value.isdecimal():
            counters[rule, name] = int(value)
        else:
            raise ControlError(f"a counter without a value: {line!r}")
    if rest or len(counters) + len(problems) != count:
        raise ControlError(f"{len(counters) + len(problems)} lines of counters, {count} were announced")
    return Stats(counters, problems)


_DECODERS: Final[dict[int, Callable[[bytes, int], Answer]]] = {
    AnswerKind.WELCOME: _welcome,
    AnswerKind.RESULTS: _results,
    AnswerKind.TABLE: _table,
    AnswerKind.CLIENTS: _clients,
    AnswerKind.REFUSED: _refused,
    AnswerKind.STATS: _stats,
}


def _need(body: bytes, size: int) -> None:
    if len(body) < size:
        raise ControlError("an answer is cut off")


def _text(body: bytes, at: int) -> str:
    """Return the text with a length of 32 bits that ends `body`."""
    (size,) = _U32.unpack_from(body, at)
    start = at + _U32.size
    if len(body) != start + size:
        raise ControlError(f"a text of {len(body) - start} bytes, {size} were announced")
    return body[start:].decode("utf-8", "replace")


def _field(body: bytes, at: int) -> tuple[str, int]:
    """Return the text with a length of 16 bits at `at`, and where it ends."""
    (size,) = _U16.unpack_from(body, at)
    start = at + _U16.size
    _need(body, start + size)
    return body[start : start + size].decode("utf-8", "surrogateescape"), start + size
