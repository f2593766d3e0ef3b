"""The cursor file: up to which offset everything is settled, and where in the segments that is.

Two slots are overwritten in turn, each with its own CRC, so a write that is cut or lost costs at most the last steps:
those messages are sent again. It is never fsynced: it lags behind the truth, it cannot run ahead of it.
"""

import os
import struct
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

from mq2mqtt.errors import LaneError
from mq2mqtt.spool.files import map_errors, open_file

__all__ = ["CURSOR_NAME", "CursorFile", "Head", "read_cursor"]

CURSOR_NAME: Final = "cursor"
_MAGIC = b"mq2curs\n"
_VERSION = 1
_RECORD = struct.Struct("<8sIQQQQ")
_CRC = struct.Struct("<I")
_RECORD_BYTES = _RECORD.size + _CRC.size
# A sector each: a torn write of one slot leaves the other one whole.
_SLOT_BYTES = 512
_SLOTS = 2


class Head(NamedTuple):
    """Where the oldest unsettled message is, or the next one will be."""

    offset: int
    segment: int
    """Base offset of the segment file."""
    position: int
    """Byte in that file."""


def _parse(data: bytes, created_us: int) -> list[Head]:
    heads: list[Head] = []
    for slot in range(_SLOTS):
        record = data[slot * _SLOT_BYTES : slot * _SLOT_BYTES + _RECORD_BYTES]
        if len(record) == _RECORD_BYTES and _CRC.unpack_from(record, _RECORD.size)[0] == crc32(record[: _RECORD.size]):
            magic, version, created, *fields = _RECORD.unpack_from(record)
            if (magic, version, created) == (_MAGIC, _VERSION, created_us):
                heads.append(Head(*fields))
    return heads


def read_cursor(lane: Path, created_us: int) -> tuple[Head | None, str | None]:
    """Return the stored head and why there is none although the file is there.

    Raises:
        LaneError: the file cannot be read.
    """
    path = lane / CURSOR_NAME
    with map_errors(path, "read"):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None, None
    if not data:
        # Made, and nothing settled yet: the writer was killed before its first `store`.
        return None, None
    heads = _parse(data, created_us)
    if heads:
        return max(heads), None
    return None, f"{path}: damaged or of another lane; starting at the oldest message, some may be sent twice"


class CursorFile:
    """Writes the cursor of one lane; one `pwrite` into the page cache each time, no fsync."""

    def __init__(self, lane: Path, created_us: int) -> None:
        """Open the file, making it if it is missing.

        Raises:
            LaneError: it cannot be opened.
        """
        self._path = lane / CURSOR_NAME
        self._created_us = created_us
        self._slot = 0
        with map_errors(self._path, "open"):
            self._descriptor = open_file(self._path, os.O_RDWR | os.O_CREAT)

    def store(self, head: Head) -> None:
        """Write `head` over the older slot.

        Raises:
            LaneError: not written; the slot before is still there.
        """
        record = _RECORD.pack(_MAGIC, _VERSION, self._created_us, *head)
        try:
            os.pwrite(self._descriptor, record + _CRC.pack(crc32(record)), self._slot * _SLOT_BYTES)
        except OSError as error:
            raise LaneError(f"cannot write {self._path}: {error.strerror}") from error
        self._slot ^= 1

    def close(self) -> None:
        """Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
