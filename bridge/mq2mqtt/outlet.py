"""One outbound rule's lane at work: both its ends, and what it has parked."""

from pathlib import Path

from loguru import logger

from mq2mqtt.errors import LaneError
from mq2mqtt.lane_gauges import oldest_seconds, refresh_lane_gauges
from mq2mqtt.link import RocketLink
from mq2mqtt.replay import LaneReplay
from mq2mqtt.settings import SpoolSettings
from mq2mqtt.spool.files import map_errors
from mq2mqtt.spool.follower import FollowedLane
from mq2mqtt.spool.info import INFO_NAME, read_info
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.parked import ParkedStore
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.spool.recovery import PARKED_NAME, list_segments
from mq2mqtt.telemetry import RuleTelemetry
from mq2mqtt.uplink import Uplink

__all__ = ["Outlet", "is_lane"]


class Outlet:
    """Owns the directory `spool/<rule id>/`, and `lane`: its own to write too, or followed.

    Raises:
        LaneError: the lane cannot be read, or another process reads it; the text names the file.
    """

    def __init__(  # noqa: PLR0913 - the composition root names each
        self,
        lane: Lane | FollowedLane,
        *,
        target: str,
        node: str,
        spool: SpoolSettings,
        link: RocketLink,
        telemetry: RuleTelemetry,
    ) -> None:
        self._telemetry = telemetry
        self.lane = lane
        try:
            self._reader = LaneReader(self.lane)
            self._parked = ParkedStore(lane.path, max_bytes=spool.max_bytes, durability=spool.durability)
        except BaseException:
            self.lane.close()
            raise
        self._accepted_before = telemetry.outcomes["accepted"]
        telemetry.outcomes["accepted"] += self.lane.messages
        self._note_fails = False
        self._age_fails = False
        self.uplink = Uplink(
            target=target,
            node=node,
            lane=self.lane,
            reader=self._reader,
            parked=self._parked,
            link=link,
            telemetry=telemetry,
        )
        self._replay = LaneReplay(self._parked, self.uplink, telemetry)

    async def run(self) -> None:
        """Send what waits until `uplink.finish`, and what is to be replayed."""
        try:
            await self.uplink.run()
            await self._replay.close()
        finally:
            self._replay.stop()

    @property
    def is_empty(self) -> bool:
        """Whether RocketMQ has all that the lane took, and nobody else writes it."""
        # Asked again: the writer may have added some just before it let go.
        return not self.lane.messages and self.lane.is_released() and not self.lane.messages

    def retarget(self, target: str) -> None:
        """Send to another RocketMQ topic from now on, also what waits."""
        self.uplink.retarget(target)
        self.note_target()

    def watch(self) -> None:
        """Look after what has no event; called about once a second."""
        self.note_target()
        self._replay.look()

    def note_target(self) -> None:
        """Note in `lane.json` where the lane drains to when its rule is gone; call again what the disk refused."""
        try:
            self.lane.retarget(self.uplink.target)
        except LaneError as error:
            if not self._note_fails:
                logger.warning("rule {}: target not noted yet: {}", self.uplink.rule_id, error)
            self._note_fails = True
        else:
            self._note_fails = False

    def refresh_gauges(self) -> None:
        """Bring the lane's gauges up to date; called before each scrape."""
        before = self._accepted_before + self._replay.count
        refresh_lane_gauges(self._telemetry, self.lane, accepted_before=before)
        self._telemetry.parked_messages = self._parked.count
        try:
            self._telemetry.lane_oldest_seconds = oldest_seconds(self.lane)
        except LaneError as error:
            # The age stays the last one known: one bad file must not hide the other metrics.
            if not self._age_fails:
                logger.error("rule {}: the age of its oldest message is not known: {}", self.uplink.rule_id, error)
            self._age_fails = True
        else:
            self._age_fails = False

    def close(self) -> None:
        """Let the files and the locks go. Idempotent."""
        self._reader.close()
        self.lane.close()

    def remove(self) -> None:
        """Close, and delete the lane of a rule that is gone; what it has parked stays for an operator.

        Raises:
            LaneError: the directory cannot be changed.
        """
        try:
            # With the locks held: another process may wait to write here.
            _delete_lane(self.lane.path)
        finally:
            self.close()


def is_lane(path: Path) -> bool:
    """Whether `path`, a directory of the spool or nothing, holds a lane and not only parked messages.

    Raises:
        LaneError: it cannot be read.
    """
    with map_errors(path, "read"):
        return path.is_dir() and (read_info(path) is not None or bool(list_segments(path)))


def _delete_lane(path: Path) -> None:
    """Delete a drained lane. Segments go first: without a cursor beside them they would be sent once more."""
    with map_errors(path, "delete"):
        for segment in list_segments(path):
            segment.unlink()
        others = [entry for entry in path.iterdir() if entry.name not in (INFO_NAME, PARKED_NAME)]
        for entry in (*others, path / INFO_NAME):
            entry.unlink(missing_ok=True)
        parked = path / PARKED_NAME
        if parked.is_dir() and not any(parked.iterdir()):
            parked.rmdir()
        if not parked.exists():
            path.rmdir()
