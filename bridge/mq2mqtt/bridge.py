"""The composition root: builds every part from the settings, runs them, and stops them in the order of the flow."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path

from loguru import logger

from mq2mqtt.admin.server import AdminServer
from mq2mqtt.downlink import Downlink
from mq2mqtt.host import MqttHost
from mq2mqtt.instance import Instance
from mq2mqtt.intake import BridgeIntake
from mq2mqtt.link import RocketLink
from mq2mqtt.link.native import NativeLink
from mq2mqtt.metrics import build_registry
from mq2mqtt.outlet import Outlet
from mq2mqtt.rules import InboundRule, OutboundRule, StatusRule
from mq2mqtt.settings import Settings, split_address, tls_context
from mq2mqtt.spool.info import read_info
from mq2mqtt.spool.parked import ParkedStore
from mq2mqtt.telemetry import Direction, RuleState, RuleTelemetry, Telemetry, Trouble

__all__ = ["Bridge", "build_link"]

_WATCH_SECONDS = 1.0
_GROUP_SECONDS = 5.0


def build_link(settings: Settings, *, client_id: str) -> RocketLink:
    """Return the link that `settings.rocketmq` describes, not yet started."""
    rocketmq = settings.rocketmq
    return NativeLink(
        namesrv=rocketmq.namesrv,
        client_id=client_id,
        access_key=rocketmq.access_key,
        secret_key=rocketmq.secret_key.get_secret_value() if rocketmq.secret_key else None,
        tls=tls_context(rocketmq.tls),
        address_map=rocketmq.address_map,
    )


class Bridge:
    """All rules of one configuration, on one host.

    The constructor opens the lanes and takes their locks; `start` connects. `intake` is what the host's adapter
    brings publishes to.

    Raises:
        BridgeError: a lane cannot be used, or another process uses it.
    """

    def __init__(self, settings: Settings, host: MqttHost, *, link: RocketLink | None = None) -> None:
        self._settings = settings
        self._host = host
        self.telemetry = Telemetry()
        self._instance = Instance(settings.spool.path)
        self._outlets: dict[str, Outlet] = {}
        self._downlinks: list[Downlink] = []
        try:
            self._link = link or build_link(settings, client_id=f"mq2mqtt@{settings.node}@{self._instance.id}")
            self._build_rules()
            self._adopt_orphans()
        except BaseException:
            self._close_files()
            raise
        self.intake = BridgeIntake(
            rules=settings.rule_set,
            lanes={rule_id: outlet.intake for rule_id, outlet in self._outlets.items()},
            limits=settings.limits,
            host=host,
            telemetry=self.telemetry,
        )
        admin_host, admin_port = split_address(settings.admin.listen)
        registry = build_registry(
            self.telemetry, connected_clients=lambda: host.connected_clients, refresh=self._refresh_gauges
        )
        self.admin = AdminServer(host=admin_host, port=admin_port, telemetry=self.telemetry, registry=registry)
        self._runner: asyncio.Task[None] | None = None
        self._sending: list[asyncio.Task[None]] = []
        self._receiving: list[asyncio.Task[None]] = []
        self._watching: list[asyncio.Task[None]] = []
        self._stopped = False

    def _build_rules(self) -> None:
        for rule in self._settings.rules:
            direction = Direction.DOWNLINK if isinstance(rule, InboundRule) else Direction.UPLINK
            state = RuleState.DOWN if rule.enabled else RuleState.DISABLED
            telemetry = self.telemetry.add(RuleTelemetry(rule.id, direction=direction, state=state))
            path = self._settings.spool.path / rule.id
            if isinstance(rule, OutboundRule) and (rule.enabled or path.is_dir()):
                self._outlets[rule.id] = self._outlet(path, rule.target, telemetry)
            elif isinstance(rule, InboundRule) and rule.enabled:
                self._downlinks.append(self._downlink(rule, path, telemetry))
            elif isinstance(rule, StatusRule):
                telemetry.rule_down(Trouble.LINK, "status rules are not built yet: set `enabled: false`")

    def _adopt_orphans(self) -> None:
        """Drain the lanes of rules that are gone to the target they last had (design section 2, life of a rule)."""
        known = {rule.id for rule in self._settings.rules}
        for path in sorted(self._settings.spool.path.iterdir()):
            if path.name in known or (info := read_info(path) if path.is_dir() else None) is None:
                continue
            logger.info("lane {} has no rule any more: what waits in it goes to {}", path.name, info.target)
            telemetry = RuleTelemetry(path.name, direction=Direction.UPLINK, state=RuleState.DRAINING)
            self._outlets[path.name] = self._outlet(path, info.target, self.telemetry.add(telemetry))

    def _outlet(self, path: Path, target: str, telemetry: RuleTelemetry) -> Outlet:
        return Outlet(
            path,
            target=target,
            node=self._settings.node,
            spool=self._settings.spool,
            link=self._link,
            telemetry=telemetry,
        )

    def _downlink(self, rule: InboundRule, path: Path, telemetry: RuleTelemetry) -> Downlink:
        spool = self._settings.spool
        parked = ParkedStore(path, max_bytes=spool.max_bytes, durability=spool.durability)
        return Downlink(
            rule=rule,
            group=rule.consumer_group(self._settings.node),
            host=self._host,
            link=self._link,
            limits=self._settings.limits,
            parked=parked,
            telemetry=telemetry,
        )

    async def start(self) -> None:
        """Open the admin port and start every rule; does not wait for RocketMQ.

        Raises:
            ConfigError: the admin port cannot be opened.
        """
        await self.admin.start()
        await self._link.start()
        self._runner = asyncio.create_task(self._run(), name="mq2mqtt.bridge")
        logger.info(
            "bridge {} started: {} rules, metrics at {}/metrics",
            self._settings.node,
            len(self._settings.rules),
            self.admin.url,
        )

    async def _run(self) -> None:
        """Hold every long-lived task. Each guards itself, so that one rule's bug stops no other."""
        async with asyncio.TaskGroup() as group:
            self._sending = [
                group.create_task(outlet.uplink.run(), name=f"mq2mqtt.uplink[{rule_id}]")
                for rule_id, outlet in self._outlets.items()
            ]
            self._receiving = [
                group.create_task(downlink.run(), name=f"mq2mqtt.downlink[{downlink.rule.id}]")
                for downlink in self._downlinks
            ]
            self._watching = [
                group.create_task(_regularly(self._watch, _WATCH_SECONDS), name="mq2mqtt.watch"),
                group.create_task(_regularly(self._watch_groups, _GROUP_SECONDS), name="mq2mqtt.watch-groups"),
            ]

    async def _watch(self) -> None:
        for downlink in self._downlinks:
            downlink.watch()
        for rule_id, outlet in list(self._outlets.items()):
            if outlet.is_done:
                outlet.uplink.finish()
                del self._outlets[rule_id]
                outlet.remove()
                self.telemetry.remove(rule_id)
                logger.info("lane {} is drained and removed", rule_id)

    async def _watch_groups(self) -> None:
        for downlink in self._downlinks:
            await downlink.check_group(self._settings.node)

    def _refresh_gauges(self) -> None:
        for outlet in self._outlets.values():
            outlet.refresh_gauges()
        for downlink in self._downlinks:
            downlink.refresh_gauges()

    async def stop_receiving(self) -> None:
        """Take nothing more from RocketMQ and wait for the outcome of what devices were handed. Idempotent.

        Call it while clients are still connected: what they acknowledge now need not be delivered again. After half
        of `stop_deadline` the rest is abandoned, uncommitted.
        """
        receiving, self._receiving = self._receiving, []
        for task in receiving:
            task.cancel()
        await self._settle_within(
            [downlink.close() for downlink in self._downlinks], 0.5 * self._settings.stop_deadline
        )

    async def stop(self) -> None:
        """Stop in the order of the flow within `stop_deadline` seconds. Idempotent.

        The host brings no more publishes. What is being sent gets its answer; after a quarter of the deadline the
        rest is abandoned: it is in its lane and will be sent again.
        """
        if self._stopped:
            return
        self._stopped = True
        await self.stop_receiving()
        self.intake.close()
        for task in self._watching:
            task.cancel()
        for outlet in self._outlets.values():
            outlet.uplink.finish()
        share = 0.25 * self._settings.stop_deadline
        if self._sending:
            _, late = await asyncio.wait(self._sending, timeout=share)
            for task in late:
                task.cancel()
        abandoned = sum(rule.in_flight for rule in self.telemetry.rules.values())
        if abandoned:
            logger.warning("stopping: {} messages in flight may arrive twice", abandoned)
        if self._runner is not None:
            await asyncio.gather(self._runner, return_exceptions=True)
        await self._settle_within([self._link.close()], share)
        await self.admin.stop()
        self._close_files()
        logger.info("bridge {} stopped", self._settings.node)

    async def _settle_within(self, work: Iterable[Coroutine[None, None, None]], seconds: float) -> None:
        """Do `work` at once; cancel what is not done after `seconds`."""
        tasks = [asyncio.create_task(item, name="mq2mqtt.stopping") for item in work]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _close_files(self) -> None:
        for outlet in self._outlets.values():
            outlet.close()
        self._instance.close()


async def _regularly(step: Callable[[], Awaitable[None]], seconds: float) -> None:
    """Do `step` again and again, whatever it raises."""
    while True:
        try:
            await step()
        except Exception:  # noqa: BLE001 - a task's top edge: the others depend on its going on
            logger.exception("unexpected error, going on")
        await asyncio.sleep(seconds)
