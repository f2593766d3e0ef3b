"""What `mq2mqtt spool` and `mq2mqtt parked` print and do. Takes no locks: the bridge may be running."""

import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import typer

from mq2mqtt.errors import LaneCorruptError, LaneError
from mq2mqtt.parking import find_lane, owner, replay
from mq2mqtt.receipts import RECEIPTS_SUFFIX
from mq2mqtt.settings import Settings
from mq2mqtt.spool.frame import Frame, FrameKind
from mq2mqtt.spool.inspect import LaneSummary, lane_directories, read_entries, summarize_all
from mq2mqtt.spool.parked import ParkedMessage, drop, keys_of, list_parked, read_parked

__all__ = ["drop_parked", "list_lanes", "list_parked_messages", "replay_parked", "show_lane", "show_parked"]

_OK, _PROBLEMS = 0, 1
_MAX_PAYLOAD_SHOWN = 512


def list_lanes(settings: Settings) -> int:
    """Print one line per lane."""
    summaries = summarize_all(settings.spool.path)
    _table(("LANE", "TARGET", "MESSAGES", "BYTES", "OLDEST", "PARKED"), map(_lane_row, summaries))
    for summary in summaries:
        if summary.problem:
            typer.echo(f"PROBLEM  {summary.problem}")
    return _PROBLEMS if any(summary.problem for summary in summaries) else _OK


def _lane_row(summary: LaneSummary) -> tuple[str, ...]:
    age = "-" if summary.oldest_us is None else f"{max(0.0, time.time() - summary.oldest_us / 1e6):.0f} s"
    counts = (str(summary.messages), str(summary.bytes), age, str(summary.parked))
    return (summary.rule, summary.target or "-", *counts)


def show_lane(settings: Settings, lane: str, *, limit: int) -> int:
    """Print the messages that wait in `lane`, oldest first."""
    path = find_lane(settings.spool.path, lane)
    try:
        for entry in islice(read_entries(path), limit):
            typer.echo(f"offset {entry.offset}  accepted {_time(entry.frame.accepted_us)}")
            _show_frame(path.name, entry.frame)
    except LaneError as error:
        typer.echo(f"PROBLEM  {error}")
        return _PROBLEMS
    return _OK


def list_parked_messages(settings: Settings) -> int:
    """Print one line per parked message of all rules."""
    rows: list[tuple[str, ...]] = []
    damaged: list[LaneCorruptError] = []
    for path in lane_directories(settings.spool.path):
        # One at a time: together they may be more than the memory.
        found = [_parked_row(path, key, damaged) for key in keys_of(path)]
        rows += [row for _, row in sorted(filter(None, found))]
    _table(("RULE", "KEY", "PARKED", "STATE", "REASON"), rows)
    return _tell_of(damaged)


def _parked_row(lane: Path, key: str, damaged: list[LaneCorruptError]) -> tuple[int, tuple[str, ...]] | None:
    """Return when it was parked and its line, or note that it is damaged."""
    try:
        parked = read_parked(lane, key)
    except LaneCorruptError as error:
        damaged.append(error)
        return None
    if parked is None:
        return None
    return parked.parked_us, (lane.name, key, _time(parked.parked_us), _state(parked), parked.reason)


def show_parked(settings: Settings, lane: str, *, limit: int) -> int:
    """Print a rule's parked messages whole, oldest first."""
    damaged: list[LaneCorruptError] = []
    for parked in list_parked(find_lane(settings.spool.path, lane), on_damage=damaged.append)[:limit]:
        _show_parked(lane, parked)
    return _tell_of(damaged)


def replay_parked(settings: Settings, lane: str, keys: Sequence[str]) -> int:
    """Have the bridge send the messages of `lane` with these keys again, all without keys; say what comes of each.

    Raises:
        ConfigError: there is no such lane, or its rule is gone.
    """
    path = find_lane(settings.spool.path, lane)
    rule = owner(settings.rule_set, lane)
    problems: list[object] = []
    asked = 0
    for key in keys or sorted(keys_of(path), key=len):
        try:
            problem = replay(settings.rule_set, path, key)
        except LaneError as error:
            problems.append(error)
            continue
        if problem is None:
            asked += 1
        else:
            problems.append(f"{key}: {problem}")
    typer.echo(f"{asked} to be replayed: within seconds by a bridge that runs, else at its next start")
    if asked and not rule.enabled:
        typer.echo(f"rule {rule.id} is disabled: they may wait until it is enabled")
    return _tell_of(problems)


def drop_parked(settings: Settings, lane: str, keys: Sequence[str]) -> int:
    """Delete the messages of `lane` with these keys, all without keys."""
    path = find_lane(settings.spool.path, lane)
    problems: list[object] = []
    dropped = 0
    for key in keys or keys_of(path):
        if drop(path, key):
            dropped += 1
        else:
            problems.append(f"there is no parked message {key} of {lane}")
    typer.echo(f"{dropped} dropped")
    return _tell_of(problems)


def _state(parked: ParkedMessage) -> str:
    return "replay" if parked.replaying else "parked"


def _tell_of(problems: Iterable[object]) -> int:
    """Print a line for each; return the exit code."""
    code = _OK
    for problem in problems:
        typer.echo(f"PROBLEM  {problem}")
        code = _PROBLEMS
    return code


def _show_parked(lane: str, parked: ParkedMessage) -> None:
    state = "  to be replayed" if parked.replaying else ""
    typer.echo(f"key {parked.key}  parked {_time(parked.parked_us)}{state}  reason: {parked.reason}")
    _show_frame(lane, parked.frame)


def _show_frame(lane: str, frame: Frame) -> None:
    if frame.kind == FrameKind.ROCKETMQ:
        is_receipt = lane.endswith(RECEIPTS_SUFFIX)
        topic = frame.topic.encode("utf-8", "backslashreplace").decode()
        what = f"receipt for MQTT topic {frame.topic!r}" if is_receipt else f"RocketMQ topic {topic}"
        typer.echo(f"  {what}, born {_time(frame.accepted_us)}")
        for text in frame.properties.decode("utf-8", "backslashreplace").split("\x02"):
            name, _, value = text.partition("\x01")
            if name:
                typer.echo(f"  {name} = {value}")
    elif frame.kind == FrameKind.EVENT:
        typer.echo(f"  event of client {frame.client_id!r}")
    else:
        flags = [f"QoS {frame.qos}", "clean session" if frame.clean_session else "persistent session"]
        flags += ["retain"] if frame.retain else []
        flags += ["will"] if frame.will else []
        typer.echo(f"  MQTT topic {frame.topic!r}, client {frame.client_id!r}, {', '.join(flags)}")
    more = f" ... {len(frame.payload)} bytes in all" if len(frame.payload) > _MAX_PAYLOAD_SHOWN else ""
    typer.echo(f"  payload {frame.payload[:_MAX_PAYLOAD_SHOWN]!r}{more}")


def _time(microseconds: int) -> str:
    try:
        return datetime.fromtimestamp(microseconds / 1e6, tz=UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        # Whoever sent it to RocketMQ chose when it was born: maybe after the year 9999.
        return f"{microseconds} us after 1970"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
