"""The bytes of a journal's records: spool frames with a JSON list, so that a torn end is known by its CRC."""

import json
from typing import Any, Final

from mq2mqtt.message import ClientEventType
from mq2mqtt.presence.state import (
    Announced,
    Begun,
    Came,
    Connection,
    Followed,
    Forgotten,
    Head,
    Kept,
    Noted,
    Record,
    Said,
    Told,
    Untold,
    Went,
)
from mq2mqtt.spool.frame import Frame, FrameKind, encode

__all__ = ["decode_record", "encode_record"]

_NAMES: Final[dict[type[Record], str]] = {
    Head: "head",
    Begun: "begun",
    Came: "came",
    Said: "said",
    Went: "went",
    Followed: "followed",
    Forgotten: "forgotten",
    Told: "told",
    Untold: "untold",
    Kept: "kept",
    Noted: "noted",
}
# Texts that are not UTF-8 come as lone surrogates: ASCII carries them.
_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def encode_record(record: Record) -> bytes:
    """Return the frame of a record."""
    return encode(
        Frame(FrameKind.EVENT, 0, 0, "", "", b"", _to_json([_NAMES[type(record)], *_fields(record)]).encode())
    )


def _fields(record: Record) -> list[Any]:
    match record:
        case Told():
            return _told(record)
        case Came(connection, source):
            return [_connection(connection), source]
        case Kept(rule_id, announced):
            return [rule_id, _announced(announced)]
        case Noted(told, before):
            return [_told(told), None if before is None else _announced(before)]
        case _:
            return [getattr(record, name) for name in record.__slots__]


def _connection(connection: Connection) -> list[Any]:
    return [
        connection.client_id,
        connection.channel_id,
        connection.client_ip,
        connection.connected_ms,
        connection.clean_session,
    ]


def _announced(announced: Announced) -> list[Any]:
    return [_connection(announced.connection), announced.ended_ms, announced.stale]


def _told(told: Told) -> list[Any]:
    return [told.rule_id, told.offset, told.type, _connection(told.connection), told.time_ms, told.seq, told.epoch]


def decode_record(frame: Frame) -> Record:
    """Return the record of a frame.

    Raises:
        ValueError: it holds no record.
    """
    try:
        name, *fields = json.loads(frame.payload)
        match name:
            case "told":
                return _read_told(fields)
            case "came":
                return Came(Connection(*fields[0]), fields[1])
            case "kept":
                return Kept(fields[0], _read_announced(fields[1]))
            case "noted":
                return Noted(_read_told(fields[0]), None if fields[1] is None else _read_announced(fields[1]))
            case _:
                record: Record = _PLAIN[name](*fields)
                return record
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"no record: {frame.payload[:200]!r}") from error


_PLAIN: Final[dict[str, Any]] = {name: kind for kind, name in _NAMES.items()}


def _read_announced(fields: list[Any]) -> Announced:
    connection, ended_ms, stale = fields
    return Announced(Connection(*connection), ended_ms, stale)


def _read_told(fields: list[Any]) -> Told:
    rule_id, offset, kind, connection, time_ms, seq, epoch = fields
    return Told(rule_id, offset, ClientEventType(kind), Connection(*connection), time_ms, seq, epoch)
