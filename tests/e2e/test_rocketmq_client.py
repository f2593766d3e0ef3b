"""The RocketMQ client against a real RocketMQ."""

import asyncio
import json
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from mq2mqtt.message import RocketMessage
from mq2mqtt.quickstart.rocketmq import RocketMQ
from mq2mqtt.rocketmq import (
    MAX_BODY,
    Client,
    MessageIllegal,
    NoPermission,
    NotConnected,
    Producer,
    ReceivedMessage,
    RequestCode,
    RequestTimeout,
    RocketMQError,
    SendStatus,
    TopicNotFound,
    decode_messages,
    encoded_size,
)
from mq2mqtt.rocketmq.properties import MAX_PROPERTIES
from tests.conftest import SharedRocketMQ, StartRocketMQ
from tests.unit.rocketmq.peer import peer, say_nothing

pytestmark = pytest.mark.e2e

GET_CONSUMER_CONNECTION_LIST = 203
GET_PRODUCER_CONNECTION_LIST = 204
CONSUMER = {
    "consumeType": "CONSUME_PASSIVELY",
    "messageModel": "CLUSTERING",
    "consumeFromWhere": "CONSUME_FROM_LAST_OFFSET",
    "subscriptionDataSet": [],
    "unitMode": False,
}


@pytest.fixture
async def client(rocketmq: SharedRocketMQ) -> AsyncIterator[Client]:
    client_id = f"test@{uuid.uuid4().hex}"
    async with Client(namesrv=rocketmq.namesrv, client_id=client_id, request_timeout=20) as started:
        yield started


async def until(condition: Callable[[], Awaitable[object]], *, seconds: float = 60) -> None:
    """Wait until `condition` is true; its errors of the client count as not yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if await condition():
                return
            problem: object = "still false"
        except RocketMQError as error:
            problem = error
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {problem}")
        await asyncio.sleep(0.1)


async def read_queue(client: Client, topic: str, broker: str, queue_id: int, *, count: int) -> list[ReceivedMessage]:
    """Read `count` messages; a broker shows them a moment after it has answered their sender."""
    address = (await client.route(topic)).master(broker)
    assert address is not None
    messages: list[ReceivedMessage] = []
    offset = 0
    while len(messages) < count:
        fields = {
            "consumerGroup": "GID_test_read",
            "topic": topic,
            "queueId": str(queue_id),
            "queueOffset": str(offset),
            "maxMsgNums": "100",
            "sysFlag": "6",
            "commitOffset": "0",
            "suspendTimeoutMillis": "1000",
            "subscription": "*",
            "subVersion": "0",
            "expressionType": "TAG",
        }
        response = await client.call(address, RequestCode.PULL_MESSAGE, fields, timeout=10)
        messages += decode_messages(response.body, broker=broker)
        offset = response.integer("nextBeginOffset")
    return messages


async def read_all(client: Client, topic: str) -> list[ReceivedMessage]:
    """Read what the topic shows now."""
    route = await client.route(topic)
    messages: list[ReceivedMessage] = []
    for queue in route.read_queues:
        address = route.master(queue.broker)
        assert address is not None
        count = await client.max_offset(address, topic, queue.queue_id)
        messages += await read_queue(client, topic, queue.broker, queue.queue_id, count=count)
    return messages


def message(body: bytes = b"body", **properties: str) -> RocketMessage:
    return RocketMessage("", body, properties)


PROPERTIES = {
    "TAGS": "MQTT_COMMON",
    "KEYS": "node:rule:1",
    "clientId": "GID_a@@@dévice 😀",
    "mqttSecondTopic": "/a/b",
    "quote": '"\\\n\t{}',
}


@pytest.mark.versions
async def test_what_is_sent_is_read_back_byte_for_byte(client: Client, topic: str) -> None:
    [queue, *_] = await client.queues(topic)
    single = await client.send(topic, queue.broker, queue.queue_id, [message(bytes(range(256)), **PROPERTIES)])
    batch = [message(bytes([number]) * (number + 1), **PROPERTIES, number=str(number)) for number in range(100)]
    several = await client.send(topic, queue.broker, queue.queue_id, batch)
    received = await read_queue(client, topic, queue.broker, queue.queue_id, count=101)
    assert (single.status, single.offset, several.offset) == (SendStatus.OK, 0, 1)
    assert [one.body for one in received] == [bytes(range(256))] + [one.body for one in batch]
    assert [one.message_id for one in received] == [*single.message_ids, *several.message_ids]
    assert [one.offset for one in received] == list(range(101))
    assert {one.topic for one in received} == {topic}
    assert all(one.properties.items() >= PROPERTIES.items() for one in received)
    assert [one.properties["number"] for one in received[1:]] == [str(number) for number in range(100)]
    assert all(abs(one.born_ms - time.time() * 1000) < 60_000 for one in received)


async def test_an_empty_property_equals_a_missing_one(client: Client, topic: str) -> None:
    [queue, *_] = await client.queues(topic)
    for messages in ([message(empty="", full="x")], [message(empty="", full="x")] * 2):
        await client.send(topic, queue.broker, queue.queue_id, messages)
    received = await read_queue(client, topic, queue.broker, queue.queue_id, count=3)
    assert [(one.properties.get("empty"), one.properties["full"]) for one in received] == [(None, "x")] * 3


async def test_many_sends_share_a_connection_and_keep_their_order(client: Client, topic: str) -> None:
    [queue, *_] = await client.queues(topic)
    sends = [client.send(topic, queue.broker, queue.queue_id, [message(str(n).encode())]) for n in range(1000)]
    results = await asyncio.gather(*sends)
    received = await read_queue(client, topic, queue.broker, queue.queue_id, count=1000)
    assert sorted(result.offset for result in results) == list(range(1000))
    assert [received[result.offset].body for result in results] == [str(n).encode() for n in range(1000)]


async def test_a_producer_keeps_keys_together_and_spreads_the_rest(client: Client, topic: str) -> None:
    producer = Producer(client, "GID_test_producer")
    keyed = {(await producer.send(topic, message(), key="client-1")).queue_id for _ in range(8)}
    spread = {(await producer.send_batch(topic, [message()] * 2)).queue_id for _ in range(8)}
    assert len(keyed) == 1
    assert spread == {0, 1, 2, 3}
    await producer.close()


@pytest.mark.versions
@pytest.mark.parametrize("count", [1, 2])
async def test_the_largest_that_passes_our_check_is_stored(client: Client, topic: str, count: int) -> None:
    [queue, *_] = await client.queues(topic)
    overhead = encoded_size(message()) - len(message().body)
    body = bytes(MAX_BODY // count - overhead)
    await client.send(topic, queue.broker, queue.queue_id, [message(body)] * count, timeout=30)
    received = await read_queue(client, topic, queue.broker, queue.queue_id, count=count)
    assert [len(one.body) for one in received] == [len(body)] * count


@pytest.mark.versions
@pytest.mark.parametrize("count", [1, 2])
async def test_the_longest_properties_that_pass_our_check_are_read_back(client: Client, topic: str, count: int) -> None:
    [queue, *_] = await client.queues(topic)
    room = MAX_PROPERTIES - len("UNIQ_KEY\x01\x02k\x01\x02") - 32
    await client.send(topic, queue.broker, queue.queue_id, [message(k="v" * room)] * count)
    received = await read_queue(client, topic, queue.broker, queue.queue_id, count=count)
    assert [one.properties["k"] for one in received] == ["v" * room] * count


async def test_what_the_broker_calls_illegal_is_told_apart(start_rocketmq: StartRocketMQ) -> None:
    server = await start_rocketmq(broker_conf={"maxMessageSize": "1000"})
    await server.create_topic("small")
    async with Client(namesrv=server.namesrv, client_id="small") as client:
        [queue, *_] = await client.queues("small")
        for messages in ([message(bytes(1001))], [message(bytes(600))] * 2):
            with pytest.raises(MessageIllegal) as caught:
                await client.send("small", queue.broker, queue.queue_id, messages)
            assert caught.value.address == server.broker_address


@pytest.mark.versions
async def test_topics_are_created_once_and_deleted(client: Client) -> None:
    topic = f"t_{uuid.uuid4().hex}"
    assert not await client.topic_exists(topic)
    with pytest.raises(TopicNotFound):
        await client.queues(topic)
    await client.create_topic(topic, queues=3)
    await client.create_topic(topic, queues=7)
    assert len(await client.queues(topic)) == 3
    await client.delete_topic(topic)
    assert not await client.topic_exists(topic)
    await client.delete_topic(topic)


async def test_a_topic_that_is_not_writable(client: Client) -> None:
    topic = f"t_{uuid.uuid4().hex}"
    await client.create_topic(topic, perm=4)
    with pytest.raises(NoPermission):
        await client.queues(topic)
    assert len((await client.route(topic)).read_queues) == 4


@pytest.mark.versions
async def test_offsets(client: Client, topic: str, rocketmq: SharedRocketMQ) -> None:
    [queue, *_] = await client.queues(topic)
    address = (await client.route(topic)).master(queue.broker)
    assert address is not None
    before = int(time.time() * 1000)
    await client.send(topic, queue.broker, queue.queue_id, [message()] * 5)
    [first, *_] = await read_queue(client, topic, queue.broker, queue.queue_id, count=5)
    assert await client.max_offset(address, topic, queue.queue_id) == 5
    assert await client.min_offset(address, topic, queue.queue_id) == 0
    assert await client.offset_by_time(address, topic, queue.queue_id, before) == 0
    # 4.9 answers the last message where 5.x has the end.
    behind = 4 if rocketmq.version.startswith("4.") else 5
    assert await client.offset_by_time(address, topic, queue.queue_id, first.stored_ms + 10_000) == behind


@pytest.mark.versions
async def test_brokers_know_the_groups_until_the_client_leaves(rocketmq: SharedRocketMQ, topic: str) -> None:
    group = f"GID_{uuid.uuid4().hex[:12]}"
    watcher = Client(namesrv=rocketmq.namesrv, client_id="watcher")
    member = Client(namesrv=rocketmq.namesrv, client_id="member", producer_group=group)
    await member.start()
    member.register_consumer(group, CONSUMER)
    [queue, *_] = await member.queues(topic)
    await member.send(topic, queue.broker, queue.queue_id, [message()])

    async def listed(code: int, fields: dict[str, str]) -> list[str]:
        response = await watcher.call(rocketmq.broker_address, code, fields)
        connections = json.loads(response.body)["connectionSet"] if response.code == 0 else []
        return [connection["clientId"] for connection in connections]

    async def known() -> bool:
        producers = await listed(GET_PRODUCER_CONNECTION_LIST, {"producerGroup": group})
        consumers = await listed(GET_CONSUMER_CONNECTION_LIST, {"consumerGroup": group})
        return producers == consumers == ["member"]

    await until(known)
    await member.close()
    assert await listed(GET_PRODUCER_CONNECTION_LIST, {"producerGroup": group}) == []
    assert await listed(GET_CONSUMER_CONNECTION_LIST, {"consumerGroup": group}) == []
    await member.close()
    await watcher.close()


@pytest.mark.versions
async def test_members_are_told_when_another_comes_and_goes(rocketmq: SharedRocketMQ, topic: str) -> None:
    group = f"GID_{uuid.uuid4().hex[:12]}"
    changes = asyncio.Semaphore(0)
    one = Client(namesrv=rocketmq.namesrv, client_id="one")
    one.on_group_changed(group, changes.release)
    one.register_consumer(group, CONSUMER)
    await one.route(topic)
    await one.heartbeat(rocketmq.broker_address)
    two = Client(namesrv=rocketmq.namesrv, client_id="two")
    two.register_consumer(group, CONSUMER)
    await two.route(topic)
    await two.heartbeat(rocketmq.broker_address)
    await asyncio.wait_for(changes.acquire(), 30)
    while not changes.locked():
        await changes.acquire()
    await two.unregister_consumer(group)
    await asyncio.wait_for(changes.acquire(), 30)
    await two.close()
    await one.close()


async def test_a_dead_name_server_does_not_matter(rocketmq: SharedRocketMQ, topic: str, free_port: int) -> None:
    async with Client(namesrv=f"127.0.0.1:{free_port};{rocketmq.namesrv}", client_id="two-servers") as client:
        assert len(await client.queues(topic)) == 4
        assert await client.topic_exists(topic)


async def test_addresses_are_mapped(rocketmq: SharedRocketMQ, topic: str, free_port: int) -> None:
    dead = {rocketmq.broker_address: f"127.0.0.1:{free_port}"}
    async with Client(namesrv=rocketmq.namesrv, client_id="mapped", address_map=dead) as client:
        [queue, *_] = await client.queues(topic)
        with pytest.raises(NotConnected, match=str(free_port)):
            await client.send(topic, queue.broker, queue.queue_id, [message()])


async def test_a_silent_broker_is_given_up_and_closing_is_quick(rocketmq: SharedRocketMQ, topic: str) -> None:
    async with peer(say_nothing) as silent:
        client = Client(
            namesrv=rocketmq.namesrv,
            client_id="half-open",
            address_map={rocketmq.broker_address: silent.address},
            request_timeout=1.0,
        )
        await client.start()
        [queue, *_] = await client.queues(topic)
        problems: list[RocketMQError] = []
        while not any(isinstance(problem, NotConnected) for problem in problems):
            try:
                await client.send(topic, queue.broker, queue.queue_id, [message()])
            except (NotConnected, RequestTimeout) as error:
                problems.append(error)
                await asyncio.sleep(0.05)
        assert isinstance(problems[0], RequestTimeout)
        started = time.monotonic()
        await client.close()
        assert time.monotonic() - started < 10


async def test_tls(start_rocketmq: StartRocketMQ) -> None:
    rocketmq, topic = await start_rocketmq(java_properties={"tls.server.mode": "permissive"}), "mq_tls"
    await rocketmq.create_topic(topic)
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE  # RocketMQ makes itself a certificate for tests
    async with Client(namesrv=rocketmq.namesrv, client_id="tls", tls=unverified) as client:
        result = await Producer(client, "GID_tls").send(topic, message(b"over TLS"))
        [received] = await read_queue(client, topic, result.broker, result.queue_id, count=1)
        assert received.body == b"over TLS"
    async with Client(namesrv=rocketmq.namesrv, client_id="verified", tls=True) as client:
        with pytest.raises(NotConnected, match="certificate"):
            await client.queues(topic)


async def test_a_deleted_topic_does_not_come_back_by_itself(start_rocketmq: StartRocketMQ) -> None:
    server = await start_rocketmq(broker_conf={"autoCreateTopicEnable": "true"})
    async with Client(namesrv=server.namesrv, client_id="no-auto-create") as client:
        await client.create_topic("deleted")
        [queue, *_] = await client.queues("deleted")
        await client.send("deleted", queue.broker, queue.queue_id, [message()])
        async with Client(namesrv=server.namesrv, client_id="admin") as other:
            await other.delete_topic("deleted")
        for messages in ([message()], [message()] * 2):
            with pytest.raises(TopicNotFound):
                await client.send("deleted", queue.broker, queue.queue_id, messages)
        assert not await client.topic_exists("deleted")


@pytest.mark.faults
async def test_survives_the_death_of_the_broker_and_of_the_name_server(own_rocketmq: RocketMQ) -> None:
    await own_rocketmq.create_topic("kept")
    client = Client(namesrv=own_rocketmq.namesrv, client_id="survivor", request_timeout=2)
    await client.start()
    producer = Producer(client, "GID_survivor")
    stored = {(await producer.send("kept", message(b"before"))).message_ids[0]}

    async def send(body: bytes) -> bool:
        stored.update((await producer.send("kept", message(body))).message_ids)
        return True

    own_rocketmq.kill_broker()
    for _ in range(20):
        with pytest.raises((NotConnected, RequestTimeout)):
            await producer.send("kept", message(b"lost"))
        await asyncio.sleep(0.05)
    await own_rocketmq.start_broker()
    await until(lambda: send(b"after the broker's death"))

    own_rocketmq.kill_namesrv()
    # Routes are known: brokers serve without name servers.
    for _ in range(5):
        await until(lambda: send(b"without a name server"))
    with pytest.raises((NotConnected, RequestTimeout)):
        await client.route("kept", max_age=0)
    await own_rocketmq.start_namesrv()
    await own_rocketmq.wait_registered()
    await until(lambda: client.topic_exists("kept"))
    await until(lambda: send(b"after the name server's death"))

    own_rocketmq.pause_broker()
    problems: set[type[Exception]] = set()
    while problems < {NotConnected, RequestTimeout}:
        try:
            await producer.send("kept", message(b"unknown"))
        except (NotConnected, RequestTimeout) as error:
            problems.add(type(error))
    own_rocketmq.resume_broker()
    await until(lambda: send(b"after the pause"))

    async def all_there() -> bool:
        return stored <= {one.message_id for one in await read_all(client, "kept")}

    await until(all_there)
    await client.close()
