"""Parked messages that an operator wants replayed: each goes the way of its rule once more."""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from loguru import logger

from mq2mqtt.errors import BridgeError, LaneError, MessageRejectedError, UnmappableMessageError
from mq2mqtt.host import MqttHost
from mq2mqtt.message import ReceivedMessage
from mq2mqtt.spool.frame import FrameKind
from mq2mqtt.spool.parked import ParkedMessage, ParkedStore
from mq2mqtt.telemetry import RuleTelemetry
from mq2mqtt.uplink import Uplink

__all__ = ["DownlinkReplay", "LaneReplay", "Source", "key_of"]

_AT_ONCE: Final = 100
"""Messages of one rule that are on their way again at a time."""
_OFFSET = re.compile(r"[0-9]{1,19}")
# Broker, queue, offset, and which message was there; a key that an older version made ends with the offset.
_PLACE = re.compile(r"(.+)/([0-9]{1,19})/([0-9]{1,19})(@[0-9a-f]{8})?")


class _Replay:
    """Brings the messages that are to be replayed to `send`, at most `_AT_ONCE` without an outcome.

    `send` returns when the message is on its way; `settled` says that it has arrived. One that `send` raises
    `BridgeError` for, or whose outcome nobody tells before the end of the process, is tried again. A message that does
    not come `from_here` is parked again: another type of rule had the id when it was parked.
    """

    def __init__(
        self,
        parked: ParkedStore,
        send: Callable[[ParkedMessage], Awaitable[None]],
        *,
        from_here: Callable[[ParkedMessage], bool],
        rule_id: str,
    ) -> None:
        self._parked = parked
        self._send = send
        self._from_here = from_here
        self._rule_id = rule_id
        self._under_way: set[str] = set()
        self._arrived: set[str] = set()
        """Settled, and not deleted yet: bounded as what may be parked."""
        self._outcome = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._problem = ""

    def look(self) -> None:
        """Begin with what is to be replayed, if there is any; called about once a second."""
        if self._closing or self._task is not None:
            return
        try:
            for key in tuple(self._arrived):
                self._forget(key)
            keys = self._parked.replays()
        except LaneError as error:
            self._has(str(error))
            return
        if keys:
            self._task = asyncio.create_task(self._run(keys), name=f"mq2mqtt.replay[{self._rule_id}]")

    async def _run(self, keys: list[str]) -> None:
        try:
            for key in keys:
                while len(self._under_way) >= _AT_ONCE and not self._closing:
                    self._outcome.clear()
                    await self._outcome.wait()
                if self._closing:
                    return
                if key not in self._under_way:
                    await self._begin(key)
                # Each reads a file: the loop gets its turn before the next.
                await asyncio.sleep(0)
            self._problem = ""
        except BridgeError as error:
            self._has(str(error))
        except Exception:  # noqa: BLE001 - a task's top edge: one rule's bug must not stop the others
            logger.exception("rule {}: unexpected error in a replay, trying again", self._rule_id)
        finally:
            self._task = None

    async def _begin(self, key: str) -> None:
        message = self._parked.read_replay(key)
        if message is None:
            return
        if not self._from_here(message):
            reason = "a rule of another type had this id when it was parked: it has no way to go"
            self._parked.append(message.frame, key=key, reason=reason)
            logger.warning("rule {} does not replay {}: {}", self._rule_id, key, reason)
            return
        self._under_way.add(key)
        try:
            await self._send(message)
        except BaseException:
            self._under_way.discard(key)
            raise

    def settled(self, key: str) -> None:
        """The message with this key has its outcome; never raises."""
        self._under_way.discard(key)
        self._outcome.set()
        self._arrived.add(key)
        try:
            self._forget(key)
        except LaneError as error:
            self._has(str(error))

    def park_again(self, message: ParkedMessage, reason: str) -> None:
        """The message arrived nowhere; never raises. Where the disk refuses, it is tried again."""
        self._under_way.discard(message.key)
        self._outcome.set()
        try:
            self._parked.append(message.frame, key=message.key, reason=reason)
        except LaneError as error:
            self._has(str(error))
        else:
            logger.warning("rule {} has parked {} again: {}", self._rule_id, message.key, reason)

    def _forget(self, key: str) -> None:
        self._parked.replayed(key)
        self._arrived.discard(key)

    def _has(self, problem: str) -> None:
        """Tell of a problem once."""
        if problem != self._problem:
            logger.warning("rule {}: a replay waits: {}", self._rule_id, problem)
        self._problem = problem

    def stop(self) -> None:
        """Begin with nothing more, and abandon what `send` is about. Idempotent."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """Begin with nothing more; return when what `send` is about is done. Idempotent."""
        self._closing = True
        self._outcome.set()
        try:
            if self._task is not None:
                await asyncio.wait([self._task])
        finally:
            self.stop()


class LaneReplay:
    """Replays what was parked on its way from a lane to RocketMQ, under the key that it has had all the time."""

    def __init__(self, parked: ParkedStore, uplink: Uplink, telemetry: RuleTelemetry) -> None:
        self._parked = parked
        self._uplink = uplink
        self._telemetry = telemetry
        self._replay = _Replay(parked, self._send, from_here=_from_lane, rule_id=telemetry.rule_id)
        self.count = 0
        """Messages that have gone this way, so were accepted once more."""
        self.look = self._replay.look
        self.close = self._replay.close
        self.stop = self._replay.stop

    async def _send(self, message: ParkedMessage) -> None:
        key, frame = message.key, message.frame
        self._telemetry.in_flight += 1
        try:
            await self._uplink.send_again(frame, int(key))
        except (UnmappableMessageError, MessageRejectedError) as error:
            evicted = self._parked.append(frame, key=key, reason=str(error))
            self._count()
            self._telemetry.parked(f"offset {key}", str(error), evicted=evicted)
        else:
            self._count()
            self._telemetry.sent([frame.accepted_us])
        finally:
            self._telemetry.in_flight -= 1
        self._replay.settled(key)

    def _count(self) -> None:
        self.count += 1
        self._telemetry.outcomes["accepted"] += 1


def _from_lane(message: ParkedMessage) -> bool:
    return _OFFSET.fullmatch(message.key) is not None


def key_of(message: ReceivedMessage) -> str:
    """Return the key that `message` is parked with: the same each time RocketMQ, or a replay, brings it.

    Its place alone is not enough: a rule may get another source, and a topic that is made anew begins at offset 0.
    """
    if isinstance(message, _ReplayedMessage):
        return message.parked.key
    identity = f"{message.topic}\0{message.properties.get('UNIQ_KEY') or message.born_ms}"
    digest = hashlib.blake2s(identity.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
    return f"{message.broker}/{message.queue_id}/{message.offset}@{digest}"


class Source(Protocol):
    """Where a message for devices comes from: RocketMQ, or what was parked."""

    def settle(self, message: ReceivedMessage) -> None:
        """Say that nothing more will be done about `message`."""


class DownlinkReplay:
    """Replays what was parked on its way from RocketMQ to devices: `take` gets each as if it had come just now."""

    def __init__(
        self, parked: ParkedStore, host: MqttHost, take: Callable[[Source, ReceivedMessage], None], *, rule_id: str
    ) -> None:
        self._host = host
        self._take = take
        self._replay = _Replay(parked, self._send, from_here=_from_rocketmq, rule_id=rule_id)
        self.look = self._replay.look
        self.stop = self._replay.stop

    async def _send(self, message: ParkedMessage) -> None:
        await self._host.available()
        self._take(self, _ReplayedMessage(message))

    def settle(self, message: ReceivedMessage) -> None:
        """See `Source.settle`."""
        assert isinstance(message, _ReplayedMessage)  # noqa: S101 - there are no others
        self._replay.settled(message.parked.key)

    def park_again(self, message: ReceivedMessage, reason: str) -> None:
        """`message` has reached nobody: leave it to the operator, who asked for its replay too early, or in vain."""
        assert isinstance(message, _ReplayedMessage)  # noqa: S101 - there are no others
        self._replay.park_again(message.parked, reason)


def _from_rocketmq(message: ParkedMessage) -> bool:
    return message.frame.kind == FrameKind.ROCKETMQ and _PLACE.fullmatch(message.key) is not None


class _ReplayedMessage:
    """A parked message as a link has received it, see `mq2mqtt.message.ReceivedMessage`."""

    def __init__(self, parked: ParkedMessage) -> None:
        frame = parked.frame
        self.parked = parked
        self.topic = frame.topic
        self.body = frame.payload
        entries = frame.properties.decode("utf-8", "surrogateescape").split("\x02")
        self.properties = dict(entry.split("\x01", 1) for entry in entries if "\x01" in entry)
        self.born_ms = frame.accepted_us // 1000
        place = _PLACE.fullmatch(parked.key)
        assert place is not None  # noqa: S101 - see `_from_rocketmq`
        self.broker, self.queue_id, self.offset = place[1], int(place[2]), int(place[3])
