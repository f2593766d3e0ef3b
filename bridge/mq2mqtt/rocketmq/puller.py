"""One queue that this member owns: pulled ahead within bounds, handed out within the window."""

import asyncio
import logging
import random
from typing import Final, Protocol

from mq2mqtt.rocketmq.client import Client
from mq2mqtt.rocketmq.codec import decode_messages
from mq2mqtt.rocketmq.codes import RequestCode, ResponseCode
from mq2mqtt.rocketmq.errors import DecodeError, NotConnected, RequestTimeout, for_code
from mq2mqtt.rocketmq.liveness import Liveness
from mq2mqtt.rocketmq.message import ReceivedMessage
from mq2mqtt.rocketmq.offsets import SettledPrefix
from mq2mqtt.rocketmq.remoting import Response
from mq2mqtt.rocketmq.route import ReadQueue
from mq2mqtt.rocketmq.tags import TagFilter

__all__ = ["PREFETCH_BYTES", "PrefetchBudget", "Puller", "PullerEvents"]

logger = logging.getLogger(__name__)

PREFETCH_BYTES: Final = 32 * 1024 * 1024
_PREFETCH_MESSAGES: Final = 512
# The broker cuts an answer at 256 KiB or, by default, 32 messages (`maxTransferCountOnMessageInMemory`).
_MAX_MESSAGES: Final = 256
_SUSPEND_SECONDS: Final = 15.0
# It looks at the polls it holds every 5 seconds, so that an answer may take 20.
_PULL_TIMEOUT: Final = 30.0
_SUSPEND_FLAG: Final = 2
_SUBSCRIPTION_FLAG: Final = 4
_QUICK_SECONDS: Final = 0.1
_FIRST_DELAY: Final = 0.2
_MAX_DELAY: Final = 5.0
_MAX_DOUBLINGS: Final = 8
_ANSWERS: Final = frozenset(
    (
        ResponseCode.SUCCESS,
        ResponseCode.PULL_NOT_FOUND,
        ResponseCode.PULL_RETRY_IMMEDIATELY,
        ResponseCode.PULL_OFFSET_MOVED,
    )
)


class PrefetchBudget:
    """Bounds the bytes that all queues of a client hold back undelivered.

    A queue that holds nothing may always pull once, so that queues nobody reads cannot starve the others. The bound
    is therefore `limit` plus one answer for each queue.
    """

    def __init__(self, limit: int = PREFETCH_BYTES) -> None:
        self.limit = limit
        self.used = 0


class PullerEvents(Protocol):
    """What a queue tells its consumer."""

    def ready(self, puller: "Puller") -> None:
        """There is something to hand out."""

    def advanced(self) -> None:
        """The offset that can be committed has grown."""

    def recovered(self) -> None:
        """An answer came after a failure: the group may have changed meanwhile."""

    def forgotten(self) -> None:
        """The broker has no offset of the whole group any more."""

    def cannot_decode(self, puller: "Puller", error: DecodeError) -> None:
        """A message cannot be read; it is left out."""


class Puller:
    """Pulls one queue for as long as it is owned.

    A message that cannot be decoded is logged with its place and left out: nothing can be done with its bytes
    but to look at them, for which RocketMQ still has it.

    Attributes:
        topic: the queue's own, `%RETRY%group` included.
        sibling: the other topic that the group reads: of a topic and `%RETRY%group`, each is the other's.
        address: the broker's master; the consumer keeps it up to date.
        problem: why nothing can be pulled; `None` after an answered pull.
        max_offset: the queue's end, as of the last answer.
        committed: the offset that the broker is known to have been told, or `None`.
        commit_again: it may have forgotten that.
        outdated: the topic was deleted and made again, and its offsets with it; the consumer begins anew.
    """

    def __init__(  # noqa: PLR0913 - keyword-only, each a thing of its own
        self,
        client: Client,
        *,
        group: str,
        topic: str,
        sibling: str,
        queue: ReadQueue,
        address: str,
        offset: int,
        tags: TagFilter,
        shown_topic_property: str | None,
        events: PullerEvents,
        liveness: Liveness,
        budget: PrefetchBudget,
    ) -> None:
        self.topic = topic
        self.sibling = sibling
        self.queue = queue
        self.address = address
        self.progress = SettledPrefix(offset)
        self.problem: str | None = f"no answer yet about {topic} {queue.broker}:{queue.queue_id}"
        self.max_offset = offset
        self.committed: int | None = None
        self.commit_again = False
        self.outdated = False
        self._topic_missing = False
        self._doubted = False
        self._held: asyncio.Timeout | None = None
        self._client = client
        self._tags = tags
        self._shown_topic_property = shown_topic_property
        self._events = events
        self._liveness = liveness
        self._budget = budget
        self._offset = offset
        self._failures = 0
        self._one_by_one = False
        self._buffer: list[tuple[list[ReceivedMessage], int, int]] = []  # messages, offset after them, bytes
        self._buffered = 0
        self._taken = asyncio.Event()
        self._fields = {
            "consumerGroup": group,
            "topic": topic,
            "queueId": str(queue.queue_id),
            "commitOffset": "0",
            "subscription": tags.expression,
            "subVersion": "0",
            "expressionType": "TAG",
        }
        self._task = asyncio.create_task(self._run(), name=f"rocketmq.pull[{group} {topic} {queue.queue_id}]")

    @property
    def waits(self) -> bool:
        """Whether it does not pull now, so that `max_offset` grows old."""
        return not self._may_pull()

    def can_hand_out(self) -> bool:
        """Whether `take` has something to give."""
        return bool(self._buffer) and self.progress.room(self._buffer[0][0]) > 0

    def take(self) -> list[ReceivedMessage]:
        """Hand out the next messages, as many as the window lets through; call only when `can_hand_out`."""
        messages, after, size = self._buffer[0]
        room = self.progress.room(messages)
        if room == len(messages):
            del self._buffer[0]
            self._budget.used -= size
            self.progress.hand_out(messages, after)
        else:
            rest = messages[room:]
            messages = messages[:room]
            self._buffer[0] = (rest, after, size)
            self.progress.hand_out(messages, rest[0].offset)
        self._buffered -= len(messages)
        self._taken.set()
        return messages

    def doubt(self) -> None:
        """The topic may be gone, or no longer readable: ask at once instead of waiting for a poll that is held."""
        self._doubted = True
        if self._held is not None:
            self._held.reschedule(asyncio.get_running_loop().time())

    async def stop(self) -> None:
        """Pull no more and forget what is not handed out. Idempotent."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._drop_buffer()

    async def refresh_max_offset(self) -> None:
        """Ask for the queue's end, while nothing is pulled; raises as `Client.max_offset`."""
        self.max_offset = await self._client.max_offset(self.address, self.topic, self.queue.queue_id)

    def _drop_buffer(self) -> None:
        self._budget.used -= sum(size for _, _, size in self._buffer)
        self._buffer.clear()
        self._buffered = 0

    def _may_pull(self) -> bool:
        return not self._buffer or (self._buffered < _PREFETCH_MESSAGES and self._budget.used < self._budget.limit)

    async def _run(self) -> None:
        while True:
            while not self._may_pull():
                self._taken.clear()
                await self._taken.wait()
            try:
                await self._pull()
            except Exception:
                # The top edge of the task: one strange answer must not end the queue for good.
                logger.exception("pulling %s %s", self.topic, self.queue)
                await self._fail("internal error, see the log")

    async def _pull(self) -> None:
        # The first pull, and the first after a failure, must not be held: its answer is the proof that all is well.
        suspend = self.problem is None and not self._doubted
        self._doubted = False
        sent_at = asyncio.get_running_loop().time()
        try:
            response = await self._ask(suspend=suspend)
            held = suspend and asyncio.get_running_loop().time() - sent_at >= _QUICK_SECONDS
            if response.code in _ANSWERS and await self._is_made_again(response, held=held):
                self.outdated = True
                self._events.recovered()
                await self._fail(f"topic {self.topic} has been made again")
                return
        except TimeoutError:
            return  # `doubt`; the poll's answer, if any comes, is not waited for, and what it holds is pulled again
        except (NotConnected, RequestTimeout) as error:
            await self._fail(str(error))
            await self._liveness.until_answering(self.address)
            return
        await self._take_answer(response, quick=suspend and not held)

    async def _ask(self, *, suspend: bool) -> Response:
        fields = {
            **self._fields,
            "queueOffset": str(self._offset),
            "maxMsgNums": "1" if self._one_by_one else str(_MAX_MESSAGES),
            "sysFlag": str(_SUBSCRIPTION_FLAG | (_SUSPEND_FLAG if suspend else 0)),
            "suspendTimeoutMillis": str(int(_SUSPEND_SECONDS * 1000)),
        }
        if not suspend:
            return await self._client.call(self.address, RequestCode.PULL_MESSAGE, fields)
        try:
            async with asyncio.timeout(None) as self._held:
                return await self._client.call(self.address, RequestCode.PULL_MESSAGE, fields, timeout=_PULL_TIMEOUT)
        finally:
            self._held = None

    async def _is_made_again(self, response: Response, *, held: bool) -> bool:
        """Whether the topic was deleted and made again: its first messages may then lie before our offset.

        It shows when the deletion was seen. One that was not, because it took place while a poll was held, is known
        by the offset that we have committed and the broker has no more (5.0 and newer; older ones keep it). An
        operator who deletes the group deletes that too, but with it the group's offset in the other topic it reads.
        """
        if self._topic_missing:
            return True
        back = response.code == ResponseCode.PULL_OFFSET_MOVED and _next_offset(response) < self._offset
        suspicious = back or (held and response.code == ResponseCode.SUCCESS)
        if not suspicious or self.committed is None or self.commit_again:
            return False
        if await self._has_offset(self.topic, self.queue.queue_id):
            return False
        if back or await self._has_offset(self.sibling, 0):
            return True
        self._events.forgotten()
        return False

    async def _has_offset(self, topic: str, queue_id: int) -> bool:
        """Whether the broker has an offset of the group for this queue."""
        fields = {
            "consumerGroup": self._fields["consumerGroup"],
            "topic": topic,
            "queueId": str(queue_id),
            "setZeroIfNotFound": "false",
        }
        stored = await self._client.call(self.address, RequestCode.QUERY_CONSUMER_OFFSET, fields)
        return stored.code != ResponseCode.QUERY_NOT_FOUND

    async def _take_answer(self, response: Response, *, quick: bool) -> None:
        code = response.code
        if code == ResponseCode.SUCCESS:
            self._answered(response)
            self._keep(response)
        elif code in {ResponseCode.PULL_NOT_FOUND, ResponseCode.PULL_RETRY_IMMEDIATELY}:
            self._answered(response)
            before = self._offset
            if code == ResponseCode.PULL_RETRY_IMMEDIATELY:
                self._advance(_next_offset(response))
            if quick and self._offset == before:
                # A broker that does not hold polls, or is just removing what we ask for.
                await asyncio.sleep(_QUICK_SECONDS)
        elif code == ResponseCode.PULL_OFFSET_MOVED:
            self._answered(response)
            self._move(_next_offset(response), response.remark)
        else:
            self._topic_missing = self._topic_missing or code == ResponseCode.TOPIC_NOT_EXIST
            await self._fail(str(for_code(code, response.remark, address=self.address)))

    def _answered(self, response: Response) -> None:
        self.max_offset = int(response.fields.get("maxOffset", self.max_offset))
        if self.problem is not None:
            self.problem = None
            if self._failures:
                self._failures = 0
                # A broker that was killed may have forgotten the last 5 seconds of commits.
                self.commit_again = True
                self._events.recovered()

    async def _fail(self, problem: str) -> None:
        if self.problem != problem:
            logger.info("%s broker %s queue %d: %s", self.topic, self.queue.broker, self.queue.queue_id, problem)
        self.problem = problem
        self._failures += 1
        delay = min(_FIRST_DELAY * 2 ** min(self._failures - 1, _MAX_DOUBLINGS), _MAX_DELAY)
        await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter

    def _keep(self, response: Response) -> None:
        after = _next_offset(response)
        rest: list[int] = []
        try:
            messages = decode_messages(
                response.body, broker=self.queue.broker, on_error=self._cannot_decode, on_rest=rest.append
            )
        except DecodeError as error:
            # Not even the sizes can be trusted: find the culprit by pulling one message at a time.
            if not self._one_by_one:
                self._one_by_one = True
                return
            self._cannot_decode(error)
            messages = []
        self._one_by_one = False
        if rest:
            after = rest[0]
        if self._tags.tags:
            matches = self._tags.matches
            messages = [message for message in messages if matches(message.properties)]
        if self._shown_topic_property is not None:
            name = self._shown_topic_property
            messages = [m._replace(topic=m.properties.get(name, m.topic)) for m in messages]
        if not messages:
            self._advance(after)
            return
        self._offset = after
        size = max(len(response.body), sum(len(message.body) for message in messages))
        self._buffer.append((messages, after, size))
        self._buffered += len(messages)
        self._budget.used += size
        self._events.ready(self)

    def _cannot_decode(self, error: DecodeError) -> None:
        self._events.cannot_decode(self, error)

    def _advance(self, offset: int) -> None:
        """Go on at `offset`: there is nothing for us before it."""
        if offset == self._offset:
            return
        self._offset = offset
        if self._buffer:
            messages, _, size = self._buffer[-1]
            self._buffer[-1] = (messages, offset, size)
        else:
            self.progress.frontier = offset
            self._events.advanced()

    def _move(self, offset: int, reason: str) -> None:
        """Follow the broker to `offset`: messages were deleted or lost, or an operator has reset the group."""
        logger.warning(
            "%s broker %s queue %d: the broker moves us from offset %d to %d (%s)",
            self.topic, self.queue.broker, self.queue.queue_id, self._offset, offset, reason,
        )  # fmt: skip
        if offset >= self._offset:
            self._advance(offset)
            return
        self._drop_buffer()
        self._offset = offset
        self.progress.reset(offset)
        self._events.advanced()


def _next_offset(response: Response) -> int:
    return int(response.fields["nextBeginOffset"])
