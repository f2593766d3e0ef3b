"""The receipts of an inbound rule on their way to RocketMQ: a lane that this process writes on every host."""

from mq2mqtt.receipts import RECEIPTS_SUFFIX
from mq2mqtt.rules import InboundRule, Rule
from mq2mqtt.spool.lane import Lane
from mq2mqtt.workers import LaneWorker

__all__ = ["ReceiptsWorker"]


class ReceiptsWorker(LaneWorker):
    """The lane `<rule id>.receipts`: it outlives the rule, or its `receipts`, until it is drained."""

    @property
    def _of_rule(self) -> str:
        return self.telemetry.rule_id.removesuffix(RECEIPTS_SUFFIX)

    def fits(self, rule: Rule) -> bool:
        """See `Worker.fits`."""
        return isinstance(rule, InboundRule) and rule.receipts is not None

    def follow(self, rule: Rule | None) -> None:
        """See `Worker.follow`."""
        super().follow(rule)
        if rule is None:
            self._place.receipts.detach(self._of_rule)
        elif self._outlet is not None and isinstance(self._outlet.lane, Lane):
            self._place.receipts.attach(self._of_rule, self._outlet.lane, self.telemetry)
        else:
            self._place.receipts.expect(self._of_rule, self.telemetry)

    def _target_of(self, rule: Rule) -> str | None:
        return rule.receipts if isinstance(rule, InboundRule) else None

    def _attach(self, lane: Lane) -> None:
        if not self._gone:
            self._place.receipts.attach(self._of_rule, lane, self.telemetry)

    def close(self) -> None:
        """See `Worker.close`."""
        self._place.receipts.detach(self._of_rule)
        super().close()
