"""The composition root: builds every part from the settings, runs them, and stops them in the order of the flow."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from loguru import logger
from pydantic import BaseModel

from mq2mqtt.admin import parked as parked_api
from mq2mqtt.admin import sessions as sessions_api
from mq2mqtt.admin.parked import Parked
from mq2mqtt.admin.server import AdminServer
from mq2mqtt.admin.sessions import Sessions
from mq2mqtt.history import keep_history
from mq2mqtt.host import LaneWriter, MqttHost, Subscriber
from mq2mqtt.instance import Instance
from mq2mqtt.link import RocketLink
from mq2mqtt.link.drivers import open_link
from mq2mqtt.link.refusals import refusals, require_capabilities
from mq2mqtt.metrics import build_registry
from mq2mqtt.offline import OfflineQueue
from mq2mqtt.presence import Connection, Journal, Presence
from mq2mqtt.receipts import ReceiptBook
from mq2mqtt.relay import P2PRelay
from mq2mqtt.running import RunningRules
from mq2mqtt.settings import Settings, split_address
from mq2mqtt.spool.inspect import PRESENCE_NAME
from mq2mqtt.store import ConnectStore, Store
from mq2mqtt.store.sql import SqlStore
from mq2mqtt.telemetry import Telemetry
from mq2mqtt.workers import Workplace

__all__ = ["Bridge"]

_WATCH_SECONDS = 1.0
_GROUP_SECONDS = 5.0
# For the store to close its connections, after it has written what waits.
_STORE_SECONDS = 0.5


class Bridge:
    """All rules of one configuration, on one host.

    The constructor opens the lanes and takes their locks; `start` connects. `intake` is what the host's adapter
    brings publishes to. A `writer` writes the lanes of outbound rules itself, in another process: then nothing is
    brought to the intake but client events. A `subscriber` fetches what devices publish, and has to know the rules.

    Raises:
        BridgeError: a lane cannot be used, or another process uses it; or the link's driver can't do what a rule or a
            setting asks for, or is not installed.
    """

    def __init__(
        self,
        settings: Settings,
        host: MqttHost,
        *,
        link: RocketLink | None = None,
        writer: LaneWriter | None = None,
        subscriber: Subscriber | None = None,
    ) -> None:
        require_capabilities(settings.rocketmq, settings.rules)
        self._settings = settings
        self.telemetry = Telemetry()
        self._instance = Instance(settings.spool.path)
        try:
            self._link = link or open_link(settings.rocketmq, client_id=f"mq2mqtt@{settings.node}@{self._instance.id}")
            power = settings.spool.durability == "power"
            self.presence = Presence(Journal(settings.spool.path / PRESENCE_NAME, power=power), node=settings.node)
            self._receipts = ReceiptBook(node=settings.node)
            self.queue = OfflineQueue(host, settings.offline, telemetry=self.telemetry, receipts=self._receipts)
            self._relay = P2PRelay(
                spool=settings.spool, host=host, queue=self.queue, telemetry=self.telemetry, writer=writer
            )
            self.telemetry.relay = self._relay.telemetry
            place = Workplace(
                settings, host, self._link, self.presence, self.queue, self._receipts, self._relay, writer, subscriber
            )
            self._rules = RunningRules(place, self.telemetry)
            self._rules.apply(settings.rule_set)
            self._rules.open()
        except BaseException:
            self._instance.close()
            raise
        self.intake = self._rules.intake
        admin_host, admin_port = split_address(settings.admin.listen)
        registry = build_registry(
            self.telemetry, connected_clients=lambda: host.connected_clients, refresh=self._rules.refresh_gauges
        )
        sessions = Sessions(
            host,
            self.presence.connections,
            connects=self._connects,
            kept=self.queue.count,
            started=lambda: self._runner is not None,
        )
        parked = Parked(settings.spool.path, rules=lambda: self._rules.rules, look=self.look)
        self.admin = AdminServer(
            host=admin_host,
            port=admin_port,
            telemetry=self.telemetry,
            registry=registry,
            api=[*sessions_api.routes(sessions), *parked_api.routes(parked)],
        )
        self._lives_on = writer is not None
        self.store: Store | None = None
        """Open between `start` and `stop`."""
        self._note_history: Callable[[], None] = lambda: None
        self._runner: asyncio.Task[None] | None = None
        self._watching: list[asyncio.Task[None]] = []
        self._is_news = asyncio.Event()
        self._stopping = False
        self._stopped = False

    async def start(self) -> None:
        """Open the admin port and the store, and start every rule; does not wait for RocketMQ.

        Raises:
            ConfigError: the admin port or the store cannot be opened, and somebody has to change something first.
            StoreError: the database is away.
        """
        await self.admin.start()
        await self._open_store()
        # Also those that ended with the last process: a clean session gave up what the one before it had missed.
        for connection in self.presence.connections.values():
            self._came(connection)
        # A broker in this process ended with the last one; another's may have gone on.
        self.presence.start(lives_on=self._lives_on)
        await self._link.start()
        self._runner = asyncio.create_task(self._run(), name="mq2mqtt.bridge")
        logger.info(
            "bridge {} started: {} rules, metrics at {}/metrics",
            self._settings.node,
            len(self._settings.rules),
            self.admin.url,
        )

    async def _open_store(self) -> None:
        settings = self._settings
        self.store = await SqlStore.open(
            settings.store.url, node=settings.node, power=settings.spool.durability == "power"
        )
        await self.queue.start(self.store)
        self.presence.listen(
            came=self._came,
            gone=lambda connection, _ended_ms, _reason: self.queue.gone(connection.client_id, connection.channel_id),
        )
        self._note_history = keep_history(self.presence, self.store.connects)

    def _came(self, connection: Connection) -> None:
        self.queue.came(connection.client_id, connection.channel_id, clean_session=connection.clean_session)

    def _connects(self) -> ConnectStore | None:
        return None if self.store is None else self.store.connects

    async def _run(self) -> None:
        """Hold every long-lived task."""
        if self._stopping:
            return
        async with asyncio.TaskGroup() as group:
            self._rules.start(group)
            self._watching = [
                group.create_task(self._relay.run(), name="mq2mqtt.relay"),
                group.create_task(_regularly(self._rules.watch, _WATCH_SECONDS, self._is_news), name="mq2mqtt.watch"),
                group.create_task(_regularly(self._rules.check_groups, _GROUP_SECONDS), name="mq2mqtt.watch-groups"),
            ]

    def look(self) -> None:
        """Look now, not within a second, after what has no event: a lane's writer has news."""
        self._is_news.set()

    def reload(self, settings: Settings) -> None:
        """Go by the rules of `settings` from now on; say what else differs: that needs a restart.

        Connections, and rules that stay the same, notice nothing. Where the running driver can't do what a rule asks
        for, nothing changes. Does nothing once the bridge is stopping.
        """
        if self._stopping:
            return
        if lines := refusals(self._settings.rocketmq, settings.rules):
            self.telemetry.reload_refused("\n".join(lines))
        else:
            diff = self._rules.apply(settings.rule_set)
            self.telemetry.reload_applied(str(diff), needs_restart=_changed_beside_rules(self._settings, settings))
            if not settings.rules:
                logger.warning("the configuration has no rules: the bridge takes nothing and brings nothing")

    async def stop_receiving(self) -> None:
        """Take nothing more from RocketMQ and wait for the outcome of what devices were handed. Idempotent.

        Call it while clients are still connected: what they acknowledge now need not be delivered again. After half
        of `stop_deadline` the rest is abandoned, uncommitted.
        """
        seconds = 0.0 if self._stopping else 0.5 * self._settings.stop_deadline
        self._stopping = True
        until = asyncio.get_running_loop().time() + seconds
        self._relay.finish()
        settling = asyncio.gather(self.queue.finish(), self._relay.settled())
        await self._rules.stop_receiving(seconds=seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await settling

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
        share = 0.25 * self._settings.stop_deadline
        await self._rules.stop_sending(seconds=share)
        abandoned = sum(rule.in_flight for rule in self.telemetry.rules.values())
        if abandoned:
            logger.warning("stopping: {} messages in flight may arrive twice", abandoned)
        if self._runner is not None:
            await asyncio.gather(self._runner, return_exceptions=True)
        await self.queue.stop()
        closing = [asyncio.create_task(self._link.close(), name="mq2mqtt.stopping")]
        if self.store is not None:
            self._note_history()
            closing.append(asyncio.create_task(self.store.close(seconds=share), name="mq2mqtt.stopping.store"))
        await asyncio.wait(closing, timeout=share + _STORE_SECONDS)
        for task in closing:
            task.cancel()
        await asyncio.gather(*closing, return_exceptions=True)
        await self.admin.stop()
        self._rules.close()
        self.presence.close()
        self._instance.close()
        logger.info("bridge {} stopped", self._settings.node)


async def _regularly(step: Callable[[], Awaitable[None]], seconds: float, is_news: asyncio.Event | None = None) -> None:
    """Do `step` each `seconds`, and at once when there `is_news`, whatever it raises."""
    is_news = is_news or asyncio.Event()
    while True:
        is_news.clear()
        try:
            await step()
        except Exception:  # noqa: BLE001 - a task's top edge: the others depend on its going on
            logger.exception("unexpected error, going on")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await is_news.wait()


def _changed_beside_rules(running: Settings, changed: Settings) -> list[str]:
    """Return the keys outside `rules` that differ: `rocketmq.namesrv`."""
    names = []
    for section in type(running).model_fields:
        before, after = getattr(running, section), getattr(changed, section)
        if section == "rules" or before == after:
            continue
        if isinstance(before, BaseModel):
            fields = type(before).model_fields
            names += [f"{section}.{name}" for name in fields if getattr(before, name) != getattr(after, name)]
        else:
            names.append(section)
    return names
