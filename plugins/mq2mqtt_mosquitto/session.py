"""The conversation with the hook: connect, say hello, bring it the rules, keep up with who is connected; and again."""

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from loguru import logger

from mq2mqtt.settings import Settings
from mq2mqtt_mosquitto.client import Incoming, MqttClient, MqttError, Subscription
from mq2mqtt_mosquitto.control import (
    ANSWER_TOPIC,
    BATCH_BYTES,
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
from mq2mqtt_mosquitto.greeting import login_of, objection
from mq2mqtt_mosquitto.presence import Presence
from mq2mqtt_mosquitto.table import told_parents

__all__ = ["Session"]

_ANSWER_SECONDS = 10.0
_SILENT_SECONDS = 1.5
_LOST_SECONDS = 3.0
_STATS_SECONDS = 1.0
# Only against what neither events nor their loss have told.
_LIST_SECONDS = 30.0
# How precisely the broker's limit is looked for; also what a packet has besides its payload, and a batch that passes
# if anything does.
_LIMIT_BYTES = 64
_PROBED = "$mq2mqtt/probe"
_BACKOFF_FIRST = 0.1
_BACKOFF_MAX = 5.0


class _HookError(Exception):
    """The hook does not do what it should."""


class Session:
    """`run` keeps one connection to the broker. `problem` says why there is none, `reached` is set while there is."""

    def __init__(self, settings: Settings, deliveries: Deliveries, presence: Presence) -> None:
        """Take the login from `settings`.

        Raises:
            ConfigError: a file of `host.tls` is no use.
        """
        self._spool = settings.spool.path
        self._login = login_of(settings)
        self._deliveries = deliveries
        self._presence = presence
        self.problem: str | None = "the MQTT broker is not reached yet"
        self.reached = asyncio.Event()
        self.told: Callable[[Stats], None] = _ignore
        """Called with what the hook counts and finds wrong, whenever it tells."""
        self._table, self._table_crc, self._pushed_crc = b"", 0, 0
        self._parents: list[str] = []
        # As far as is known: a session may be kept from an earlier life.
        self._subscribed = told_parents(self._spool)
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
            packet_bytes = await self._open(self._client)
            self._deliveries.connected(self._send, packet_bytes=packet_bytes)
            self.problem = None
            self.reached.set()
            logger.info("the hook in {} is reached", self._login.url)
            await self._keep_up(self._client)
        finally:
            self._deliveries.disconnected()
            self._client.close()
            self._client = None

    async def _open(self, client: MqttClient) -> int | None:
        """Make oneself known; return the longest packet that the broker takes, `None` for any."""
        try:
            await client.subscribe([Subscription(RESULTS_TOPIC)])
        except MqttError as error:
            name = self._login.client_id
            raise _HookError(f"{error}; its sidecar_client_id must be host.client_id, {name}") from None
        try:
            welcome = await self._ask(OperationCode.HELLO)
        except TimeoutError:
            raise _HookError("no hook answers: load its plugin in mosquitto.conf") from None
        if not isinstance(welcome, Welcome):
            raise _HookError(f"the hook answered a greeting with {type(welcome).__name__}")
        self._check(welcome)
        packet_bytes = await self._limit_of(client)
        if not client.session_present:
            self._subscribed = set()
        await self._subscribe(client, afresh=True)
        self._pushed_crc = welcome.table_crc
        await self._bring_table()
        await self._list()
        return packet_bytes

    def _check(self, welcome: Welcome) -> None:
        if (problem := objection(welcome, self._spool)) is not None:
            raise _HookError(problem)
        logger.info("hook {}.{} in {}", *welcome.version, welcome.broker_version)

    async def _keep_up(self, client: MqttClient) -> None:
        """Bring the hook what changes, and ask it how it is."""
        loop = asyncio.get_running_loop()
        list_at = loop.time() + _LIST_SECONDS
        client.closed.add_done_callback(lambda _: self._changed.set())
        while not client.closed.done():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STATS_SECONDS):
                    await self._changed.wait()
            self._changed.clear()
            await self._subscribe(client, afresh=False)
            await self._bring_table()
            if self._wants_list or loop.time() > list_at:
                await self._list()
                list_at = loop.time() + _LIST_SECONDS
            else:
                await self._ask(OperationCode.STATS)
            if self._deliveries.overdue_seconds > _LOST_SECONDS:
                await self._look_for_the_lost()
        raise MqttError(client.closed.result())

    async def _look_for_the_lost(self) -> None:
        """A question that came later is answered: was what has no answer too long? A single message may be."""
        longest = self._deliveries.longest_unanswered
        limit = await self._find_limit(longest)
        if limit < longest:
            self._deliveries.limit(limit)
        elif self._deliveries.overdue_seconds > _ANSWER_SECONDS:
            raise _HookError("the hook does not answer")

    async def _limit_of(self, client: MqttClient) -> int | None:
        """Return the longest packet that the broker takes, as far as batches go; `None` for any."""
        told = client.limits.packet_bytes
        longest = BATCH_BYTES if told is None else min(told - _LIMIT_BYTES, BATCH_BYTES)
        found = await self._find_limit(longest)
        return told if found == longest else found

    async def _find_limit(self, longest: int) -> int:
        """Return how long a batch may be, `longest` at most.

        Mosquitto tells nobody its `message_size_limit`, and drops what is longer without a word.
        """
        if await self._passes(longest):
            return longest
        passes, fails = _LIMIT_BYTES, longest
        while fails - passes > _LIMIT_BYTES:
            middle = (passes + fails) // 2
            if await self._passes(middle):
                passes = middle
            else:
                fails = middle
        logger.warning("the broker drops what is longer than {} bytes: raise its message_size_limit", passes)
        return passes

    async def _passes(self, size: int) -> bool:
        """Whether the hook gets a batch of `size` bytes: a message for a client that is not there."""
        if self._client is None:
            raise MqttError("closed")
        number = self._deliveries.next_number()
        probe = partial(encode_operation, OperationCode.DELIVER, client_id=_PROBED, topic=_PROBED)
        missing = max(0, size - len(encode_batch(number, [probe()])))
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._client.publish(CONTROL_TOPIC, encode_batch(number, [probe(payload=bytes(missing))]))
            # The hook answers in the order in which it is asked.
            await self._ask(OperationCode.STATS)
        finally:
            del self._asked[number]
        return answer.done()

    async def _subscribe(self, client: MqttClient, *, afresh: bool) -> None:
        """Have wills pass by the hook on their way to us; it denies us all else that is subscribed to."""
        wanted = set(self._parents)
        if new := wanted if afresh else wanted - self._subscribed:
            await client.subscribe([Subscription(f"{parent}/#", qos=1) for parent in sorted(new)])
        if gone := self._subscribed - wanted:
            await client.unsubscribe([f"{parent}/#" for parent in sorted(gone)])
        self._subscribed = wanted

    async def _bring_table(self) -> None:
        """Push the table if it is not the one that the hook has."""
        crc, table = self._table_crc, self._table
        if crc == self._pushed_crc:
            return
        answer = await self._ask(OperationCode.TABLE, payload=table)
        if not isinstance(answer, Table):
            raise _HookError(f"the hook answered a lane table with {type(answer).__name__}")
        if not answer.ok:
            raise _HookError(f"the hook refuses the lane table: {answer.text}")
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
            self.told(answer)
        if isinstance(answer, Clients) and number in self._asked:
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
