"""One outbound rule at work: its lane with both ends, and what it has parked."""

import shutil
import time
from pathlib import Path

from mq2mqtt.intake import LaneIntake
from mq2mqtt.link import RocketLink
from mq2mqtt.settings import SpoolSettings
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.parked import ParkedStore
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.telemetry import RuleState, RuleTelemetry
from mq2mqtt.uplink import Uplink

__all__ = ["Outlet"]


class Outlet:
    """Owns the directory `spool/<rule id>/`.

    Raises:
        LaneError: the lane cannot be used, or another process uses it; the text names the file.
    """

    def __init__(  # noqa: PLR0913 - the composition root names each
        self, path: Path, *, target: str, node: str, spool: SpoolSettings, link: RocketLink, telemetry: RuleTelemetry
    ) -> None:
        self._telemetry = telemetry
        self._lane = Lane.open(path, max_bytes=spool.max_bytes, target=target, durability=spool.durability)
        try:
            self._reader = LaneReader(self._lane)
            self._parked = ParkedStore(path, max_bytes=spool.max_bytes, durability=spool.durability)
        except BaseException:
            self._lane.close()
            raise
        telemetry.outcomes["accepted"] = self._lane.messages
        self.intake = LaneIntake(lane=self._lane, telemetry=telemetry)
        self.uplink = Uplink(
            target=target,
            node=node,
            lane=self._lane,
            reader=self._reader,
            parked=self._parked,
            link=link,
            telemetry=telemetry,
        )

    @property
    def is_done(self) -> bool:
        """Whether this is the lane of a rule that is gone, and nothing waits in it."""
        return self._telemetry.state is RuleState.DRAINING and not self._lane.messages

    def refresh_gauges(self) -> None:
        """Bring the lane's gauges up to date; called before each scrape."""
        oldest_us = self._lane.oldest_us
        self._telemetry.lane_messages = self._lane.messages
        self._telemetry.lane_bytes = self._lane.unsent_bytes
        self._telemetry.lane_limit_bytes = self._lane.max_bytes
        self._telemetry.lane_oldest_seconds = 0.0 if oldest_us is None else max(0.0, time.time() - oldest_us / 1e6)
        self._telemetry.parked_messages = self._parked.count

    def close(self) -> None:
        """Let the files and the locks go. Idempotent."""
        self._reader.close()
        self._lane.close()

    def remove(self) -> None:
        """Close, and delete the lane of a rule that is gone; what it has parked stays for an operator."""
        self.close()
        if not self._parked.count:
            shutil.rmtree(self._lane.path)
