"""A lane with its writer on one side and its follower on the other, for the tests of both."""

from pathlib import Path
from typing import Any

from mq2mqtt.spool.cursor import read_cursor
from mq2mqtt.spool.follower import FollowedLane
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.recovery import unsettled
from mq2mqtt.spool.watching import Watcher
from tests.unit.spool.lanes import MACHINE


def follow(path: Path, *, max_bytes: int = 1 << 20, watcher: Watcher, machine: Machine = MACHINE) -> FollowedLane:
    lane = FollowedLane.open(path, max_bytes=max_bytes, target="mq_a", watcher=watcher, machine=machine)
    assert lane is not None
    return lane


def learn_from_cursor(writer: Lane) -> None:
    """Let the writer see what the reader has settled, as the hook does."""
    head, _ = read_cursor(writer.path, writer.info.created_us)
    if head is not None:
        writer.head = head
        writer.messages, writer.unsent_bytes = unsettled(writer.segments(), head)


class Writer(Lane):
    """Leaves it to the reader to delete what is settled, as the hook does."""

    def _delete_settled(self) -> None:
        pass


class Pair:
    """Looks like a `Lane`: what is appended goes through the writer, everything else is the follower's."""

    def __init__(self, spool: Path, *, max_bytes: int = 1 << 20) -> None:
        self.open_writer(spool / "rule-a", max_bytes=max_bytes, machine=MACHINE)
        self.watcher = Watcher()
        self.followed = follow(self.writer.path, max_bytes=max_bytes, watcher=self.watcher)

    def open_writer(self, path: Path, *, max_bytes: int, machine: Machine) -> None:
        self.writer = Writer.open(path, max_bytes=max_bytes, target="mq_a", machine=machine)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a test asks of a lane
        return getattr(self.followed, name)

    def append(self, frame: bytes) -> int:
        learn_from_cursor(self.writer)
        return self.writer.append(frame)

    @property
    def next_offset(self) -> int:
        return self.writer.next_offset

    def close(self) -> None:
        self.followed.close()
        self.watcher.close()
        self.writer.close()
