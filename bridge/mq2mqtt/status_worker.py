"""A status rule at work."""

from mq2mqtt.rules import Rule, StatusRule
from mq2mqtt.telemetry import RuleTelemetry, Trouble
from mq2mqtt.workers import Worker, enter_state

__all__ = ["StatusWorker"]


class StatusWorker(Worker):
    """A status rule: this version does nothing for it and says so."""

    def __init__(self, telemetry: RuleTelemetry) -> None:
        self.telemetry = telemetry
        self._gone = False

    @property
    def is_done(self) -> bool:
        """See `Worker.is_done`."""
        return self._gone

    def fits(self, rule: Rule) -> bool:
        """See `Worker.fits`."""
        return isinstance(rule, StatusRule)

    def follow(self, rule: Rule | None) -> None:
        """See `Worker.follow`."""
        self._gone = rule is None
        enter_state(self.telemetry, rule)
        self.telemetry.rule_down(Trouble.LINK, "status rules are not built yet: set `enabled: false`")

    @property
    def is_open(self) -> bool:
        """See `Worker.is_open`."""
        return True

    def open(self) -> None:
        """See `Worker.open`."""

    async def run(self) -> None:
        """See `Worker.run`."""

    def finish(self) -> None:
        """See `Worker.finish`."""

    def watch(self) -> None:
        """See `Worker.watch`."""

    def refresh_gauges(self) -> None:
        """See `Worker.refresh_gauges`."""

    def close(self) -> None:
        """See `Worker.close`."""

    def remove(self) -> None:
        """See `Worker.remove`."""
