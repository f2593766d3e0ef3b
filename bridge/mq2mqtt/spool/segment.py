"""Segment files: their header, their names, and the chain that they form. Sans-I/O but for the listing."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

from mq2mqtt.errors import LaneCorruptError

__all__ = ["HEADER_BYTES", "SUFFIX", "Segment", "SegmentHeader", "segment_name"]

SUFFIX: Final = ".seg"
VERSION: Final = 1
_MAGIC = b"mq2lane\n"
_HEADER = struct.Struct("<8sHHIQQQQQ16sI")
_CRC = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size + _CRC.size
"""80: frames begin here."""
_NAME_DIGITS = 20


class SegmentHeader(NamedTuple):
    """What a segment says of itself and of the one before it, so that a missing or shortened file shows."""

    base: int
    """Offset of its first frame."""
    created_us: int
    """The lane's creation time, as in `lane.json`: a segment of another lane shows."""
    previous_base: int
    """Base of the segment before; 0 for none."""
    previous_end: int
    """Offset after the last frame of the segment before. Less than `base` where offsets were skipped."""
    previous_bytes: int
    """Length of the segment before, with its header."""
    boot_id: bytes
    """Which boot of the machine made it (16 bytes, zeros if unknown): only a later boot may find a garbled tail."""

    def pack(self) -> bytes:
        """Return the first `HEADER_BYTES` of the file."""
        body = _HEADER.pack(_MAGIC, VERSION, HEADER_BYTES, 0, *self, 0)
        return body + _CRC.pack(crc32(body))

    @classmethod
    def unpack(cls, data: bytes, path: Path) -> "SegmentHeader":
        """Read a header.

        Raises:
            LaneCorruptError: it is none, is damaged, is of another version, or is not the one of this file name.
        """
        if len(data) < HEADER_BYTES or data[: len(_MAGIC)] != _MAGIC:
            raise LaneCorruptError(f"{path}: byte 0: no segment of a lane; move the file away")
        _, version, header_bytes, _, *fields, _ = _HEADER.unpack_from(data)
        if (version, header_bytes) != (VERSION, HEADER_BYTES):
            raise LaneCorruptError(
                f"{path}: byte 8: segment version {version}, this program knows {VERSION};"
                " drain it with the program that wrote it"
            )
        if _CRC.unpack_from(data, _HEADER.size)[0] != crc32(data[: _HEADER.size]):
            raise LaneCorruptError(f"{path}: byte 0: damaged segment header (CRC mismatch); restore or move the file")
        header = cls(*fields)
        if segment_name(header.base) != path.name:
            raise LaneCorruptError(f"{path}: its header says {segment_name(header.base)}; give it that name back")
        return header


@dataclass(slots=True, eq=False)
class Segment:
    """One segment file as a lane knows it; `end` and `size` grow while it is the last one."""

    path: Path
    base: int
    end: int
    """Offset after its last frame."""
    size: int
    """Bytes that may be read: header and whole frames."""
    next: "Segment | None" = None


def segment_name(base: int) -> str:
    """Return the file name of the segment whose first offset is `base`: names sort as offsets do."""
    return f"{base:0{_NAME_DIGITS}d}{SUFFIX}"
