"""What every driver of the link does, shown on each."""

import asyncio
import functools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import pytest
import zstandard
from pydantic import SecretStr

from mq2mqtt.errors import (
    ConfigError,
    LinkError,
    MessageRejectedError,
    NotAuthorizedError,
    NotConnectedError,
    TopicNotFoundError,
)
from mq2mqtt.link import ConsumeFrom, Queue, RocketLink, Subscription
from mq2mqtt.link.drivers import open_link
from mq2mqtt.link.memory import MemoryCluster, MemoryLink
from mq2mqtt.message import ReceivedMessage, RocketBatch, RocketMessage
from mq2mqtt.quickstart.drivers import make_group, make_topic
from mq2mqtt.rocketmq import Client
from mq2mqtt.rocketmq.codes import RequestCode
from mq2mqtt.settings import RocketMQSettings
from tests import waiting
from tests.conftest import SharedRocketMQ
from tests.contract import guarded
from tests.tcp_proxy import TcpProxy

_DEADLINE = 60.0
_COMPRESSED_BY_ZSTD = 0x1 | 2 << 8


until = functools.partial(waiting.until, seconds=_DEADLINE)


_settings_of: dict[RocketLink, RocketMQSettings] = {}
"""Of links at a real RocketMQ."""

needs = pytest.mark.needs
"""`@needs("capability", ...)`: skips on a driver that is declared to lack one. Nothing else here may skip."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "driver" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--driver")
        real = pytest.param(chosen, marks=[pytest.mark.e2e, *([pytest.mark.versions] if chosen == "native" else [])])
        # The one in memory has no settings.
        in_memory = chosen == "native" and not {"settings_in", "link_settings"} & set(metafunc.fixturenames)
        metafunc.parametrize("driver", ["memory", real] if in_memory else [real])


@dataclass
class Links:
    """Makes started links of one cluster, and topics on it."""

    make: Callable[[str], Awaitable[RocketLink]]
    create_topic: Callable[[str, int], Awaitable[None]]
    """By an administrator, whatever the driver can do."""
    send_compressed: Callable[[Queue, bytes], Awaitable[None]]
    """By another client, with Zstd, to the topic of a queue that is its only one."""

    async def topic(self, link: RocketLink, *, queues: int = 4) -> str:
        name = f"link_{uuid.uuid4().hex[:12]}"
        await self.create_topic(name, queues)
        assert await link.topic_exists(name)
        return name


@pytest.fixture
def settings(driver: str, request: pytest.FixtureRequest) -> RocketMQSettings | None:
    """Return how the driver reaches the RocketMQ that tests share; `None` for the one in memory."""
    if driver == "memory":
        return None
    found: RocketMQSettings = request.getfixturevalue("link_settings")
    return found


async def _send_compressed(namesrv: str, topic: str, body: bytes) -> None:
    async with Client(namesrv=namesrv, client_id="compressing") as client:
        (address,) = (await client.masters()).values()
        # The one-letter names of SEND_MESSAGE_V2.
        fields = {"a": "GID_z", "b": topic, "c": topic, "d": "4", "e": "0", "f": str(_COMPRESSED_BY_ZSTD)}
        fields |= {"g": "1700000000000", "h": "0", "i": "TAGS\x01t\x02", "j": "0", "k": "false", "m": "false"}
        answer = await client.call(address, RequestCode.SEND_MESSAGE_V2, fields, zstandard.compress(body))
        assert answer.code == 0, answer


@pytest.fixture
async def links(settings: RocketMQSettings | None) -> AsyncIterator[Links]:
    made: list[RocketLink] = []
    cluster = MemoryCluster()

    async def make(client_id: str) -> RocketLink:
        if settings is None:
            link: RocketLink = MemoryLink(cluster=cluster, client_id=client_id)
        else:
            link = open_link(settings, client_id=client_id)
        made.append(link)
        if settings is not None:
            _settings_of[link] = settings
        await link.start()
        return link

    async def create(name: str, queues: int) -> None:
        if settings is None:
            cluster.create_topic(name, queues)
        else:
            await make_topic(settings.driver, settings.namesrv, name, queues=queues)

    async def send_compressed(queue: Queue, body: bytes) -> None:
        if settings is None:
            cluster.store(queue, [RocketMessage(queue.topic, body)])
        else:
            await _send_compressed(settings.namesrv, queue.topic, body)

    yield Links(make, create, send_compressed)
    for link in made:
        await link.close()
        _settings_of.pop(link, None)


@pytest.fixture
async def link(links: Links) -> RocketLink:
    return await links.make("one")


@pytest.fixture
async def topic(links: Links, link: RocketLink) -> str:
    return await links.topic(link)


@pytest.fixture
async def single(links: Links, link: RocketLink) -> Queue:
    """A queue of the link for a topic that has one in RocketMQ."""
    return (await link.queues(await links.topic(link, queues=1)))[0]


def new_group() -> str:
    return f"GID_link_{uuid.uuid4().hex[:12]}"


def numbered(topic: str, count: int, *, first: int = 0, tag: str = "t") -> list[RocketMessage]:
    return [RocketMessage(topic, b"%d" % number, {"TAGS": tag}) for number in range(first, first + count)]


async def up(subscription: Subscription) -> Subscription:
    await until(lambda: subscription.problem is None)
    return subscription


async def prepare(link: RocketLink, group: str) -> None:
    """Make `group` as an administrator does for the link's driver."""
    if (settings := _settings_of.get(link)) is not None:
        await make_group(settings.driver, settings.namesrv, group)


async def subscribe(
    link: RocketLink,
    topic: str,
    group: str | None = None,
    *,
    tags: str = "*",
    start: ConsumeFrom = ConsumeFrom.EARLIEST,
) -> Subscription:
    """Join a group; on a topic that is new every driver begins with the first message, whatever it is told."""
    group = group or new_group()
    await prepare(link, group)
    return await link.subscribe(topic, group, tags=tags, start=start)


async def join(
    link: RocketLink,
    topic: str,
    group: str | None = None,
    *,
    tags: str = "*",
    start: ConsumeFrom = ConsumeFrom.EARLIEST,
) -> Subscription:
    return await up(await subscribe(link, topic, group, tags=tags, start=start))


async def receive(subscription: Subscription, count: int) -> list[ReceivedMessage]:
    messages: list[ReceivedMessage] = []
    async with asyncio.timeout(_DEADLINE):
        async for batch in subscription:
            assert len({message.queue_id for message in batch}) == 1
            messages += batch
            if len(messages) >= count:
                break
    return messages


async def take(subscription: Subscription, count: int) -> list[ReceivedMessage]:
    """Receive `count`, each settled at once: a driver may hand out no more before."""
    messages: list[ReceivedMessage] = []
    async with asyncio.timeout(_DEADLINE):
        async for batch in subscription:
            messages += batch
            for message in batch:
                subscription.settle(message)
            if len(messages) >= count:
                break
    return messages


async def receive_nothing(subscription: Subscription, seconds: float = 0.5) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await anext(aiter(subscription))


def bodies(messages: Sequence[ReceivedMessage | RocketMessage]) -> list[bytes]:
    return [message.body for message in messages]


# Sending


@needs("keeps_order", "receives_in_order")
async def test_a_queue_keeps_the_order_of_sends_and_batches(link: RocketLink, single: Queue) -> None:
    for first in range(0, 40, 10):
        await link.send(single, numbered(single.topic, 9, first=first))
        await link.send(single, numbered(single.topic, 1, first=first + 9))

    messages = await take(await join(link, single.topic), 40)

    assert bodies(messages) == [b"%d" % number for number in range(40)]


@needs("chooses_queue")
async def test_a_message_is_in_the_queue_it_was_sent_to(link: RocketLink, topic: str) -> None:
    queues = await link.queues(topic)
    assert [queue.queue_id for queue in queues] == list(range(4))
    for queue in queues:
        await link.send(queue, numbered(topic, 2, first=10 * queue.queue_id))

    for message in await take(await join(link, topic), 8):
        queue_id, offset = divmod(int(message.body), 10)
        assert (message.broker, message.queue_id, message.offset) == (queues[0].broker, queue_id, offset)


async def test_no_two_messages_have_the_same_place(link: RocketLink, topic: str) -> None:
    queues = await link.queues(topic)
    for number in range(12):
        await link.send(queues[number % len(queues)], numbered(topic, 1, first=number))

    messages = await take(await join(link, topic), 12)

    assert len({(message.broker, message.queue_id, message.offset) for message in messages}) == 12


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize(
    "letters",
    [bytes(range(1, 256)), pytest.param(bytes(range(256)), marks=needs("receives_any_body"))],
    ids=["without-nul", "any"],
)
async def test_bodies_and_properties_arrive_as_they_were_sent(
    link: RocketLink, single: Queue, letters: bytes, *, encoded: bool
) -> None:
    sent: Sequence[RocketMessage] = [
        RocketMessage(single.topic, letters, {"TAGS": "a", "KEYS": "k1 k2", "mqttSecondTopic": "/wért \U0001f600"}),
        RocketMessage(single.topic, letters[:1], {"mqtt5ContentType": '"\\', "clientId": " "}),
        RocketMessage(single.topic, b"x" * 100_000, {"mqtt5UserProperty": "v" * 15_000}),
    ]
    if encoded:
        texts = ["".join(f"{name}\x01{value}\x02" for name, value in message.properties.items()) for message in sent]
        sent = RocketBatch(single.topic, bodies(sent), texts)
    await link.send(single, sent[:1])
    await link.send(single, sent[1:])

    received = {message.body: message for message in await take(await join(link, single.topic), 3)}

    assert received.keys() == {message.body for message in sent}
    for original in sent:
        message = received[original.body]
        assert message.topic == single.topic
        assert message.born_ms > 1_600_000_000_000
        assert message.properties["UNIQ_KEY"]
        assert original.properties.items() <= message.properties.items()


@needs("sends_any_property")
async def test_properties_with_control_characters_and_long_ones_arrive(link: RocketLink, single: Queue) -> None:
    properties = {"TAGS": "t", "mqtt5ContentType": "a\n\x7f", "mqtt5UserProperty": "v" * 30_000}
    await link.send(single, [RocketMessage(single.topic, b"x", properties)])

    (message,) = await receive(await join(link, single.topic), 1)

    assert properties.items() <= message.properties.items()


@needs("receives_any_property")
async def test_properties_of_any_name_arrive(link: RocketLink, single: Queue) -> None:
    await link.send(single, [RocketMessage(single.topic, b"x", {"TAGS": "t", "näme": "wért \U0001f600"})])

    (message,) = await receive(await join(link, single.topic), 1)

    assert message.properties["näme"] == "wért \U0001f600"


@needs("reads_every_message")
async def test_a_compressed_body_arrives_as_it_was(links: Links, link: RocketLink, single: Queue) -> None:
    await links.send_compressed(single, b"x" * 10_000)

    assert bodies(await receive(await join(link, single.topic), 1)) == [b"x" * 10_000]


@pytest.mark.parametrize(
    ("body", "properties"),
    [(b"", {}), (b"x" * (4 << 20) + b"x", {}), (b"x", {"k": "\x01"}), (b"x", {"k": "v" * 40_000})],
)
async def test_an_illegal_message_is_rejected_with_its_batch(
    link: RocketLink, single: Queue, body: bytes, properties: dict[str, str]
) -> None:
    illegal = RocketMessage(single.topic, body, properties)
    with pytest.raises(MessageRejectedError):
        await link.send(single, [illegal])
    with pytest.raises(MessageRejectedError):
        await link.send(single, [*numbered(single.topic, 2), illegal])
    await link.send(single, numbered(single.topic, 1, first=7))

    assert bodies(await take(await join(link, single.topic), 1)) == [b"7"]


@needs("sends_batches")
async def test_a_batch_is_stored_all_or_none(link: RocketLink, single: Queue) -> None:
    # Each is legal; together they are longer than what one request may carry.
    too_long = [RocketMessage(single.topic, b"x" * (3 << 20)) for _ in range(2)]
    with pytest.raises(MessageRejectedError):
        await link.send(single, too_long)
    await link.send(single, numbered(single.topic, 3))

    assert bodies(await receive(await join(link, single.topic), 3)) == [b"0", b"1", b"2"]


async def test_queues_are_sorted_and_the_probe_answers(link: RocketLink, topic: str) -> None:
    queues = await link.queues(topic)

    assert {queue.topic for queue in queues} == {topic}
    assert list(queues) == sorted(queues)
    assert await link.queues(topic) == queues
    await link.probe(topic)


async def test_who_asks_what_may_be_written_and_read_does_neither(link: RocketLink, single: Queue) -> None:
    group = new_group()
    await link.send(single, numbered(single.topic, 1))
    await prepare(link, group)
    await link.require_writing(single.topic)
    await link.require_reading(single.topic, group)
    for refused in (link.require_writing("no_such_topic"), link.require_reading("no_such_topic", group)):
        with pytest.raises(TopicNotFoundError, match="no_such_topic"):
            await refused
    await link.send(single, numbered(single.topic, 1, first=1))
    # Neither a message nor an offset was stored: the group is born now.
    assert bodies(await take(await join(link, single.topic, group), 2)) == [b"0", b"1"]


@pytest.mark.parametrize(
    ("perm", "use"),
    [
        pytest.param(4, "writing", marks=needs("proves_writing")),
        pytest.param(2, "reading", marks=needs("proves_reading")),
    ],
)
async def test_what_may_not_be_done_is_learnt_before(
    link: RocketLink, link_settings: RocketMQSettings, perm: int, use: str
) -> None:
    topic, group = f"half_{uuid.uuid4().hex[:12]}", new_group()
    async with Client(namesrv=link_settings.namesrv, client_id="administrator") as administrator:
        await administrator.create_topic(topic, perm=perm)
    await prepare(link, group)
    with pytest.raises(LinkError, match=topic):
        await (link.require_writing(topic) if use == "writing" else link.require_reading(topic, group))


async def test_an_unknown_topic_is_named_everywhere(link: RocketLink) -> None:
    assert not await link.topic_exists("no_such_topic")
    for use in (link.queues, link.probe):
        with pytest.raises(TopicNotFoundError, match="no_such_topic"):
            await use("no_such_topic")
    subscription = await subscribe(link, "no_such_topic", start=ConsumeFrom.LATEST)
    await until(lambda: "no_such_topic" in (subscription.problem or ""))


@needs("creates_topics")
async def test_a_topic_is_created_once_and_left_as_it_is(link: RocketLink) -> None:
    name = f"new_{uuid.uuid4().hex[:12]}"
    await link.create_topic(name)
    assert await link.topic_exists(name)
    await link.create_topic(name, queues=9)

    assert len(await link.queues(name)) == 4


async def test_a_topic_that_appears_is_read_from_its_beginning(links: Links, link: RocketLink) -> None:
    name = f"late_{uuid.uuid4().hex[:12]}"
    subscription = await subscribe(link, name)
    await asyncio.sleep(0)
    await links.create_topic(name, 1)
    await up(subscription)
    queue, *_ = await link.queues(name)
    await link.send(queue, numbered(name, 3))

    assert len(await take(subscription, 3)) == 3


# Where a group starts


async def shown(link: RocketLink, topic: str, count: int) -> None:
    """Wait until `latest` is behind all `count` messages: a broker shows them a moment after it has answered."""
    if count:
        subscription = await join(link, topic, start=ConsumeFrom.EARLIEST)
        await take(subscription, count)
        await subscription.close()


@pytest.mark.parametrize("before", [0, 5])
@needs("starts_latest")
async def test_latest_starts_behind_what_is_there(link: RocketLink, topic: str, before: int) -> None:
    queues = await link.queues(topic)
    for queue in queues[: len(queues) // 2]:
        if before:
            await link.send(queue, numbered(topic, before))
    await shown(link, topic, before * (len(queues) // 2))
    subscription = await join(link, topic, start=ConsumeFrom.LATEST)
    for queue in queues:
        await link.send(queue, numbered(topic, 1, first=100))

    assert bodies(await receive(subscription, 4)) == [b"100"] * 4
    await receive_nothing(subscription)


async def test_a_new_group_misses_nothing_that_comes_from_then_on(link: RocketLink, topic: str) -> None:
    group = new_group()
    queues = await link.queues(topic)
    await link.send(queues[0], numbered(topic, 3))
    await shown(link, topic, 3)
    subscription = await join(link, topic, group, start=ConsumeFrom.LATEST)
    await subscription.close()
    # Nothing was ever settled; this came while nobody was there.
    for queue in queues:
        await link.send(queue, numbered(topic, 1, first=50))

    subscription = await join(link, topic, group, start=ConsumeFrom.LATEST)

    wanted = len(queues)
    async with asyncio.timeout(_DEADLINE):
        async for batch in subscription:
            wanted -= bodies(batch).count(b"50")
            for message in batch:
                subscription.settle(message)
            if not wanted:
                break


@needs("starts_latest")
async def test_latest_is_applied_at_the_birth_of_a_group_only(link: RocketLink, topic: str) -> None:
    group = new_group()
    queues = await link.queues(topic)
    await link.send(queues[0], numbered(topic, 3))
    await shown(link, topic, 3)
    subscription = await join(link, topic, group, start=ConsumeFrom.LATEST)
    await subscription.close()
    # Nothing was ever received; all of this came while nobody was there.
    for queue in queues:
        await link.send(queue, numbered(topic, 1, first=50))

    subscription = await join(link, topic, group, start=ConsumeFrom.LATEST)

    assert bodies(await receive(subscription, 4)) == [b"50"] * 4
    await receive_nothing(subscription)


@needs("starts_earliest")
async def test_earliest_starts_with_the_first_message(link: RocketLink, topic: str) -> None:
    for queue in await link.queues(topic):
        await link.send(queue, numbered(topic, 2))

    assert len(await take(await join(link, topic), 8)) == 8


# Tags


@needs("receives_in_order")
async def test_only_the_wanted_tags_arrive(link: RocketLink, single: Queue) -> None:
    # "Aa" and "BB" have the same hash, which is all that a broker looks at.
    for number, tag in enumerate(("Aa", "BB", "other", "Aa", "c")):
        await link.send(single, numbered(single.topic, 1, first=number, tag=tag))
    await link.send(single, [RocketMessage(single.topic, b"none", {})])

    subscription = await join(link, single.topic, tags="Aa || c")

    assert bodies(await take(subscription, 3)) == [b"0", b"3", b"4"]


@needs("shows_lag")
async def test_lag_is_what_is_not_settled(link: RocketLink, single: Queue) -> None:
    await link.send(single, [*numbered(single.topic, 10), *numbered(single.topic, 1, tag="unwanted")])
    subscription = await join(link, single.topic, tags="t")
    messages = await receive(subscription, 10)
    for number in (3, 0, 1, 2, 5, 9):
        subscription.settle(messages[number])
    await until(lambda: subscription.lag == 7)
    for message in messages:
        subscription.settle(message)
    await until(lambda: subscription.lag == 0)


async def test_an_expression_without_a_tag_is_refused(link: RocketLink, topic: str) -> None:
    with pytest.raises(ConfigError):
        await link.subscribe(topic, new_group(), tags=" || ", start=ConsumeFrom.LATEST)


# Settling


@needs("commits_prefix")
async def test_a_member_gets_again_what_it_did_not_settle_and_what_follows(link: RocketLink, single: Queue) -> None:
    group = new_group()
    await link.send(single, numbered(single.topic, 10))
    subscription = await join(link, single.topic, group)
    messages = await receive(subscription, 10)
    # Out of order, with holes: 0 to 3 are the settled prefix.
    for number in (3, 0, 1, 2, 5, 9):
        subscription.settle(messages[number])
    await subscription.close()

    subscription = await join(link, single.topic, group)

    assert bodies(await receive(subscription, 6)) == [b"%d" % number for number in range(4, 10)]


async def test_nothing_comes_again_once_all_is_settled(link: RocketLink, topic: str) -> None:
    group = new_group()
    for queue in await link.queues(topic):
        await link.send(queue, numbered(topic, 50))
    subscription = await join(link, topic, group)
    for message in await take(subscription, 200):
        subscription.settle(message)  # once more has no effect
    await subscription.close()

    await receive_nothing(await join(link, topic, group))


@needs("bounds_each_queue")
async def test_at_most_a_thousand_messages_of_a_queue_are_out(link: RocketLink, single: Queue) -> None:
    for first in range(0, 2000, 100):
        await link.send(single, numbered(single.topic, 100, first=first))
    subscription = await join(link, single.topic)
    messages = await receive(subscription, 1000)
    assert len(messages) == 1000
    await receive_nothing(subscription)

    # One hole in front: the committed prefix stays, the window moves.
    for message in messages[1:501]:
        subscription.settle(message)
    more = await receive(subscription, 500)
    assert bodies(more) == [b"%d" % number for number in range(1000, 1500)]
    await receive_nothing(subscription)
    subscription.settle(messages[0])

    assert bodies(await receive(subscription, 1)) == [b"1500"]


@needs("chooses_queue")
async def test_queues_take_turns(link: RocketLink, topic: str) -> None:
    queues = await link.queues(topic)
    for queue in queues:
        await link.send(queue, numbered(topic, 400))
    await shown(link, topic, 4 * 400)
    subscription = await join(link, topic)
    # All have something ready before the first is taken.
    await asyncio.sleep(1)

    seen: set[int] = set()
    async with asyncio.timeout(_DEADLINE):
        async for batch in subscription:
            seen.add(batch[0].queue_id)
            for message in batch:
                subscription.settle(message)
            if len(seen) == len(queues) or batch[-1].offset > 300:
                break

    assert len(seen) == len(queues)


# Settings


async def carries(settings: RocketMQSettings, topic: str) -> None:
    """Show that a message goes both ways."""
    link = open_link(settings, client_id="one")
    await link.start()
    try:
        queue, *_ = await link.queues(topic)
        await link.send(queue, numbered(topic, 1))
        subscription = await link.subscribe(topic, guarded.GROUP, tags="*", start=ConsumeFrom.EARLIEST)
        assert bodies(await take(subscription, 1)) == [b"0"]
    finally:
        await link.close()


@pytest.mark.timeout(300)
@needs("uses_tls")
async def test_a_server_that_takes_tls_alone_is_reached(settings_in: guarded.SettingsIn) -> None:
    settings = await settings_in("tls")
    await carries(settings, guarded.TOPIC)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("refusal", [LinkError, pytest.param(NotAuthorizedError, marks=needs("tells_refusals"))])
@needs("uses_access_keys")
async def test_a_server_with_access_control_lets_in_who_has_the_key(
    settings_in: guarded.SettingsIn, refusal: type[LinkError]
) -> None:
    settings = await settings_in("keys")
    await carries(settings, guarded.TOPIC)
    with pytest.raises(refusal):
        await carries(settings.model_copy(update={"secret_key": SecretStr("wrong")}), guarded.TOPIC)


@needs("maps_addresses")
async def test_a_broker_is_reached_where_the_address_map_says(
    links: Links, link: RocketLink, link_settings: RocketMQSettings, rocketmq: SharedRocketMQ
) -> None:
    topic = await links.topic(link)
    with TcpProxy() as proxy:
        elsewhere = {rocketmq.broker_address: proxy.listen(rocketmq.broker_address)}
        settings = link_settings.model_copy(update={"address_map": elsewhere})
        await carries(settings, topic)
        proxy.cut()
        with pytest.raises(LinkError):
            await carries(settings, topic)


# Members


@needs("lists_members")
async def test_the_members_of_a_group_are_listed(links: Links, link: RocketLink, topic: str) -> None:
    group = new_group()
    other_link = await links.make("two")
    one = await join(link, topic, group)
    await join(other_link, topic, group)

    async with asyncio.timeout(_DEADLINE):
        while {(member.client_id, member.ours) for member in await one.members()} != {("one", True), ("two", False)}:
            await asyncio.sleep(0.02)


@needs("shares_groups")
async def test_two_members_share_the_queues(links: Links, link: RocketLink, topic: str) -> None:
    group = new_group()
    queues = await link.queues(topic)
    other_link = await links.make("two")
    one = await join(link, topic, group)
    two = await join(other_link, topic, group)
    got: dict[str, list[ReceivedMessage]] = {"one": [], "two": []}

    def distinct() -> int:
        return len({(message.queue_id, message.offset) for messages in got.values() for message in messages})

    async def consume(name: str, subscription: Subscription) -> None:
        async for batch in subscription:
            got[name] += batch
            for message in batch:
                subscription.settle(message)

    def shared(number: int) -> bool:
        """Whether both have got something of this round, and nothing came to both."""
        shares = [bodies(messages).count(b"%d" % number) for messages in got.values()]
        return all(shares) and sum(shares) == len(queues)

    tasks = [asyncio.create_task(consume(*item), name=item[0]) for item in (("one", one), ("two", two))]
    async with asyncio.timeout(_DEADLINE):
        # Round after round, until both have their queues; nothing may be missing at any time.
        sent = 0
        while not sent or not shared(sent - 1):
            for queue in queues:
                await link.send(queue, numbered(topic, 1, first=sent))
            sent += 1
            await until(lambda: distinct() == sent * len(queues))  # noqa: B023 - awaited before it changes

    await two.close()
    for queue in queues:
        await link.send(queue, numbered(topic, 1, first=1000))
    await until(lambda: sum(message.body == b"1000" for message in got["one"]) == len(queues))
    await one.close()
    await asyncio.gather(*tasks)


async def test_a_group_is_subscribed_once(link: RocketLink, topic: str) -> None:
    group = new_group()
    subscription = await join(link, topic, group)
    with pytest.raises(ConfigError, match=group):
        await link.subscribe(topic, group, tags="*", start=ConsumeFrom.LATEST)
    await subscription.close()

    await join(link, topic, group)


# Ends


async def test_closing_ends_the_iteration_and_may_be_repeated(link: RocketLink, topic: str) -> None:
    subscription = await join(link, topic)
    waiting = asyncio.create_task(receive(subscription, 1), name="waiting")
    await asyncio.sleep(0.05)

    await asyncio.gather(subscription.close(), subscription.close())
    await subscription.close()

    assert await waiting == []
    assert subscription.problem == "closed"
    await link.close()
    await link.close()


async def test_a_closed_link_says_so(link: RocketLink, single: Queue) -> None:
    await link.close()

    with pytest.raises(NotConnectedError):
        await link.send(single, numbered(single.topic, 1))


@needs("commits_prefix")
async def test_settling_after_the_end_is_harmless(link: RocketLink, single: Queue) -> None:
    group = new_group()
    await link.send(single, numbered(single.topic, 1))
    subscription = await join(link, single.topic, group)
    messages = await receive(subscription, 1)
    await subscription.close()
    subscription.settle(messages[0])

    assert len(await receive(await join(link, single.topic, group), 1)) == 1


@needs("receives_in_order", "keeps_order")
async def test_waiting_may_be_cancelled_at_any_time_without_a_loss(link: RocketLink, single: Queue) -> None:
    subscription = await join(link, single.topic)
    received: list[ReceivedMessage] = []
    sending = asyncio.create_task(_send_slowly(link, single, 200), name="sending")
    async with asyncio.timeout(_DEADLINE):
        while len(received) < 200:
            try:
                async with asyncio.timeout(0.003):
                    batch = await anext(aiter(subscription))
            except TimeoutError:
                continue
            received += batch
            for message in batch:
                subscription.settle(message)
    await sending

    assert bodies(received) == [b"%d" % number for number in range(200)]


async def _send_slowly(link: RocketLink, queue: Queue, count: int) -> None:
    for number in range(count):
        await link.send(queue, numbered(queue.topic, 1, first=number))


async def test_closing_may_be_cancelled(link: RocketLink, single: Queue) -> None:
    group = new_group()
    await link.send(single, numbered(single.topic, 5))
    subscription = await join(link, single.topic, group)
    for message in await receive(subscription, 5):
        subscription.settle(message)
    closing = asyncio.create_task(subscription.close(), name="closing")
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])

    await subscription.close()

    await receive_nothing(await join(link, single.topic, group))


# The twin's own switch


async def test_the_memory_link_fails_on_request() -> None:
    link = MemoryLink()
    await link.create_topic("t", queues=1)
    (queue,) = await link.queues("t")
    subscription = await join(link, "t")
    await link.send(queue, numbered("t", 1))
    link.fail_with("t", LinkError("busy"))

    assert subscription.problem == "busy"
    for use in (link.probe("t"), link.send(queue, numbered("t", 1)), link.queues("t")):
        with pytest.raises(LinkError, match="busy"):
            await use
    await receive_nothing(subscription, 0.05)
    link.fail_with("t", None)
    assert len(await receive(subscription, 1)) == 1


async def test_the_memory_link_is_bounded() -> None:
    link = MemoryLink(cluster=MemoryCluster(queue_messages=2))
    await link.create_topic("t", queues=1)
    (queue,) = await link.queues("t")
    await link.send(queue, numbered("t", 2))

    with pytest.raises(LinkError, match="holds 2 messages"):
        await link.send(queue, numbered("t", 1))
