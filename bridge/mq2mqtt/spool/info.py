"""`lane.json`: whose lane a directory is."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from mq2mqtt.errors import LaneCorruptError, LaneMisplacedError
from mq2mqtt.spool.files import map_errors, replace_file

__all__ = ["INFO_NAME", "LaneInfo", "read_info", "write_info"]

INFO_NAME: Final = "lane.json"
_VERSION = 1
_END_OF_TIME = 1 << 63


@dataclass(frozen=True, slots=True)
class LaneInfo:
    """What `lane.json` says. `target` is the RocketMQ topic that a lane of a deleted rule drains to."""

    rule: str
    target: str
    created_us: int
    version: int = _VERSION


def read_info(lane: Path) -> LaneInfo | None:
    """Read `lane.json`; `None` if it is missing or empty (a loss of power while it was made).

    Raises:
        LaneMisplacedError: it is of another rule.
        LaneCorruptError: it is of another version, or not what this program writes.
        LaneError: it cannot be read.
    """
    path = lane / INFO_NAME
    with map_errors(path, "read"):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
    if not data.strip(b"\0"):
        return None
    try:
        fields = json.loads(data)
        info = LaneInfo(fields["rule"], fields["target"], fields["created_us"], fields["version"])
        if not (
            isinstance(info.rule, str)
            and isinstance(info.target, str)
            and type(info.created_us) is int
            and 0 <= info.created_us < _END_OF_TIME
        ):
            raise ValueError("a field has the wrong type")  # noqa: TRY301 - as the others, below
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LaneCorruptError(
            f"{path}: not a lane's description; move it away, it is made anew from the segments"
        ) from error
    if info.version != _VERSION:
        raise LaneCorruptError(f"{path}: lane version {info.version}, this program knows {_VERSION}")
    if info.rule != lane.name:
        raise LaneMisplacedError(
            f"{path}: the lane of rule {info.rule}; give the directory that name back, or move it out of the spool"
        )
    return info


def write_info(lane: Path, info: LaneInfo) -> None:
    """Replace `lane.json`, safe against a loss of power.

    Raises:
        LaneError: it cannot be written; the old one is still there.
    """
    path = lane / INFO_NAME
    with map_errors(path, "write"):
        replace_file(path, json.dumps(asdict(info)).encode() + b"\n", sync=True)
