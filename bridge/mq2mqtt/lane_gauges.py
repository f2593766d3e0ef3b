"""What the metrics say of a lane, whoever reads it."""

import time

from mq2mqtt.spool.follower import FollowedLane
from mq2mqtt.spool.lane import Lane
from mq2mqtt.telemetry import RuleTelemetry

__all__ = ["oldest_seconds", "refresh_lane_gauges"]


def refresh_lane_gauges(telemetry: RuleTelemetry, lane: Lane | FollowedLane, *, accepted_before: int) -> None:
    """Bring all gauges of `lane` but its age up to date.

    Of a followed one also `accepted`, which goes on from `accepted_before`.
    """
    if isinstance(lane, FollowedLane):
        # Nobody here accepts anything: what has come is seen.
        taken, telemetry.lane_messages = lane.counts()
        telemetry.outcomes["accepted"] = accepted_before + taken
    else:
        telemetry.lane_messages = lane.messages
    telemetry.lane_bytes = lane.unsent_bytes
    telemetry.lane_limit_bytes = lane.max_bytes


def oldest_seconds(lane: Lane | FollowedLane) -> float:
    """Return the age of the oldest message that waits, 0 without one.

    Raises:
        LaneError: it cannot be read.
    """
    oldest_us = lane.oldest_us
    return 0.0 if oldest_us is None else max(0.0, time.time() - oldest_us / 1e6)
