"""The conversation with the hook: connect, say hello, bring it the rules, keep up with who is connected; and again."""

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from loguru import logger

from mq2mqtt.settings import Settings
from mq2mqtt_mosquitto.client import Incoming, Login, MqttClient, MqttError, Subscription
from mq2mqtt_mosquitto.control import (
    ANSWER_TOPIC,
    CONTROL_TOPIC,
    RESULTS_TOPIC,
    Answer,
    Clients,
    ConnectedClient,
    ControlError,
    OperationCode,
    Refused,
    Results,
    Stats,
    Table,
    Welcome,
    decode_answer,
    encode_batch,
    encode_operation,
)
from mq2mqtt_mosquitto.deliveries import Deliveries
from mq2mqtt_mosquitto.presence import Presence

__all__ = ["Session"]

HOOK_MAJOR: Final = 0
"""The hook's major version that this sidecar works with."""

_USERNAME = "mq2mqtt"
_ANSWER_SECONDS = 10.0
_SILENT_SECONDS = 1.5
_LIST_SECONDS = 2.0
_BACKOFF_FIRST = 0.1
_BACKOFF_MAX = 5.0
_WATCH_SECONDS = 1.0


class _HookError(Exception):
    """The hook does not do what it should."""


class Session:
    """`run` keeps one connection to the broker. `problem` says why there is none, `reached` is set while there is."""

    def __init__(self, settings: Settings, deliveries: Deliveries, presence: Presence) -> None:
        """Take the login from `settings`.

        Raises:
            ConfigError: a file of `host.tls` is no use.
        """
        host = settings.host
        self._spool = settings.spool.path
        token = host.token or host.password
        self._login = Login(
            url=host.url,
            client_id=host.client_id,
            username=host.username or (_USERNAME if token else None),
            password=token.get_secret_value() if token else None,
            tls=host.tls_context(),
        )
        self._deliveries = deliveries
        self._presence = presence
        self.problem: str | None = "the MQTT broker is not reached yet"
        self.reached = asyncio.Event()
        self.counted: Callable[[Stats], None] = _ignore
        """Called with the hook's counters whenever it tells them."""
        self._table, self._table_crc, self._pushed_crc = b"", 0, 0
        self._parents: list[str] = []
        self._subscribed: set[str] = set()
        self._changed = asyncio.Event()
        self._wants_list = False
        self._client: MqttClient | None = None
        # Bounded: one question at a time.
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._listing: list[ConnectedClient] = []

    def go_by(self, table: bytes, crc: int, *, parents: Sequence[str]) -> None:
        """Bring the hook this table, now or when it is reached."""
        self._table, self._table_crc, self._parents = table, crc, sorted(parents)
        self._changed.set()

    def ask_for_list(self) -> None:
        """Ask who is connected."""
        self._wants_list = True
        self._changed.set()

    async def run(self) -> None:
        """Stay connected until cancelled."""
        delay = _BACKOFF_FIRST
        while True:
            try:
                await self._serve()
            except TimeoutError:
                reason = "it does not answer"
            except (OSError, MqttError, ControlError, _HookError) as error:
                reason = getattr(error, "strerror", None) or str(error)
            except Exception:  # noqa: BLE001 - a task's top edge: the connection must come back
                logger.exception("unexpected error in the conversation with the hook, connecting again")
                reason = "internal error, see the log"
            if self.reached.is_set():
                delay = _BACKOFF_FIRST
            self._away(f"the MQTT broker {self._login.url} cannot be used: {reason}")
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
            delay = min(2 * delay, _BACKOFF_MAX)

    def _away(self, problem: str) -> None:
        self.reached.clear()
        if problem != self.problem:
            logger.warning("{}", problem)
        self.problem = problem

    def _is_silent(self) -> None:
        """Tell it; the connection stays, a busy broker answers yet."""
        if self.reached.is_set():
            self.problem = f"the MQTT broker {self._login.url} does not answer"

    async def _serve(self) -> None:
        """Connect and work until the connection ends; raises what ended it."""
        self._client = await MqttClient.connect(self._login, received=self._received, room=self._deliveries.flush)
        try:
            await self._open(self._client)
            self._deliveries.connected(self._send)
            self.problem = None
            self.reached.set()
            logger.info("the hook in {} is reached", self._login.url)
            await self._keep_up(self._client)
        finally:
            self._deliveries.disconnected()
            self._client.close()
            self._client = None

    async def _open(self, client: MqttClient) -> None:
        await client.subscribe([Subscription(RESULTS_TOPIC)])
        try:
            welcome = await self._ask(OperationCode.HELLO)
        except TimeoutError:
            raise _HookError(
                "no hook answers: load its plugin, with the token and the client id of this sidecar"
            ) from None
        if not isinstance(welcome, Welcome):
            raise _HookError(f"the hook answered a greeting with {type(welcome).__name__}")
        self._check(welcome)
        self._subscribed = set()
        await self._bring_table(client, in_force=welcome.table_crc)
        await self._list()

    def _check(self, welcome: Welcome) -> None:
        if welcome.version[0] != HOOK_MAJOR:
            raise _HookError(f"the hook is of version {welcome.version}, this sidecar needs {HOOK_MAJOR}.x")
        if not _same_directory(Path(welcome.spool_path), self._spool):
            raise _HookError(f"the hook writes to {welcome.spool_path}, but spool.path is {self._spool}")
        for line in welcome.problems:
            logger.error("the hook: {}", line)
        logger.info("hook {}.{} in {}", *welcome.version, welcome.broker_version)

    async def _keep_up(self, client: MqttClient) -> None:
        """Bring the hook what changes; look now and then whether all is well."""
        loop = asyncio.get_running_loop()
        list_at = loop.time() + _LIST_SECONDS
        while not client.closed.done():
            changed = asyncio.create_task(self._changed.wait(), name="mq2mqtt.mosquitto.changed")
            waited: list[asyncio.Future[Any]] = [changed, client.closed]
            try:
                wait_seconds = max(0.0, min(_WATCH_SECONDS, list_at - loop.time()))
                await asyncio.wait(waited, timeout=wait_seconds, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
            self._changed.clear()
            if client.closed.done():
                break
            await self._bring_table(client, in_force=None)
            if self._wants_list or loop.time() >= list_at:
                await self._list()
                list_at = loop.time() + _LIST_SECONDS
            if self._deliveries.overdue_seconds > _ANSWER_SECONDS:
                raise _HookError("the hook does not answer")
        raise MqttError(client.closed.result())

    async def _bring_table(self, client: MqttClient, *, in_force: int | None) -> None:
        """Push the table if it is not the one `in_force` (`None`: the last one that was pushed)."""
        parents = [f"{parent}/#" for parent in self._parents if parent not in self._subscribed]
        if parents:
            # Wills pass by the hook on their way to a subscriber; it denies us all else that we subscribe to.
            await client.subscribe([Subscription(name, qos=1) for name in parents])
            self._subscribed.update(self._parents)
        pushed = self._pushed_crc if in_force is None else in_force
        crc, table = self._table_crc, self._table
        if pushed != crc and table:
            answer = await self._ask(OperationCode.TABLE, payload=table)
            if not isinstance(answer, Table):
                raise _HookError(f"the hook answered a lane table with {type(answer).__name__}")
            if not answer.ok:
                raise _HookError(f"the hook refuses the lane table: {answer.text}")
            for line in answer.text.splitlines():
                logger.error("the hook: {}", line)
        self._pushed_crc = crc

    async def _list(self) -> None:
        self._wants_list = False
        self._listing = []
        self._presence.list_asked()
        answer = await self._ask(OperationCode.LIST)
        if not isinstance(answer, Clients):
            raise _HookError(f"the hook answered a question for its clients with {type(answer).__name__}")
        self._presence.listed(answer.offset, self._listing)

    async def _ask(self, code: OperationCode, *, payload: bytes = b"") -> Answer:
        """Send one operation that has an answer of its own; raises `TimeoutError` without one."""
        number = self._deliveries.next_number()
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        if self._client is None:
            raise MqttError("closed")
        closed = self._client.closed
        self._client.publish(CONTROL_TOPIC, encode_batch(number, [encode_operation(code, payload=payload)]))
        waited: list[asyncio.Future[Any]] = [answer, closed]
        silent = asyncio.get_running_loop().call_later(_SILENT_SECONDS, self._is_silent)
        try:
            await asyncio.wait(waited, timeout=_ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            silent.cancel()
            del self._asked[number]
        if not answer.done():
            if closed.done():
                raise MqttError(closed.result())
            raise TimeoutError
        if self.reached.is_set():
            self.problem = None
        found = answer.result()
        if isinstance(found, Refused):
            raise _HookError(f"the hook refuses {code.name}: {found.text}")
        return found

    def _send(self, batch: bytes) -> bool:
        """Send a batch of deliveries, unless the connection is full."""
        if self._client is None or self._client.is_full:
            return False
        self._client.publish(CONTROL_TOPIC, batch)
        return True

    def _received(self, message: Incoming) -> None:
        if message.topic not in {ANSWER_TOPIC, RESULTS_TOPIC}:
            return
        try:
            number, answer = decode_answer(message.payload)
        except ControlError as error:
            logger.error("the hook sent what is no answer: {}", error)
            return
        if isinstance(answer, Stats):
            self.counted(answer)
        elif isinstance(answer, Clients) and number in self._asked:
            self._listing += answer.clients
            if answer.last:
                self._answer(number, answer)
        elif number in self._asked:
            self._answer(number, answer)
        elif isinstance(answer, Results | Refused):
            self._deliveries.answered(number, answer)

    def _answer(self, number: int, answer: Answer) -> None:
        waiting = self._asked[number]
        if not waiting.done():
            waiting.set_result(answer)


def _ignore(_stats: Stats) -> None:
    """Nobody counts."""


def _same_directory(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one == other.absolute()
