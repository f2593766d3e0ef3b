"""A status rule at work: client events into its lane, which this process writes on every host."""

from typing import Final

from mq2mqtt.rules import Rule, StatusRule
from mq2mqtt.spool.lane import Lane
from mq2mqtt.workers import LaneWorker

__all__ = ["UNSEEN", "StatusWorker"]

UNSEEN: Final = "a plain MQTT client cannot see who is connected: see docs/mqtt.md; set `enabled: false`"
"""Why a status rule is down on a host that does not see its clients."""


class StatusWorker(LaneWorker):
    """A status rule: `Presence` tells its lane who comes and goes."""

    def fits(self, rule: Rule) -> bool:
        """See `Worker.fits`."""
        return isinstance(rule, StatusRule)

    def _attach(self, lane: Lane) -> None:
        self._place.presence.attach(lane, self.telemetry)

    def close(self) -> None:
        """See `Worker.close`."""
        self._place.presence.detach(self.telemetry.rule_id)
        super().close()

    def remove(self) -> None:
        """See `Worker.remove`."""
        self._place.presence.detach(self.telemetry.rule_id)
        super().remove()
        self._place.presence.forget(self.telemetry.rule_id)
