"""The rules at work: brings what runs into line with a rule set, at the start and at every reload."""

import asyncio
import contextlib
import itertools
from collections.abc import Iterable, Iterator

from loguru import logger

from mq2mqtt.errors import LaneError, LaneMisplacedError
from mq2mqtt.host import CLIENT_EVENTS
from mq2mqtt.intake import BridgeIntake, LaneIntake
from mq2mqtt.receipts import RECEIPTS_SUFFIX
from mq2mqtt.receipts_worker import ReceiptsWorker
from mq2mqtt.rules import InboundRule, OutboundRule, Rule, RuleDiff, RuleSet, StatusRule
from mq2mqtt.spool.files import map_errors
from mq2mqtt.spool.info import read_info
from mq2mqtt.status_worker import UNSEEN, StatusWorker
from mq2mqtt.telemetry import Direction, RuleState, RuleTelemetry, Telemetry, Trouble
from mq2mqtt.workers import InboundWorker, LaneWorker, OutboundWorker, Worker, Workplace

__all__ = ["RunningRules"]

# Lanes that one reload opens or removes before devices get their turn: about 5 ms each.
_FILES_AT_ONCE = 10


class RunningRules:
    """One worker for each rule id: of a configured rule, or of one that is gone and brings its work to an end.

    The constructor adopts every lane on disk, `apply` says which rules there are, `open` that their files are in
    order, `start` sets them to work. `intake` is where publishes go.

    Raises:
        LaneError: the spool cannot be read.
    """

    def __init__(self, place: Workplace, telemetry: Telemetry) -> None:
        self._place = place
        self._telemetry = telemetry
        self._rules = RuleSet()
        self._workers: dict[str, Worker] = {}
        # An id that came back when its worker could not follow any more: these begin when that one is done.
        self._successors: dict[str, Worker] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._opened = False
        self.intake = BridgeIntake(
            rules=self._rules,
            lanes={},
            limits=place.settings.limits,
            host=place.host,
            presence=place.presence,
            relay=place.relay,
            telemetry=telemetry,
        )
        spool = place.settings.spool.path
        with map_errors(spool, "read"):
            # Names that no rule has are a host's own.
            paths = sorted(path for path in spool.iterdir() if path.is_dir() and not path.name.startswith("."))
        for path in paths:
            try:
                info = read_info(path)
            except LaneMisplacedError as error:
                logger.warning("left alone, and nothing in it sent: {}", error)
                continue
            if info is not None:
                worker_type: type[LaneWorker] = OutboundWorker
                if info.rule.endswith(RECEIPTS_SUFFIX):
                    worker_type = ReceiptsWorker
                elif place.presence.has_told(info.rule):
                    worker_type = StatusWorker
                self._employ(worker_type(place, _telemetry(info.rule, Direction.UPLINK), target=info.target))

    # -- which rules there are --

    @property
    def rules(self) -> RuleSet:
        """The rules at work."""
        return self._rules

    def apply(self, rules: RuleSet) -> RuleDiff:
        """Go by `rules` from now on; return what that changed. A rule that stays the same notices nothing.

        After `open`, a rule whose files cannot be opened is down with the reason, and tried again every second. Where
        many rules come or go at once, the files of most are left to `watch`: devices must not wait for a thousand
        lanes. Until a rule's lane is open, its publishes wait.
        """
        diff = self._rules.diff(rules)
        self._rules = rules
        before, self._successors = self._successors, {}
        if self._place.writer is not None:
            self._place.writer.go_by(rules)
        posts = _posts(rules)
        for rule_id, worker in self._workers.items():
            rule = posts.get(rule_id)
            if rule is not None and not worker.fits(rule):
                self._successors[rule_id] = self._succeed(worker, rule, before.get(rule_id))
                rule = None
            worker.follow(rule)
        self._telemetry.successors = {rule_id: worker.telemetry for rule_id, worker in self._successors.items()}
        for worker_id, rule in posts.items():
            if worker_id not in self._workers:
                self._employ(self._new_worker(worker_id, rule))
        self._telemetry.arrange(posts)
        self._place.relay.go_by(rules)
        self.intake.apply(rules, self._lanes())
        self._place.presence.apply(rules)
        if self._place.subscriber is not None:
            self._place.subscriber.go_by(rules)
        for worker in self._workers.values():
            self._tell_host_problem(worker)
        if self._opened:
            for _ in itertools.islice(self._tidy_up(), _FILES_AT_ONCE):
                pass
        return diff

    def _succeed(self, worker: Worker, rule: Rule, waiting: Worker | None) -> Worker:
        """Return who works for `rule` when `worker` is done: whoever waits for that already, if it can."""
        if waiting is not None and waiting.fits(rule):
            successor = waiting
            successor.follow(rule)
        else:
            successor = self._new_worker(rule.id, rule)
            # A counter of one id never goes back; what the successor drops while it waits is seen at once.
            successor.telemetry.drops = worker.telemetry.drops
        was = worker.telemetry.direction
        successor.telemetry.rule_down(Trouble.PREDECESSOR, f"waits until the {was} rule that had its id is done")
        return successor

    def _new_worker(self, worker_id: str, rule: Rule) -> Worker:
        is_downlink = isinstance(rule, InboundRule) and worker_id == rule.id
        telemetry = _telemetry(worker_id, Direction.DOWNLINK if is_downlink else Direction.UPLINK)
        worker: Worker
        if isinstance(rule, OutboundRule):
            worker = OutboundWorker(self._place, telemetry, target=rule.target)
        elif isinstance(rule, StatusRule):
            worker = StatusWorker(self._place, telemetry, target=rule.target)
        elif is_downlink:
            worker = InboundWorker(self._place, telemetry)
        else:
            worker = ReceiptsWorker(self._place, telemetry, target=rule.receipts or "")
        worker.follow(rule)
        return worker

    def _lanes(self) -> dict[str, LaneIntake]:
        """Return where the publishes of each enabled outbound rule go; those of a successor wait for its lane."""
        lanes = {}
        for rule in self._rules:
            worker = self._successors.get(rule.id) or self._workers[rule.id]
            if rule.enabled and isinstance(worker, OutboundWorker):
                lanes[rule.id] = worker.intake
        return lanes

    def _employ(self, worker: Worker) -> None:
        self._workers[worker.telemetry.rule_id] = worker
        self._telemetry.add(worker.telemetry)
        if self._group is not None:
            self._set_to_work(self._group, worker)

    # -- their files --

    def open(self) -> None:
        """Open all that the rules need on disk.

        Raises:
            LaneError: a lane cannot be used, or another process uses it; nothing is open then.
        """
        try:
            self._place.relay.open()
            for worker in self._workers.values():
                worker.open()
        except BaseException:
            self.close()
            raise
        self._opened = True

    def _tidy_up(self) -> Iterator[None]:
        """Open what is not open, let go what is done; pause after each that took time. Rules may change in a pause."""
        for rule_id, worker in list(self._workers.items()):
            if not worker.is_open:
                _try_to_open(worker)
                yield
            is_done = False
            with _guarded(worker):
                is_done = worker.is_done
            if is_done and self._workers.get(rule_id) is worker:
                self._let_go(rule_id)
                yield

    def _let_go(self, rule_id: str) -> None:
        """Forget a worker that is done, and let its successor begin."""
        worker = self._workers.pop(rule_id)
        if (task := self._tasks.pop(rule_id, None)) is not None:
            # Nothing of it is in flight: at most it asks RocketMQ whether it is there.
            task.cancel()
        with _guarded(worker):
            worker.remove()
        self._telemetry.remove(rule_id)
        if (successor := self._successors.pop(rule_id, None)) is not None:
            del self._telemetry.successors[rule_id]
            successor.telemetry.rule_up(Trouble.PREDECESSOR)
            self._employ(successor)
            self._telemetry.arrange(_posts(self._rules))
            _try_to_open(successor)

    def close(self) -> None:
        """Let all files and locks go. Idempotent."""
        for worker in self._workers.values():
            worker.close()
        self._place.relay.close()

    # -- their work --

    def start(self, group: asyncio.TaskGroup) -> None:
        """Set all workers to work in `group`, those to come too. Each guards itself: one's bug stops no other."""
        self._group = group
        for rule_id, worker in self._workers.items():
            if worker.telemetry.state is RuleState.DRAINING:
                logger.info("lane {} has no rule any more: what waits in it is sent, then it is removed", rule_id)
            self._set_to_work(group, worker)

    def _set_to_work(self, group: asyncio.TaskGroup, worker: Worker) -> None:
        rule_id = worker.telemetry.rule_id
        name = f"mq2mqtt.{worker.telemetry.direction}[{rule_id}]"
        self._tasks[rule_id] = group.create_task(worker.run(), name=name)

    async def watch(self) -> None:
        """Look after what has no event; call it about once a second."""
        for worker in self._workers.values():
            with _guarded(worker):
                worker.watch()
                self._tell_host_problem(worker)
        self._place.presence.watch()
        self._place.relay.watch()
        for _ in self._tidy_up():
            await asyncio.sleep(0)

    def _tell_host_problem(self, worker: Worker) -> None:
        place = self._place
        problem = place.host.problem
        if problem is None and place.subscriber is not None:
            problem = place.subscriber.problem_of(worker.telemetry.rule_id)
        if problem is None and isinstance(worker, StatusWorker):
            if not place.host.sees_clients:
                problem = UNSEEN
            elif place.writer is not None:
                problem = place.writer.problem_of(CLIENT_EVENTS)
        worker.telemetry.rule_has(Trouble.HOST, problem)

    async def check_groups(self) -> None:
        """Look for other bridges in the rules' own consumer groups."""
        for worker in list(self._workers.values()):
            if isinstance(worker, InboundWorker):
                await worker.check_group()

    def refresh_gauges(self) -> None:
        """Bring the gauges up to date; called before each scrape."""
        for worker in self._workers.values():
            with _guarded(worker):
                worker.refresh_gauges()
        self._place.relay.refresh_gauges()

    # -- its end --

    async def stop_receiving(self, *, seconds: float) -> None:
        """Let the inbound rules settle what devices were handed; abandon, uncommitted, what is late. Idempotent."""
        await self._finish([worker for worker in self._workers.values() if isinstance(worker, InboundWorker)], seconds)

    async def stop_sending(self, *, seconds: float) -> None:
        """Let what is being sent get its answer; abandon what is late: its lane keeps it."""
        await self._finish(self._workers.values(), seconds)

    async def _finish(self, workers: Iterable[Worker], seconds: float) -> None:
        tasks = []
        for worker in workers:
            worker.finish()
            if (task := self._tasks.get(worker.telemetry.rule_id)) is not None:
                tasks.append(task)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


def _posts(rules: RuleSet) -> dict[str, Rule]:
    """Return the rule of each worker by the worker's id, in the order of `rules`: receipts have one of their own."""
    posts: dict[str, Rule] = {}
    for rule in rules:
        posts[rule.id] = rule
        if isinstance(rule, InboundRule) and rule.receipts is not None:
            posts[rule.id + RECEIPTS_SUFFIX] = rule
    return posts


def _telemetry(rule_id: str, direction: Direction) -> RuleTelemetry:
    return RuleTelemetry(rule_id, direction=direction, state=RuleState.DRAINING)


@contextlib.contextmanager
def _guarded(worker: Worker) -> Iterator[None]:
    """Let one worker's bug stop no other."""
    try:
        yield
    except LaneError as error:
        logger.error("rule {}: {}", worker.telemetry.rule_id, error)
    except Exception:  # noqa: BLE001 - the others are looked after in the same loop
        logger.exception("rule {}: unexpected error, going on", worker.telemetry.rule_id)


def _try_to_open(worker: Worker) -> None:
    """Open it; where that fails, the worker's telemetry, or the log, has the reason."""
    with _guarded(worker), contextlib.suppress(LaneError):
        worker.open()
