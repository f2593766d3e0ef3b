"""The consumer against real brokers: with members of the official Java client, and through outages."""

import asyncio
import base64
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mq2mqtt.message import RocketMessage
from mq2mqtt.quickstart.cluster import create_topic
from mq2mqtt.quickstart.rocketmq import RocketMQ
from mq2mqtt.rocketmq import Client, GroupNotFound, NotConnected, ReceivedMessage, RequestCode, permissions
from mq2mqtt.rocketmq.allocation import allocate, java_string_hash
from mq2mqtt.rocketmq.consumer import Consumer
from mq2mqtt.rocketmq.route import ReadQueue
from mq2mqtt.rocketmq.start_offsets import Start
from tests.conftest import MakeTopic, SharedRocketMQ, StartRocketMQ
from tests.java_peer import JavaPeer, run_java_peer
from tests.waiting import PATIENCE

pytestmark = pytest.mark.e2e

_DEADLINE = 60.0
_DELETE_SUBSCRIPTION_GROUP = 207


async def until(condition: Callable[[], bool], *, seconds: float = _DEADLINE) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


@dataclass
class Member:
    """A consumer that settles whatever it gets."""

    consumer: Consumer
    messages: list[ReceivedMessage] = field(default_factory=list)

    @property
    def bodies(self) -> list[bytes]:
        return [message.body for message in self.messages]

    async def run(self) -> None:
        async for batch in self.consumer:
            self.messages += batch
            for message in batch:
                self.consumer.settle(message)

    async def up(self) -> None:
        await until(lambda: self.consumer.problem is None)


@asynccontextmanager
async def connected(namesrv: str) -> AsyncIterator[Client]:
    async with Client(namesrv=namesrv, client_id=f"python@{uuid.uuid4().hex[:8]}") as client:
        yield client


@asynccontextmanager
async def member(
    client: Client, topic: str, group: str, *, tags: str = "*", start: Start = "earliest"
) -> AsyncIterator[Member]:
    consumer = Consumer(client, group=group, topic=topic, tags=tags, start=start)
    one = Member(consumer)
    consumer.start()
    task = asyncio.create_task(one.run(), name="member")
    try:
        yield one
    finally:
        await consumer.close()
        await task


def new_group() -> str:
    return f"GID_{uuid.uuid4().hex[:16]}"


async def send(client: Client, topic: str, bodies: Sequence[bytes], *, tag: str = "t") -> None:
    """Store `bodies` round-robin, again and again until the broker has them."""
    for number, body in enumerate(bodies):
        async with asyncio.timeout(_DEADLINE):
            while True:
                try:
                    queues = await client.queues(topic)
                    queue = queues[number % len(queues)]
                    await client.send(topic, queue.broker, queue.queue_id, [RocketMessage(topic, body, {"TAGS": tag})])
                    break
                except Exception:  # noqa: BLE001 - an outage has many faces; the deadline ends it
                    await asyncio.sleep(0.1)


async def shown(client: Client, topic: str, count: int) -> None:
    """Wait until `latest` is behind all `count` messages: a broker shows them a moment after it has answered."""
    async with asyncio.timeout(_DEADLINE):
        while await _shown(client, topic) < count:
            await asyncio.sleep(0.02)


async def _shown(client: Client, topic: str) -> int:
    route = await client.route(topic)
    total = 0
    for queue in route.read_queues:
        address = route.master(queue.broker)
        assert address is not None
        total += await client.max_offset(address, topic, queue.queue_id)
    return total


def numbers(count: int, *, first: int = 0) -> list[bytes]:
    return [b"%d" % number for number in range(first, first + count)]


@pytest.fixture
def jars(rocketmq: SharedRocketMQ) -> Path:
    if rocketmq.jars is None:
        pytest.skip("a RocketMQ that is given by address comes without the Java client")
    return rocketmq.jars


# The Java client as the other end


@pytest.mark.parametrize(
    ("client_id", "members", "queues"),
    [
        ("b", ["b", "a", "c"], 7),
        ("c", ["b", "a", "c"], 2),
        ("\U0001f600", ["\uffee", "\U0001f600", "a"], 8),
        ("a@1", ["a@1", "a", "a@10", "A"], 9),
        ("x", ["y"], 3),
    ],
)
async def test_allocation_and_hashes_are_javas(
    jars: Path, tmp_path: Path, client_id: str, members: list[str], queues: int
) -> None:
    (line,) = await run_java_peer(jars, "allocate", client_id, str(queues), *members, home=tmp_path)

    brokers = ("broker-b", "broker-a")
    mine = allocate(client_id, queues=[ReadQueue(brokers[n % 2], n // 2) for n in range(queues)], members=members)
    assert ",".join(f"{queue.broker}:{queue.queue_id}" for queue in mine) == line["queues"]
    assert java_string_hash(client_id) == int(line["hash"])


@pytest.mark.versions
@pytest.mark.parametrize("compression", ["ZLIB", "LZ4", "ZSTD"])
async def test_reads_what_java_sends(
    rocketmq: SharedRocketMQ, jars: Path, topic: str, tmp_path: Path, compression: str
) -> None:
    if rocketmq.version.startswith("4.") and compression != "ZLIB":
        pytest.skip("the Java client of RocketMQ 4.9 compresses with zlib alone")
    sent = await run_java_peer(
        jars, "produce", rocketmq.namesrv, topic, "tag", "3", "20000", compression, "n=v \U0001f600", home=tmp_path
    )
    small = await run_java_peer(jars, "produce", rocketmq.namesrv, topic, "tag", "1", "5", "ZLIB", home=tmp_path)

    async with connected(rocketmq.namesrv) as client, member(client, topic, new_group(), tags="tag") as one:
        await until(lambda: len(one.messages) == 4)

    by_id = {message.message_id: message for message in one.messages}
    assert set(by_id) == {line["msgId"] for line in sent + small}
    for index, line in enumerate(sent):
        message = by_id[line["msgId"]]
        assert message.queue_id == int(line["queueId"])
        assert len(message.body) == 20000
        assert message.body.startswith(b"java-%d-" % index)
        assert message.properties["KEYS"] == f"key{index}"
        assert message.properties["TAGS"] == "tag"
        assert message.properties["n"] == "v \U0001f600"
    assert by_id[small[0]["msgId"]].body == b"java-0-"


@pytest.mark.versions
async def test_java_reads_what_we_send(rocketmq: SharedRocketMQ, jars: Path, topic: str, tmp_path: Path) -> None:
    sent = [
        RocketMessage(topic, bytes(range(256)), {"TAGS": "a", "KEYS": "k", "qoslevel": "1", "mqttSecondTopic": "/x/y"}),
        RocketMessage(topic, b"two", {"TAGS": "a", "näme": 'wért " \\ \n \U0001f600'}),
    ]
    async with connected(rocketmq.namesrv) as client:
        queue = (await client.queues(topic))[0]
        result = await client.send(topic, queue.broker, queue.queue_id, sent)
        single = await client.send(topic, queue.broker, queue.queue_id, sent[:1])
    async with JavaPeer(jars, "consume", rocketmq.namesrv, new_group(), topic, "a", home=tmp_path) as peer:
        lines = await peer.wait_for("message", count=3)

    by_id = {line["message"]: line for line in lines}
    expected = zip((*result.message_ids, *single.message_ids), (*sent, sent[0]), strict=True)
    for message_id, message in expected:
        line = by_id[message_id]
        assert base64.b64decode(line["body"]) == message.body
        assert message.properties.items() <= line["properties"].items()


@pytest.mark.versions
async def test_a_mixed_group_shares_queues_and_messages(
    rocketmq: SharedRocketMQ, jars: Path, make_topic: MakeTopic, tmp_path: Path
) -> None:
    topic, group = await make_topic(queues=5), new_group()
    async with connected(rocketmq.namesrv) as client, member(client, topic, group, tags="t") as ours:
        await ours.up()
        async with JavaPeer(jars, "consume", rocketmq.namesrv, group, topic, "t", home=tmp_path) as peer:
            await peer.wait_for("started")
            await until(lambda: _shared(ours, peer, topic))
            await send(client, topic, numbers(100))
            await until(lambda: len(ours.messages) + len(peer.having("message")) >= 100)

            theirs = [base64.b64decode(line["body"]) for line in peer.having("message")]
            assert sorted(ours.bodies + theirs, key=int) == numbers(100)
            assert {message.queue_id for message in ours.messages}.isdisjoint(
                {line["queueId"] for line in peer.having("message")}
            )
        # Java has left: all queues are ours again, and nothing is left behind.
        await until(lambda: len([queue for name, queue in ours.consumer.queues if name == topic]) == 5)
        await send(client, topic, numbers(10, first=100))
        await until(lambda: set(numbers(10, first=100)) <= set(ours.bodies))
    theirs = [base64.b64decode(line["body"]) for line in peer.having("message")]
    # Java does not wait until the broker has its last offsets: we may have asked before, and got its messages again.
    assert len(ours.bodies) == len(set(ours.bodies))
    assert sorted({*ours.bodies, *theirs}, key=int) == numbers(110)


def _shared(ours: Member, peer: JavaPeer, topic: str) -> bool:
    allocated = [line["allocated"] for line in peer.having("allocated") if line["topic"] == topic]
    theirs = set(allocated[-1].split(",")) - {""} if allocated else set()
    mine = {f"{queue.broker}:{queue.queue_id}" for name, queue in ours.consumer.queues if name == topic}
    return {len(mine), len(theirs)} == {2, 3} and mine.isdisjoint(theirs)


@pytest.mark.versions
async def test_what_java_sends_back_is_consumed(
    rocketmq: SharedRocketMQ, jars: Path, topic: str, tmp_path: Path
) -> None:
    group = new_group()
    async with connected(rocketmq.namesrv) as client:
        await send(client, topic, [b"unwanted"])
        async with JavaPeer(jars, "consume", rocketmq.namesrv, group, topic, "*", "send-back", home=tmp_path) as peer:
            # The second time it is the one sent back: only then is the first known to be.
            await peer.wait_for("message", count=2)
        async with member(client, topic, group) as ours:
            await until(lambda: bool(ours.messages))

    message = ours.messages[0]
    assert (message.topic, message.body) == (topic, b"unwanted")
    assert message.reconsume_times > 0


# Where a group starts


@pytest.mark.versions
async def test_a_time_is_a_start(rocketmq: SharedRocketMQ, topic: str) -> None:
    async with connected(rocketmq.namesrv) as client:
        await send(client, topic, numbers(8))
        await asyncio.sleep(0.1)
        moment = time.time_ns() // 1_000_000
        await send(client, topic, numbers(8, first=8))
        # A broker begins with the last message that it shows, if none is as late.
        await shown(client, topic, 16)
        async with member(client, topic, new_group(), start=moment) as one:
            await until(lambda: len(one.messages) >= 8)
            await asyncio.sleep(0.3)

    assert sorted(one.bodies, key=int) == numbers(8, first=8)


@pytest.mark.versions
async def test_a_queue_that_appears_later_is_read_from_its_beginning(
    rocketmq: SharedRocketMQ, make_topic: MakeTopic
) -> None:
    topic, group = await make_topic(queues=1), new_group()
    async with connected(rocketmq.namesrv) as client:
        await send(client, topic, [b"old"])
        await shown(client, topic, 1)
        async with member(client, topic, group, start="latest") as one:
            await one.up()
        await _set_queues(client, rocketmq.broker_address, topic, 2)
        await send(client, topic, [b"a", b"b"])
        async with member(client, topic, group, start="latest") as one:
            await until(lambda: len(one.messages) == 2)

    assert sorted(one.bodies) == [b"a", b"b"]


async def _set_queues(client: Client, address: str, topic: str, queues: int) -> None:
    fields = {
        "topic": topic,
        "defaultTopic": topic,
        "readQueueNums": str(queues),
        "writeQueueNums": str(queues),
        "perm": "6",
        "topicFilterType": "SINGLE_TAG",
        "topicSysFlag": "0",
        "order": "false",
    }
    response = await client.call(address, RequestCode.UPDATE_AND_CREATE_TOPIC, fields)
    assert response.code == 0, response.remark
    async with asyncio.timeout(_DEADLINE):
        while len((await client.route(topic, max_age=0)).read_queues) != queues:
            await asyncio.sleep(0.1)


@pytest.mark.versions
async def test_latest_is_applied_once_and_on_a_young_topic_too(
    rocketmq: SharedRocketMQ, make_topic: MakeTopic, topic: str
) -> None:
    group = new_group()
    async with connected(rocketmq.namesrv) as client:
        await send(client, topic, numbers(4))
        await shown(client, topic, 4)
        async with member(client, topic, group, start="latest") as one:
            await one.up()
            await send(client, topic, numbers(4, first=4))
            await until(lambda: len(one.messages) == 4)
        # On a topic without a message all birth offsets are 0, which 4.9 also answers for none.
        young = await make_topic()
        async with member(client, young, group + "y", start="latest") as two:
            await two.up()
        await send(client, young, numbers(4))
        async with member(client, young, group + "y", start="latest") as two:
            await until(lambda: len(two.messages) == 4)

    assert sorted(one.bodies, key=int) == numbers(4, first=4)


# Outages


async def _keep_sending(client: Client, topic: str, sent: list[bytes], stop: asyncio.Event) -> None:
    while not stop.is_set():
        body = b"%d" % len(sent)
        await send(client, topic, [body])
        sent.append(body)
        await asyncio.sleep(0.005)


async def test_no_message_is_lost_over_a_killed_broker(own_rocketmq: RocketMQ) -> None:
    await own_rocketmq.create_topic("t", queues=4)
    sent: list[bytes] = []
    stop = asyncio.Event()
    async with connected(own_rocketmq.namesrv) as client, member(client, "t", new_group(), start="latest") as one:
        await one.up()
        sending = asyncio.create_task(_keep_sending(client, "t", sent, stop), name="sending")
        await until(lambda: len(one.messages) > 50)
        own_rocketmq.kill_broker()
        await until(lambda: one.consumer.problem is not None, seconds=5 * PATIENCE)
        await own_rocketmq.start_broker()
        await one.up()
        count = len(sent)
        await until(lambda: len(sent) > count + 50)
        stop.set()
        await sending
        await until(lambda: set(sent) <= set(one.bodies))
        await until(lambda: one.consumer.lag == 0)
        group = one.consumer.group
    async with connected(own_rocketmq.namesrv) as client, member(client, "t", group) as again:
        await again.up()
        await asyncio.sleep(0.5)
        assert again.messages == []


async def test_a_broker_that_hangs_shows_within_five_seconds(own_rocketmq: RocketMQ) -> None:
    await own_rocketmq.create_topic("t", queues=2)
    async with connected(own_rocketmq.namesrv) as client, member(client, "t", new_group()) as one:
        await one.up()
        try:
            async with member(client, "t", new_group()) as two:
                await two.up()
                await send(client, "t", numbers(2))
                await until(lambda: len(two.messages) == len(one.messages) == 2)
                own_rocketmq.pause_broker()
                await until(lambda: one.consumer.problem is not None, seconds=5 * PATIENCE)
                began = time.monotonic()
            # Nor is the end of the other, which has something to commit, held up for long.
            assert time.monotonic() - began < 8 * PATIENCE
        finally:
            own_rocketmq.resume_broker()
        await one.up()
        await send(client, "t", numbers(4, first=2))
        await until(lambda: len(set(one.bodies)) == 6)


async def test_messages_flow_while_the_name_server_is_away(own_rocketmq: RocketMQ) -> None:
    await own_rocketmq.create_topic("t", queues=2)
    async with connected(own_rocketmq.namesrv) as client, member(client, "t", new_group()) as one:
        await one.up()
        own_rocketmq.kill_namesrv()
        with pytest.raises(NotConnected):
            await client.route("t", max_age=0)
        # Have it look at its members and routes now rather than in 20 seconds.
        one.consumer.recovered()
        await send(client, "t", numbers(4))
        await until(lambda: len(one.messages) == 4)
        assert one.consumer.problem is None
        await own_rocketmq.start_namesrv()
        await own_rocketmq.wait_registered()
        await send(client, "t", numbers(4, first=4))
        await until(lambda: len(one.messages) == 8)


@pytest.mark.versions
async def test_a_deleted_topic_shows_and_one_made_again_is_read(
    rocketmq: SharedRocketMQ, make_topic: MakeTopic
) -> None:
    topic = await make_topic(queues=1)
    async with connected(rocketmq.namesrv) as client, member(client, topic, new_group()) as one:
        await send(client, topic, numbers(3))
        await until(lambda: len(one.messages) == 3)
        # Messages may come before all of the joining is done.
        await one.up()
        await client.delete_topic(topic)
        await until(lambda: one.consumer.problem is not None)
        await create_topic(rocketmq.namesrv, topic, queues=1)
        # The new offsets lie where the old ones were: 4.9 has those for the group still.
        await send(client, topic, numbers(3, first=3))
        await until(lambda: len(one.messages) == 6)
        await one.up()


async def test_a_deleted_group_reads_on_where_it_was(rocketmq: SharedRocketMQ, make_topic: MakeTopic) -> None:
    topic = await make_topic(queues=2)
    async with connected(rocketmq.namesrv) as client, member(client, topic, new_group()) as one:
        group = one.consumer.group
        await send(client, topic, numbers(6))
        await until(lambda: len(one.messages) == 6)
        await _committed(client, rocketmq.broker_address, group, {topic: 3, f"%RETRY%{group}": 0})
        response = await client.call(
            rocketmq.broker_address, _DELETE_SUBSCRIPTION_GROUP, {"groupName": group, "cleanOffset": "true"}
        )
        assert response.code == 0, response.remark
        await send(client, topic, numbers(2, first=6))
        # The next ones come when those have been looked into, and the group is known again.
        await _committed(client, rocketmq.broker_address, group, {topic: 4, f"%RETRY%{group}": 0})
        await send(client, topic, numbers(2, first=8))
        await until(lambda: set(numbers(10)) <= set(one.bodies))
        assert sorted(one.bodies, key=int) == numbers(10)


async def _committed(client: Client, address: str, group: str, offsets: dict[str, int]) -> None:
    """Wait until the broker has `offsets` of the first queue of each topic."""
    for topic, offset in offsets.items():
        fields = {"consumerGroup": group, "topic": topic, "queueId": "0", "setZeroIfNotFound": "false"}
        async with asyncio.timeout(_DEADLINE):
            while True:
                response = await client.call(address, RequestCode.QUERY_CONSUMER_OFFSET, fields)
                if response.code == 0 and response.integer("offset") == offset:
                    break
                await asyncio.sleep(0.05)


async def test_a_missing_group_is_named(start_rocketmq: StartRocketMQ) -> None:
    server = await start_rocketmq(broker_conf={"autoCreateSubscriptionGroup": "false"})
    await server.create_topic("t", queues=1)
    group = new_group()
    async with connected(server.namesrv) as client, member(client, "t", group) as one:
        await until(lambda: group in (one.consumer.problem or ""))
        with pytest.raises(GroupNotFound, match=group):
            await permissions.require_reading(client, "t", group)
