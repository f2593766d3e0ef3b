"""How fast the RocketMQ client sends and receives: 64-byte bodies, the bridge's properties, all different."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from mq2mqtt.message import RocketMessage
from mq2mqtt.rocketmq import Client, RequestCode, Response, SystemBusy, WriteQueue, decode_messages
from tests.bench.experiment import Bench, Measurement, gather_bounded

SINGLES = 20_000
BATCHED = 400_000
BATCH = 512
RECEIVED = 200_000
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


@dataclass(frozen=True)
class _Target:
    client: Client
    topic: str
    queues: tuple[WriteQueue, ...]
    address: str

    async def send(self, number: int, messages: list[RocketMessage]) -> None:
        queue = self.queues[number % len(self.queues)]
        while True:
            try:
                await self.client.send(self.topic, queue.broker, queue.queue_id, messages, timeout=30)
            except SystemBusy:
                await asyncio.sleep(0.01)  # the broker sheds load after 200 ms in its queue
            else:
                return

    async def fill(self, batches: list[list[RocketMessage]]) -> None:
        await gather_bounded(lambda number: self.send(number, batches[number]), count=len(batches), in_flight=8)

    async def shown(self) -> int:
        """Return how many messages the queues show: a broker indexes them after it has answered."""
        offsets = (self.client.max_offset(self.address, self.topic, queue.queue_id) for queue in self.queues)
        return sum(await asyncio.gather(*offsets))

    async def pull(self, queue: WriteQueue, offset: int) -> Response:
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
                response = await self.pull(queue, offset)
                offset = int(response.fields["nextBeginOffset"])
                if decode:
                    decoded += len(decode_messages(response.body, broker=queue.broker))
            return decoded

        return sum(await asyncio.gather(*map(one, self.queues)))


@asynccontextmanager
async def _target(bench: Bench) -> AsyncIterator[_Target]:
    topic = f"bench_{uuid.uuid4().hex[:12]}"
    async with Client(namesrv=await bench.namesrv(), client_id="bench", request_timeout=10) as client:
        await client.create_topic(topic, queues=8)
        queues = await client.queues(topic)
        address = (await client.route(topic)).master(queues[0].broker)
        assert address is not None
        yield _Target(client, topic, queues, address)
        await client.delete_topic(topic)


async def client_send(bench: Bench) -> list[Measurement]:
    """Single sends, 256 in flight; baseline: one after another."""
    async with _target(bench) as target:
        messages = [make_message(target.topic, number) for number in range(SINGLES)]
        few = SINGLES // 10
        start = time.perf_counter()
        await gather_bounded(lambda number: target.send(number, [messages[number]]), count=few, in_flight=1)
        one_by_one = few / (time.perf_counter() - start)
        start = time.perf_counter()
        await gather_bounded(lambda number: target.send(number, [messages[number]]), count=SINGLES, in_flight=256)
        rate = SINGLES / (time.perf_counter() - start)
    return [Measurement("sent", rate, "msg/s", one_by_one)]


async def client_batch(bench: Bench) -> list[Measurement]:
    """Batches of 512, 8 in flight; baseline: single sends, 256 in flight."""
    async with _target(bench) as target:
        messages = [make_message(target.topic, number) for number in range(BATCHED)]
        batches = [messages[first : first + BATCH] for first in range(0, BATCHED, BATCH)]
        few = SINGLES // 4
        start = time.perf_counter()
        await gather_bounded(lambda number: target.send(number, [messages[number]]), count=few, in_flight=256)
        singles = few / (time.perf_counter() - start)
        start = time.perf_counter()
        await target.fill(batches)
        rate = BATCHED / (time.perf_counter() - start)
    return [Measurement("sent", rate, "msg/s", singles)]


async def client_receive(bench: Bench) -> list[Measurement]:
    """Pull 8 queues and decode; baseline: the same pulls, not decoded."""
    async with _target(bench) as target:
        messages = [make_message(target.topic, number) for number in range(RECEIVED)]
        await target.fill([messages[first : first + BATCH] for first in range(0, RECEIVED, BATCH)])
        while await target.shown() < RECEIVED:
            await asyncio.sleep(0.05)
        start = time.perf_counter()
        await target.drain(decode=False)
        pulled = RECEIVED / (time.perf_counter() - start)
        start = time.perf_counter()
        received = await target.drain(decode=True)
        rate = received / (time.perf_counter() - start)
        assert received == RECEIVED
    return [Measurement("received", rate, "msg/s", pulled)]


EXPERIMENTS = {"client-send": client_send, "client-batch": client_batch, "client-receive": client_receive}
