"""A status rule at work: client events into its lane, which this process writes on every host."""

import asyncio
from typing import Final

from mq2mqtt.rules import Rule, StatusRule
from mq2mqtt.spool.lane import Lane
from mq2mqtt.telemetry import RuleTelemetry
from mq2mqtt.workers import LaneWorker, Workplace

__all__ = ["UNSEEN", "StatusWorker"]

UNSEEN: Final = "a plain MQTT client cannot see who is connected: see docs/mqtt.md; set `enabled: false`"
"""Why a status rule is down on a host that does not see its clients."""


_LOOK_SECONDS = 0.02


class StatusWorker(LaneWorker):
    """A status rule: `Presence` tells its lane who comes and goes."""

    def __init__(self, place: Workplace, telemetry: RuleTelemetry, *, target: str) -> None:
        super().__init__(place, telemetry, target=target)
        self._last_words: asyncio.Task[None] | None = None

    def fits(self, rule: Rule) -> bool:
        """See `Worker.fits`."""
        return isinstance(rule, StatusRule)

    def _attach(self, lane: Lane) -> None:
        self._place.presence.attach(lane, self.telemetry)

    def finish(self) -> None:
        """See `Worker.finish`. What ended with the broker is still sent: nobody else tells of it before it is back."""
        if self._outlet is None or self._outlet.is_empty or not self.telemetry.up:
            super().finish()
        elif self._last_words is None:
            name = f"mq2mqtt.status[{self.telemetry.rule_id}].finish"
            self._last_words = asyncio.create_task(self._finish_when_empty(), name=name)

    async def _finish_when_empty(self) -> None:
        # Only its reader is told of what a lane has settled.
        while self.telemetry.up and self._outlet is not None and not self._outlet.is_empty:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_SECONDS)
        super().finish()

    def close(self) -> None:
        """See `Worker.close`."""
        if self._last_words is not None:
            self._last_words.cancel()
        self._place.presence.detach(self.telemetry.rule_id)
        super().close()

    def remove(self) -> None:
        """See `Worker.remove`."""
        self._place.presence.detach(self.telemetry.rule_id)
        super().remove()
        self._place.presence.forget(self.telemetry.rule_id)
