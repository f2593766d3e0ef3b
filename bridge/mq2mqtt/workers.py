"""One rule at work through its life: it appears, changes, is disabled, and goes when nothing of it is left to do."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loguru import logger

from mq2mqtt.downlink import Downlink
from mq2mqtt.errors import LaneError
from mq2mqtt.host import LaneWriter, MqttHost, Subscriber
from mq2mqtt.intake import LaneIntake
from mq2mqtt.link import RocketLink
from mq2mqtt.offline import OfflineQueue
from mq2mqtt.outlet import Outlet, is_lane
from mq2mqtt.presence import Presence
from mq2mqtt.receipts import ReceiptBook
from mq2mqtt.relay import P2PRelay
from mq2mqtt.rules import InboundRule, OutboundRule, Rule
from mq2mqtt.settings import Settings
from mq2mqtt.spool.follower import FollowedLane
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.parked import ParkedStore
from mq2mqtt.telemetry import RuleState, RuleTelemetry, Trouble

__all__ = ["InboundWorker", "LaneWorker", "OutboundWorker", "Worker", "Workplace", "enter_state"]

_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Workplace:
    """What all workers share. Of `settings`, everything but the rules."""

    settings: Settings
    host: MqttHost
    link: RocketLink
    presence: Presence
    queue: OfflineQueue
    receipts: ReceiptBook
    relay: P2PRelay
    writer: LaneWriter | None = None
    """Who writes the lanes of outbound rules, if not this process."""
    subscriber: Subscriber | None = None
    """Who fetches what devices publish, if nobody brings it."""

    def directory(self, rule_id: str) -> Path:
        """Return `spool/<rule id>`."""
        return self.settings.spool.path / rule_id


class Worker(Protocol):
    """What a rule of one type needs while it is configured, and until what is left of it is done.

    `run` does the work and ends after `finish`. Everything else returns at once and may be called at any time; only
    `open` raises.
    """

    telemetry: RuleTelemetry

    @property
    def is_done(self) -> bool:
        """Whether the rule is gone and nothing of it is left to do."""

    def fits(self, rule: Rule) -> bool:
        """Whether it can follow `rule`: the id may come back with another type, or too late."""

    def follow(self, rule: Rule | None) -> None:
        """Go by `rule` from now on, without it come to an end. What stays the same goes on undisturbed."""

    @property
    def is_open(self) -> bool:
        """Whether `open` has nothing to do."""

    def open(self) -> None:
        """Open on disk what the rule needs. Idempotent.

        Raises:
            LaneError: that is not possible now.
        """

    async def run(self) -> None:
        """Work until `finish`."""

    def finish(self) -> None:
        """Take nothing more, bring to an end what has been begun. Idempotent."""

    def watch(self) -> None:
        """Look after what has no event; called about once a second."""

    def refresh_gauges(self) -> None:
        """Bring the gauges up to date; called before each scrape."""

    def close(self) -> None:
        """Let files and locks go. Idempotent."""

    def remove(self) -> None:
        """Delete from disk what is of no more use; it `is_done`."""


def enter_state(telemetry: RuleTelemetry, rule: Rule | None) -> None:
    """Bring the rule's state into line with its place in the configuration."""
    if rule is None:
        telemetry.end(RuleState.DRAINING)
    elif not rule.enabled:
        telemetry.end(RuleState.DISABLED)
    elif telemetry.state not in (RuleState.UP, RuleState.DOWN):
        telemetry.begin()


class LaneWorker(Worker):
    """A rule with a lane, and the lane into RocketMQ.

    A lane outlives its rule: disabled or gone, what waits in it goes to the last `target`.
    """

    def __init__(self, place: Workplace, telemetry: RuleTelemetry, *, target: str) -> None:
        self.telemetry = telemetry
        self._place = place
        self._path = place.directory(telemetry.rule_id)
        self._target = target
        self._outlet: Outlet | None = None
        self._enabled = False
        self._gone = True
        self._has_no_lane = False
        self._opened = asyncio.Event()

    @property
    def is_done(self) -> bool:
        """See `Worker.is_done`."""
        return self._gone and (self._has_no_lane if self._outlet is None else self._outlet.is_empty)

    def follow(self, rule: Rule | None) -> None:
        """See `Worker.follow`."""
        self._gone = rule is None
        self._enabled = rule is not None and rule.enabled
        self._has_no_lane = False
        enter_state(self.telemetry, rule)
        target = None if rule is None else self._target_of(rule)
        if target is not None and target != self._target:
            self._target = target
            if self._outlet is not None:
                self._outlet.retarget(target)
                if self._enabled:
                    self.telemetry.begin()

    def _target_of(self, rule: Rule) -> str | None:
        return rule.target

    @property
    def is_open(self) -> bool:
        """See `Worker.is_open`."""
        return self._outlet is not None or self._has_no_lane

    def open(self) -> None:
        """See `Worker.open`. A rule that takes nothing needs no lane but the one it may have."""
        if self.is_open:
            return
        try:
            if not self._enabled and not is_lane(self._path):
                self._has_no_lane = True
                return
            lane = self._open_lane()
            if lane is None:
                return
            self._outlet = Outlet(
                lane,
                target=self._target,
                node=self._place.settings.node,
                spool=self._place.settings.spool,
                link=self._place.link,
                telemetry=self.telemetry,
            )
        except LaneError as error:
            self._refuse(str(error))
            raise
        self.telemetry.rule_up(Trouble.LANE)
        if isinstance(lane, Lane):
            self._attach(lane)
        self._opened.set()

    def _open_lane(self) -> Lane | FollowedLane | None:
        """Return the lane; `None` when another process is to write it and has not begun, which is the rule's trouble.

        Raises:
            LaneError: it cannot be used.
        """
        spool = self._place.settings.spool
        return Lane.open(self._path, max_bytes=spool.max_bytes, target=self._target, durability=spool.durability)

    def _attach(self, lane: Lane) -> None:
        """The lane is open and ours to write."""

    def _refuse(self, problem: str) -> None:
        """There is no lane, for this reason."""
        self.telemetry.rule_down(Trouble.LANE, problem)

    async def run(self) -> None:
        """See `Worker.run`."""
        await self._opened.wait()
        if self._outlet is not None:
            await self._outlet.run()

    def finish(self) -> None:
        """See `Worker.finish`."""
        self._opened.set()
        if self._outlet is not None:
            self._outlet.uplink.finish()

    def watch(self) -> None:
        """See `Worker.watch`."""
        if self._outlet is not None:
            self._outlet.watch()

    def refresh_gauges(self) -> None:
        """See `Worker.refresh_gauges`."""
        if self._outlet is not None:
            self._outlet.refresh_gauges()

    def close(self) -> None:
        """See `Worker.close`."""
        if self._outlet is not None:
            self._outlet.close()

    def remove(self) -> None:
        """See `Worker.remove`."""
        if self._outlet is None:
            return
        try:
            self._outlet.remove()
        except LaneError as error:
            # It is drained: the next start, or its rule when it comes back, finds it so.
            logger.warning("rule {}: drained, but its lane stays: {}", self.telemetry.rule_id, error)
        else:
            logger.info("lane {} is drained and removed", self.telemetry.rule_id)


class OutboundWorker(LaneWorker):
    """An outbound rule: publishes into its lane, `intake`, unless the host writes it in another process."""

    def __init__(self, place: Workplace, telemetry: RuleTelemetry, *, target: str) -> None:
        super().__init__(place, telemetry, target=target)
        self.intake = LaneIntake(telemetry=telemetry)

    def fits(self, rule: Rule) -> bool:
        """See `Worker.fits`."""
        return isinstance(rule, OutboundRule)

    def _open_lane(self) -> Lane | FollowedLane | None:
        spool, writer = self._place.settings.spool, self._place.writer
        if writer is None:
            return super()._open_lane()
        lane = FollowedLane.open(self._path, max_bytes=spool.max_bytes, target=self._target, watcher=writer.watcher)
        if lane is None:
            problem = writer.problem_of(self.telemetry.rule_id)
            self.telemetry.rule_down(Trouble.LANE, problem or "the broker has not begun this rule's lane yet")
        return lane

    def _attach(self, lane: Lane) -> None:
        self.intake.attach(lane)

    def _refuse(self, problem: str) -> None:
        self.intake.refuse(problem)

    def watch(self) -> None:
        """See `Worker.watch`."""
        super().watch()
        if self._outlet is not None and self._place.writer is not None:
            self.telemetry.rule_has(Trouble.LANE, self._place.writer.problem_of(self.telemetry.rule_id))


class InboundWorker(Worker):
    """An inbound rule: at any time at most one `Downlink`, the one that the rule asks for."""

    def __init__(self, place: Workplace, telemetry: RuleTelemetry) -> None:
        self.telemetry = telemetry
        self._place = place
        self._rule: InboundRule | None = None
        self._parked: ParkedStore | None = None
        self._downlink: Downlink | None = None
        self._changed = asyncio.Event()
        self._finishing = False
        self._ended = False

    @property
    def is_done(self) -> bool:
        """See `Worker.is_done`."""
        return self._ended and not self._finishing

    def fits(self, rule: Rule) -> bool:
        """See `Worker.fits`. Its task has ended with its rule, so a rule that comes back gets a new worker."""
        return isinstance(rule, InboundRule) and not self._ended

    def follow(self, rule: Rule | None) -> None:
        """See `Worker.follow`."""
        assert rule is None or isinstance(rule, InboundRule)  # noqa: S101 - see `fits`
        before, self._rule = self._rule, rule
        enter_state(self.telemetry, rule)
        if self._downlink is not None and (rule is None or before is None or _received(before) != _received(rule)):
            # It says nothing about the rule any more; `_receive` brings it to its end.
            self._downlink = None
            if rule is not None and rule.enabled:
                self.telemetry.begin()
        self._changed.set()

    @property
    def is_open(self) -> bool:
        """See `Worker.is_open`."""
        return self._parked is not None or self._rule is None or not self._rule.enabled

    def open(self) -> None:
        """See `Worker.open`."""
        if self.is_open:
            return
        spool = self._place.settings.spool
        path = self._place.directory(self.telemetry.rule_id)
        try:
            self._parked = ParkedStore(path, max_bytes=spool.max_bytes, durability=spool.durability)
        except LaneError as error:
            self.telemetry.rule_down(Trouble.LANE, str(error))
            raise
        self.telemetry.rule_up(Trouble.LANE)
        self._changed.set()

    async def run(self) -> None:
        """See `Worker.run`."""
        while self._rule is not None and not self._finishing:
            self._changed.clear()
            try:
                if self._parked is not None and self._rule.enabled:
                    await self._receive(self._rule, self._parked)
                else:
                    await self._changed.wait()
            except Exception:  # noqa: BLE001 - a task's top edge: one rule's bug must not stop the others
                logger.exception("rule {}: unexpected error, trying again", self.telemetry.rule_id)
                await asyncio.sleep(_RETRY_SECONDS)
        self._ended = True

    async def _receive(self, rule: InboundRule, parked: ParkedStore) -> None:
        """Receive as `rule` says, until another way of receiving is asked for and what is in flight is settled."""
        self.telemetry.begin()
        downlink = Downlink(
            rule=rule,
            group=rule.consumer_group(self._place.settings.node),
            host=self._place.host,
            link=self._place.link,
            limits=self._place.settings.limits,
            parked=parked,
            queue=self._place.queue,
            receipts=self._place.receipts,
            telemetry=self.telemetry,
        )
        name = f"mq2mqtt.downlink[{rule.id}].receive"
        receiving = asyncio.create_task(downlink.run(), name=name)
        try:
            while (now := self._rule) is not None and not self._finishing and _received(now) == _received(rule):
                downlink.rule, self._downlink = now, downlink
                await self._changed.wait()
                self._changed.clear()
        finally:
            self._downlink = None
            receiving.cancel()
            await asyncio.wait([receiving])
            await downlink.close()
            self.telemetry.lag = None
            self._changed.set()

    def finish(self) -> None:
        """See `Worker.finish`."""
        self._finishing = True
        self._changed.set()

    def watch(self) -> None:
        """See `Worker.watch`."""
        self.telemetry.rule_has(Trouble.STORE, self._place.queue.problem)
        if self._downlink is not None:
            self._downlink.watch()

    async def check_group(self) -> None:
        """Look for another bridge in this rule's own group."""
        if self._downlink is not None:
            await self._downlink.check_group(self._place.settings.node)

    def refresh_gauges(self) -> None:
        """See `Worker.refresh_gauges`."""
        self.telemetry.parked_messages = 0 if self._parked is None else self._parked.count
        if self._downlink is not None:
            self._downlink.refresh_gauges()

    def close(self) -> None:
        """See `Worker.close`: parked messages keep no file open."""

    def remove(self) -> None:
        """See `Worker.remove`: what is parked stays for an operator."""


def _received(rule: InboundRule) -> tuple[object, ...]:
    """Return what a change of makes a rule leave its consumer group and join one anew."""
    return rule.enabled, rule.source, rule.tags, rule.group, rule.start
