"""What the driver over gRPC does beside the contract: outages of the proxy, needs of topics and groups, its ends."""

import asyncio
import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard
from pydantic import SecretStr

from mq2mqtt.errors import LinkError, MessageRejectedError, NotAuthorizedError, NotConnectedError
from mq2mqtt.link import ConsumeFrom, Queue, RocketLink, Subscription
from mq2mqtt.link.drivers import DRIVERS, library, open_link
from mq2mqtt.message import ReceivedMessage, RocketMessage
from mq2mqtt.quickstart.cluster import create_ordered_group, create_topic
from mq2mqtt.quickstart.proxy import Proxy
from mq2mqtt.rocketmq import Client
from mq2mqtt.rocketmq.codes import RequestCode
from mq2mqtt.settings import RocketMQSettings
from tests import waiting
from tests.conftest import SharedRocketMQ, StartRocketMQ
from tests.contract import guarded
from tests.watched_loop import core_waits, waited_since

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
_DEADLINE = 60.0

NewLink = Callable[[str], Awaitable[RocketLink]]


@pytest.fixture(autouse=True)
def _with_its_package(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--driver") != "grpc":
        pytest.skip("runs in the environment of its driver: scripts/test --driver grpc")


@pytest.fixture
async def new_link() -> AsyncIterator[NewLink]:
    """Return what makes a link to a proxy, started; they are closed at the end."""
    made: list[RocketLink] = []

    async def make(proxy: str) -> RocketLink:
        link = open_link(RocketMQSettings(driver="grpc", proxy=proxy), client_id=f"grpc-{len(made)}")
        made.append(link)
        await link.start()
        return link

    yield make
    for link in made:
        await link.close()


@pytest.fixture
async def link(rocketmq_proxy: str, new_link: NewLink) -> RocketLink:
    return await new_link(rocketmq_proxy)


@pytest.fixture(scope="module")
def only_proxy(rocketmq: SharedRocketMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    assert rocketmq.jars is not None
    directory = tmp_path_factory.mktemp("own") / "proxy"
    proxy = asyncio.run(Proxy.on_jvm(directory, namesrv=rocketmq.namesrv, jars=rocketmq.jars))
    yield proxy
    proxy.kill()


@pytest.fixture
async def own_proxy(only_proxy: Proxy) -> Proxy:
    """Return a proxy in front of the shared RocketMQ that these tests may kill and pause; it runs."""
    only_proxy.resume()
    if only_proxy.has_ended:
        await only_proxy.start()
    return only_proxy


async def new_topic(namesrv: str, *, queues: int = 1, message_type: str | None = "FIFO") -> str:
    name = f"grpc_{uuid.uuid4().hex[:12]}"
    await create_topic(namesrv, name, queues=queues, message_type=message_type)
    return name


async def new_group(namesrv: str) -> str:
    name = f"GID_grpc_{uuid.uuid4().hex[:12]}"
    await create_ordered_group(namesrv, name)
    return name


async def until(condition: Callable[[], bool]) -> None:
    await waiting.until(condition, seconds=_DEADLINE)


async def join(link: RocketLink, topic: str, group: str) -> Subscription:
    subscription = await link.subscribe(topic, group, tags="*", start=ConsumeFrom.LATEST)
    await until(lambda: subscription.problem is None)
    return subscription


async def objection(link: RocketLink, topic: str, group: str) -> LinkError | None:
    """Ask whether `group` may read until the proxy, which may be busy, answers in time; return what it objects."""
    async with asyncio.timeout(_DEADLINE):
        while True:
            try:
                await link.require_reading(topic, group)
            except LinkError as error:
                if "does not answer" not in str(error):
                    return error
            else:
                return None


def numbered(topic: str, numbers: Sequence[int]) -> list[RocketMessage]:
    return [RocketMessage(topic, b"%d" % number, {"TAGS": "t"}) for number in numbers]


async def receive(subscription: Subscription, count: int, *, settle: bool = True) -> list[ReceivedMessage]:
    messages: list[ReceivedMessage] = []
    async with asyncio.timeout(_DEADLINE):
        while len(messages) < count:
            batch = await anext(aiter(subscription))
            messages += batch
            for message in batch if settle else ():
                subscription.settle(message)
    return messages


async def receive_until_quiet(subscription: Subscription, seconds: float = 3.0) -> list[ReceivedMessage]:
    messages: list[ReceivedMessage] = []
    with contextlib.suppress(TimeoutError):
        while True:
            async with asyncio.timeout(seconds):
                messages += await receive(subscription, 1)
    return messages


async def receive_nothing(subscription: Subscription, seconds: float = 1.0) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await anext(aiter(subscription))


def bodies(messages: Sequence[ReceivedMessage]) -> list[bytes]:
    return [message.body for message in messages]


async def send_at_last(link: RocketLink, queue: Queue, message: RocketMessage) -> None:
    """Send as the delivery loop does: again after each error that says it may help."""
    async with asyncio.timeout(_DEADLINE):
        while True:
            try:
                await link.send(queue, [message])
            except LinkError:
                await asyncio.sleep(0.1)
            else:
                return


def test_the_library_is_named_with_its_version() -> None:
    assert library(DRIVERS["grpc"]).startswith("rocketmq-python-client 5.1.")


# Topics and groups


async def test_messages_of_a_queue_of_the_link_share_a_queue_of_rocketmq(
    rocketmq: SharedRocketMQ, link: RocketLink
) -> None:
    topic = await new_topic(rocketmq.namesrv, queues=8)
    queues = await link.queues(topic)
    assert len(queues) == 8
    await asyncio.gather(*(link.send(queue, numbered(topic, range(5))) for queue in queues))

    messages = await receive(await join(link, topic, await new_group(rocketmq.namesrv)), 40)

    # The proxy of today has each group in a queue of its own (groups.py).
    for queue_id in range(8):
        assert bodies([one for one in messages if one.queue_id == queue_id]) == [b"%d" % n for n in range(5)]


async def test_a_topic_that_keeps_no_order_is_refused_until_it_does(rocketmq: SharedRocketMQ, link: RocketLink) -> None:
    topic = await new_topic(rocketmq.namesrv, message_type=None)
    for refused in (link.queues, link.probe, link.require_writing):
        with pytest.raises(LinkError, match=rf"must be FIFO: mqadmin updateTopic .* -t {topic} "):
            await refused(topic)
    # It is read as any other.
    await join(link, topic, await new_group(rocketmq.namesrv))


async def test_a_group_that_keeps_no_order_is_refused_until_it_does(rocketmq: SharedRocketMQ, link: RocketLink) -> None:
    topic = await new_topic(rocketmq.namesrv)
    group = f"GID_grpc_{uuid.uuid4().hex[:12]}"
    refused = await objection(link, topic, group)
    assert re.search(f"group {group} .* mqadmin updateSubGroup .* -g {group} -o true", str(refused))
    subscription = await link.subscribe(topic, group, tags="*", start=ConsumeFrom.LATEST)
    await until(lambda: f"updateSubGroup -n NAMESRV -c CLUSTER -g {group} -o true" in (subscription.problem or ""))

    await create_ordered_group(rocketmq.namesrv, group)

    await until(lambda: subscription.problem is None)
    assert await objection(link, topic, group) is None
    (queue,) = await link.queues(topic)
    await link.send(queue, numbered(topic, [1]))
    assert bodies(await receive(subscription, 1)) == [b"1"]


# What is out


async def test_the_next_of_a_queue_come_when_the_last_are_settled(rocketmq: SharedRocketMQ, link: RocketLink) -> None:
    topic = await new_topic(rocketmq.namesrv, queues=2)
    one, two = await link.queues(topic)
    await link.send(one, numbered(topic, range(50)))
    subscription = await join(link, topic, await new_group(rocketmq.namesrv))
    first = await receive(subscription, 32, settle=False)
    assert len(first) == 32
    # The other queue does not wait for this one.
    await link.send(two, numbered(topic, [100]))
    assert bodies(await receive(subscription, 1)) == [b"100"]
    for message in first[:-1]:
        subscription.settle(message)
    await receive_nothing(subscription)

    subscription.settle(first[-1])

    assert bodies(await receive(subscription, 18)) == [b"%d" % number for number in range(32, 50)]


async def test_what_is_held_stays_hidden_until_its_bridge_is_gone(
    rocketmq: SharedRocketMQ, link: RocketLink, rocketmq_proxy: str, new_link: NewLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The least that a proxy allows.
    for module in ("reader", "subscription"):
        monkeypatch.setattr(f"mq2mqtt.link.grpc.{module}.HIDDEN_SECONDS", 10)
    topic, group = await new_topic(rocketmq.namesrv, queues=2), await new_group(rocketmq.namesrv)
    one, two = await link.queues(topic)
    await link.send(one, numbered(topic, range(3)))
    # Another member holds these when it is killed.
    await asyncio.to_thread(
        run,
        f"""
        reader.HIDDEN_SECONDS = subscription.HIDDEN_SECONDS = 10
        link = open_link(RocketMQSettings(driver="grpc", proxy="{rocketmq_proxy}"), client_id="killed")
        await link.start()
        joined = await link.subscribe("{topic}", "{group}", tags="*", start=ConsumeFrom.LATEST)
        messages = await anext(joined)
        joined.settle(messages[0])
        await asyncio.sleep(1)
        os.kill(os.getpid(), 9)
        """,
        exit_code=-9,
    )
    subscription = await join(link, topic, group)
    held: list[ReceivedMessage] = []
    got: list[bytes] = []

    async def consume(joined: Subscription, *, hold: bool) -> None:
        async for batch in joined:
            for message in batch:
                if hold and message.body == b"10":
                    held.append(message)
                else:
                    got.append(message.body)
                    joined.settle(message)

    holding = asyncio.create_task(consume(subscription, hold=True), name="holding")
    await link.send(two, numbered(topic, [10]))
    await until(lambda: held != [])
    started = time.monotonic()
    other = await join(await new_link(rocketmq_proxy), topic, group)
    waiting_for_it = asyncio.create_task(consume(other, hold=False), name="waiting")
    await until(lambda: len(got) >= 2 and time.monotonic() - started > 13.0)

    # What the killed one had not settled came again; what is held did not.
    assert got == [b"1", b"2"]
    await subscription.close()
    # It is given back at once.
    await until(lambda: got == [b"1", b"2", b"10"])
    await holding
    waiting_for_it.cancel()


async def test_a_message_that_cannot_be_read_is_left_out(rocketmq: SharedRocketMQ, link: RocketLink) -> None:
    topic = await new_topic(rocketmq.namesrv)
    async with Client(namesrv=rocketmq.namesrv, client_id="other") as other:
        for sys_flag, body in (
            (0x1, zlib.compress(b"zlib")),
            (0x1 | 2 << 8, zstandard.compress(b"zstd")),
            (0, b"as is"),
        ):
            # The one-letter names of SEND_MESSAGE_V2.
            fields = {"a": "GID_z", "b": topic, "c": topic, "d": "4", "e": "0", "f": str(sys_flag)}
            fields |= {"g": "1700000000000", "h": "0", "i": "TAGS\x01t\x02", "j": "0", "k": "false", "m": "false"}
            answer = await other.call(rocketmq.broker_address, RequestCode.SEND_MESSAGE_V2, fields, body)
            assert answer.code == 0, answer
    subscription = await join(link, topic, await new_group(rocketmq.namesrv))

    assert bodies(await receive(subscription, 2)) == [b"zlib", b"as is"]
    assert subscription.unreadable == 1


# Outages


async def test_a_proxy_that_comes_late_is_found(rocketmq: SharedRocketMQ, own_proxy: Proxy, new_link: NewLink) -> None:
    topic, group = await new_topic(rocketmq.namesrv), await new_group(rocketmq.namesrv)
    own_proxy.kill()
    link = await new_link(own_proxy.address)
    for refused in (link.queues, link.probe, link.topic_exists):
        with pytest.raises(NotConnectedError, match="the proxy does not answer"):
            await refused(topic)
    subscription = await link.subscribe(topic, group, tags="*", start=ConsumeFrom.LATEST)
    await until(lambda: "the proxy does not answer" in (subscription.problem or ""))

    await own_proxy.start()

    await until(lambda: subscription.problem is None)
    async with asyncio.timeout(_DEADLINE):
        while not await _answers(link, topic):
            await asyncio.sleep(0.2)
    (queue,) = await link.queues(topic)
    await link.send(queue, numbered(topic, [1]))
    assert bodies(await receive(subscription, 1)) == [b"1"]


async def _answers(link: RocketLink, topic: str) -> bool:
    try:
        return await link.topic_exists(topic)
    except LinkError:
        return False


async def test_a_proxy_that_dies_and_comes_back_loses_and_mixes_up_nothing(
    rocketmq: SharedRocketMQ, own_proxy: Proxy, new_link: NewLink
) -> None:
    topic, group = await new_topic(rocketmq.namesrv), await new_group(rocketmq.namesrv)
    link = await new_link(own_proxy.address)
    (queue,) = await link.queues(topic)
    await link.send(queue, numbered(topic, [0]))
    subscription = await join(link, topic, group)
    (held,) = await receive(subscription, 1, settle=False)
    own_proxy.kill()
    with pytest.raises(NotConnectedError):
        await link.send(queue, numbered(topic, [1]))
    await until(lambda: "the proxy does not answer" in (subscription.problem or ""))

    starting = asyncio.create_task(own_proxy.start(), name="starting")
    for number in range(1, 60):
        await send_at_last(link, queue, numbered(topic, [number])[0])
    await starting
    # A proxy that was started again knows nobody: this one has made itself known.
    await until(lambda: subscription.problem is None)
    subscription.settle(held)

    # What was sent and not answered is there twice.
    rest: list[bytes] = []
    while len(set(rest)) < 59:
        rest += bodies(await receive(subscription, 1))
    rest += bodies(await receive_until_quiet(subscription))
    assert list(dict.fromkeys(rest)) == [b"%d" % number for number in range(1, 60)]
    await subscription.close()
    await receive_nothing(await join(link, topic, group))


async def test_a_proxy_that_hangs_holds_up_nobody(
    rocketmq: SharedRocketMQ, own_proxy: Proxy, new_link: NewLink
) -> None:
    topic, group = await new_topic(rocketmq.namesrv), await new_group(rocketmq.namesrv)
    link = await new_link(own_proxy.address)
    (queue,) = await link.queues(topic)
    await link.send(queue, numbered(topic, range(2)))
    subscription = await join(link, topic, group)
    held = await receive(subscription, 2, settle=False)
    late = 0.0

    async def watch() -> None:
        nonlocal late
        while True:
            before, due = core_waits(), time.monotonic() + 0.01
            await asyncio.sleep(0.01)
            late = max(late, time.monotonic() - due - waited_since(before))

    watching = asyncio.create_task(watch(), name="watching")
    own_proxy.pause()
    started = time.monotonic()
    with pytest.raises(LinkError, match="did not answer in time"):
        await link.send(queue, numbered(topic, [2]))
    assert time.monotonic() - started < 10.0
    subscription.settle(held[0])
    other = asyncio.create_task(link.send(queue, numbered(topic, [3])), name="other")
    await asyncio.sleep(0.1)
    started = time.monotonic()
    await link.close()
    assert time.monotonic() - started < 25.0
    with pytest.raises(LinkError):
        await other
    watching.cancel()
    assert late < 1.0, "the event loop stood still"
    own_proxy.resume()


async def test_a_route_is_not_taken_for_held_when_the_proxy_hangs_before_the_client_has_it(
    rocketmq: SharedRocketMQ, own_proxy: Proxy, new_link: NewLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await new_topic(rocketmq.namesrv)
    link = await new_link(own_proxy.address)
    producer = importlib.import_module("mq2mqtt.link.grpc.client").LinkProducer
    hold_route = producer.hold_route

    def hold_route_once_it_hangs(*arguments: Any) -> None:  # noqa: ANN401 - its own
        own_proxy.pause()
        hold_route(*arguments)

    try:
        with monkeypatch.context() as patched:
            patched.setattr(producer, "hold_route", hold_route_once_it_hangs)
            # A send would ask once more, and the event loop stand still as long as that takes.
            with pytest.raises(LinkError, match=f"did not answer for the route of topic {topic}"):
                await link.queues(topic)
    finally:
        own_proxy.resume()
    await send_at_last(link, Queue(topic, "broker-a", 0), numbered(topic, [1])[0])


async def test_a_broker_that_is_away_or_refuses_is_told(
    start_rocketmq: StartRocketMQ, tmp_path: Path, new_link: NewLink
) -> None:
    server = await start_rocketmq(broker_conf={"maxMessageSize": "100000"})
    proxy = await Proxy.on_jvm(tmp_path / "proxy", namesrv=server.namesrv, jars=server.jars)
    try:
        topic, group = await new_topic(server.namesrv), await new_group(server.namesrv)
        link = await new_link(proxy.address)
        (queue,) = await link.queues(topic)
        # The proxy would take it, the broker does not.
        with pytest.raises(MessageRejectedError, match="the message is illegal"):
            await link.send(queue, [RocketMessage(topic, b"x" * 200_000)])
        subscription = await join(link, topic, group)
        server.kill_broker()
        with pytest.raises(LinkError):
            await link.send(queue, numbered(topic, [1]))
        await until(lambda: subscription.problem is not None)

        await server.start_broker()

        await send_at_last(link, queue, numbered(topic, [2])[0])
        assert bodies(await receive(subscription, 1))[-1] in {b"1", b"2"}
        await until(lambda: subscription.problem is None)
    finally:
        proxy.kill()


async def test_a_proxy_that_gives_up_because_rocketmq_is_slow_is_started_again(
    start_rocketmq: StartRocketMQ, tmp_path: Path
) -> None:
    server = await start_rocketmq()
    proxy = await Proxy.on_jvm(tmp_path / "proxy", namesrv=server.namesrv, jars=server.jars)
    try:
        proxy.kill()
        server.kill_namesrv()
        starting = asyncio.create_task(proxy.start(), name="starting")
        await until(lambda: "create system broadcast topic" in (tmp_path / "proxy" / "proxy.out").read_text())
        assert not starting.done()
        await server.start_namesrv()
        await server.wait_registered()
        await starting
        assert not proxy.has_ended
    finally:
        proxy.kill()


async def test_the_documented_rights_are_enough_and_what_is_missing_is_named(
    tmp_path: Path, say: Callable[[str], None]
) -> None:
    server, settings = await guarded.start("keys", "grpc", tmp_path, say)
    link = open_link(
        settings.model_copy(update={"access_key": "dev", "secret_key": SecretStr("of-dev")}), client_id="dev"
    )
    topic, group = f"Topic:{guarded.TOPIC}", f"Group:{guarded.GROUP}"
    try:
        await _ask_for(settings, 3001, {"username": "dev", "password": "of-dev", "userType": "Normal"})
        await _grant(settings, (topic, "Pub"), (topic, "Sub"))
        await link.start()
        (queue,) = await link.queues(guarded.TOPIC)
        await link.send(queue, numbered(guarded.TOPIC, [1]))
        with pytest.raises(NotAuthorizedError, match=f"dev has no permission to access {group}"):
            await link.require_reading(guarded.TOPIC, guarded.GROUP)
        subscription = await link.subscribe(guarded.TOPIC, guarded.GROUP, tags="*", start=ConsumeFrom.LATEST)
        await until(lambda: f"no permission to access {group}" in (subscription.problem or ""))

        await _grant(settings, (topic, "Pub"), (topic, "Sub"), (group, "Sub"))

        assert bodies(await receive(subscription, 1)) == [b"1"]
        await subscription.close()
        assert await link.topic_exists(guarded.TOPIC)
    finally:
        await link.close()
        server.kill()


async def _grant(settings: RocketMQSettings, *rights: tuple[str, str]) -> None:
    entries = [
        {"resource": resource, "actions": [action], "sourceIps": [], "decision": "Allow"} for resource, action in rights
    ]
    await _ask_for(settings, 3006, {"subject": "User:dev", "policies": [{"policyType": "Custom", "entries": entries}]})


async def _ask_for(settings: RocketMQSettings, code: int, body: dict[str, Any]) -> None:
    """Send a request of an operator: 3001 makes a user, 3006 gives rights (`mqadmin createUser`, `createAcl`)."""
    assert settings.secret_key is not None
    fields: dict[str, str] = {name: body[name] for name in ("username", "subject") if name in body}
    async with Client(
        namesrv=settings.namesrv,
        client_id="operator",
        access_key=settings.access_key,
        secret_key=settings.secret_key.get_secret_value(),
    ) as client:
        for address in (await client.masters()).values():
            answer = await client.call(address, code, fields, json.dumps(body).encode())
            assert answer.code == 0, answer


# Ends


def test_starting_and_stopping_leaves_nothing_behind(
    rocketmq: SharedRocketMQ, rocketmq_proxy: str, tmp_path: Path
) -> None:
    topic = asyncio.run(new_topic(rocketmq.namesrv))
    group = asyncio.run(new_group(rocketmq.namesrv))
    output = run(
        f"""
        settings = RocketMQSettings(driver="grpc", proxy="{rocketmq_proxy}")
        counts = []
        for number in range(5):
            link = open_link(settings, client_id="one")
            await link.start()
            (queue,) = await link.queues("{topic}")
            joined = await link.subscribe("{topic}", "{group}", tags="*", start=ConsumeFrom.LATEST)
            while joined.problem is not None:
                await asyncio.sleep(0.01)
            await link.send(queue, [RocketMessage("{topic}", b"x")])
            joined.settle((await anext(joined))[0])
            await link.close()
            counts.append(threading.active_count())
        print(max(counts) - counts[0], len(asyncio.all_tasks()))
        """,
        home=tmp_path / "home",
    )

    # The loop's own threads, at most: the client's of one link are more than ten.
    threads, tasks = map(int, output.split())
    assert threads < 5
    assert tasks == 1
    assert list((tmp_path / "home").iterdir()) == []


def run(code: str, *, home: Path | None = None, exit_code: int = 0) -> str:
    """Run `code` in a process of its own, which writes nothing to its standard error; return what it prints."""
    lines = "\n".join("    " + line.removeprefix(" " * 8) for line in code.strip("\n").splitlines())
    program = f"""
import asyncio, os, threading
from mq2mqtt.link import ConsumeFrom
from mq2mqtt.link.drivers import open_link
from mq2mqtt.message import RocketMessage
from mq2mqtt.settings import RocketMQSettings

async def main():
    open_link(RocketMQSettings(driver="grpc", proxy="127.0.0.1:1"), client_id="loads the modules")
    from mq2mqtt.link.grpc import reader, subscription
{lines}

asyncio.run(main())
"""
    environment = dict(os.environ)
    if home is not None:
        home.mkdir()
        environment["HOME"] = str(home)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert (done.returncode, done.stderr) == (exit_code, "")
    return done.stdout
