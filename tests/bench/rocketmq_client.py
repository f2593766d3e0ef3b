"""How fast the RocketMQ client sends and receives: 64-byte bodies, the bridge's properties, all different."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from mq2mqtt.message import RocketMessage
from mq2mqtt.rocketmq import Client, RequestCode, Response, SystemBusy, WriteQueue, decode_messages
from tests.bench.experiment import Bench, Experiment, Measurement, gather_bounded

SINGLES = 20_000
BATCHED = 400_000
BATCH = 512
RECEIVED = 200_000
DRAIN_SECONDS = 120.0
"""A lane that is not empty by then is no benchmark any more."""
_BODY = b"x" * 64
_SUSPEND_AND_SUBSCRIPTION = "6"


def make_message(topic: str, number: int) -> RocketMessage:
    """Make a message as the bridge's mapping does."""
    properties = {
        "TAGS": "MQTT_COMMON",
        "KEYS": f"default:telemetry-out:{number}",
        "qoslevel": "1",
        "cleansessionflag": "true",
        "mqttSecondTopic": f"/room{number % 97}/temperature",
        "clientId": f"GID_dev@@@device{number % 10_007:05d}",
    }
    return RocketMessage(topic, _BODY, properties)


def batches_of(
    topic: str, count: int, make: Callable[[str, int], RocketMessage] = make_message
) -> list[list[RocketMessage]]:
    """Make `count` messages, in batches."""
    messages = [make(topic, number) for number in range(count)]
    return [messages[first : first + BATCH] for first in range(0, count, BATCH)]


@dataclass(frozen=True)
class Target:
    """A topic of the bench's RocketMQ, and a client of it."""

    client: Client
    topic: str
    queues: tuple[WriteQueue, ...]
    address: str

    async def send(self, number: int, messages: list[RocketMessage]) -> None:
        """Send to the queue whose turn it is."""
        queue = self.queues[number % len(self.queues)]
        while True:
            try:
                await self.client.send(self.topic, queue.broker, queue.queue_id, messages, timeout=30)
            except SystemBusy:
                await asyncio.sleep(0.01)  # the broker sheds load after 200 ms in its queue
            else:
                return

    async def fill(self, batches: list[list[RocketMessage]]) -> None:
        """Send `batches`, 8 in flight."""
        await gather_bounded(lambda number: self.send(number, batches[number]), count=len(batches), in_flight=8)

    async def shown(self) -> int:
        """Return how many messages the queues show: a broker indexes them after it has answered."""
        offsets = (self.client.max_offset(self.address, self.topic, queue.queue_id) for queue in self.queues)
        return sum(await asyncio.gather(*offsets))

    async def wait_shown(self, count: int) -> None:
        """Wait until the queues show `count` messages."""
        async with asyncio.timeout(DRAIN_SECONDS):
            while await self.shown() < count:
                await asyncio.sleep(0.05)

    async def _pull(self, queue: WriteQueue, offset: int) -> Response:
        fields = {
            "consumerGroup": "GID_bench",
            "topic": self.topic,
            "queueId": str(queue.queue_id),
            "queueOffset": str(offset),
            "maxMsgNums": "1024",
            "sysFlag": _SUSPEND_AND_SUBSCRIPTION,
            "commitOffset": "0",
            "suspendTimeoutMillis": "1000",
            "subscription": "*",
            "subVersion": "0",
            "expressionType": "TAG",
        }
        return await self.client.call(self.address, RequestCode.PULL_MESSAGE, fields, timeout=30)

    async def drain(self, *, decode: bool) -> int:
        """Pull every queue to its end; return the number of messages decoded."""

        async def one(queue: WriteQueue) -> int:
            offset = decoded = 0
            end = await self.client.max_offset(self.address, self.topic, queue.queue_id)
            while offset < end:
                response = await self._pull(queue, offset)
                offset = int(response.fields["nextBeginOffset"])
                if decode:
                    decoded += len(decode_messages(response.body, broker=queue.broker))
            return decoded

        return sum(await asyncio.gather(*map(one, self.queues)))


@asynccontextmanager
async def target(bench: Bench, topic: str | None = None) -> AsyncIterator[Target]:
    """Connect to `topic`; without one make one of 8 queues, and delete it afterwards."""
    async with Client(namesrv=await bench.namesrv(), client_id="bench", request_timeout=10) as client:
        name = topic or f"bench_{uuid.uuid4().hex[:12]}"
        if topic is None:
            await client.create_topic(name, queues=8)
        queues = await client.queues(name)
        address = (await client.route(name)).master(queues[0].broker)
        assert address is not None
        yield Target(client, name, queues, address)
        if topic is None:
            await client.delete_topic(name)


async def client_send(bench: Bench) -> list[Measurement]:
    """Single sends, 256 in flight; baseline: one after another."""
    async with target(bench) as broker:
        count = bench.scaled(SINGLES)
        messages = [make_message(broker.topic, number) for number in range(count)]
        few = count // 10
        start = time.perf_counter()
        await gather_bounded(lambda number: broker.send(number, [messages[number]]), count=few, in_flight=1)
        one_by_one = few / (time.perf_counter() - start)
        start = time.perf_counter()
        await gather_bounded(lambda number: broker.send(number, [messages[number]]), count=count, in_flight=256)
        rate = count / (time.perf_counter() - start)
    return [Measurement("sent", rate, "msg/s", one_by_one)]


async def client_batch(bench: Bench) -> list[Measurement]:
    """Batches of 512, 8 in flight; baseline: single sends, 256 in flight."""
    async with target(bench) as broker:
        count = bench.scaled(BATCHED)
        batches = batches_of(broker.topic, count)
        singles = [make_message(broker.topic, number) for number in range(bench.scaled(SINGLES) // 4)]
        start = time.perf_counter()
        await gather_bounded(lambda number: broker.send(number, [singles[number]]), count=len(singles), in_flight=256)
        one_each = len(singles) / (time.perf_counter() - start)
        start = time.perf_counter()
        await broker.fill(batches)
        rate = count / (time.perf_counter() - start)
    return [Measurement("sent", rate, "msg/s", one_each)]


async def client_receive(bench: Bench) -> list[Measurement]:
    """Pull 8 queues and decode; baseline: the same pulls, not decoded."""
    async with target(bench) as broker:
        count = bench.scaled(RECEIVED)
        await broker.fill(batches_of(broker.topic, count))
        await broker.wait_shown(count)
        start = time.perf_counter()
        await broker.drain(decode=False)
        pulled = count / (time.perf_counter() - start)
        start = time.perf_counter()
        received = await broker.drain(decode=True)
        rate = received / (time.perf_counter() - start)
        assert received == count
    return [Measurement("received", rate, "msg/s", pulled)]


EXPERIMENTS = {
    "client-send": Experiment(client_send),
    "client-batch": Experiment(client_batch),
    "client-receive": Experiment(client_receive),
}
