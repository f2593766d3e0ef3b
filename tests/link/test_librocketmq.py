"""What the driver over librocketmq does beside the contract: messages it can't read, outages, and its ends."""

import asyncio
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from mq2mqtt.errors import LinkError, MessageRejectedError, NotConnectedError
from mq2mqtt.link import ConsumeFrom, Queue, RocketLink, Subscription
from mq2mqtt.link.drivers import DRIVERS, library, open_link
from mq2mqtt.message import ReceivedMessage, RocketMessage
from mq2mqtt.quickstart.cluster import OPEN, create_topic
from mq2mqtt.quickstart.rocketmq import START_FAST, RocketMQ
from mq2mqtt.rocketmq import Client
from mq2mqtt.rocketmq.codes import RequestCode
from mq2mqtt.settings import RocketMQSettings
from tests import waiting
from tests.conftest import MakeTopic, SharedRocketMQ, StartRocketMQ
from tests.rocket_peer import RocketPeer

ROOT = Path(__file__).parents[2]
_COMPRESSED_BY_ZSTD = 0x1 | 2 << 8
_ALL = b"\0all\0"
_SECOND = "broker-b"

NewLink = Callable[[str], RocketLink]


@pytest.fixture(autouse=True)
def _with_its_package(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--driver") != "librocketmq":
        pytest.skip("runs in the environment of its driver: scripts/test --driver librocketmq")


@pytest.fixture
async def new_link() -> AsyncIterator[NewLink]:
    """Return what makes a link to a name server; they are closed at the end."""
    made: list[RocketLink] = []

    def make(namesrv: str) -> RocketLink:
        made.append(
            open_link(RocketMQSettings(driver="librocketmq", namesrv=namesrv), client_id=f"librocketmq-{len(made)}")
        )
        return made[-1]

    yield make
    for link in made:
        await link.close()


@pytest.fixture
def second_broker(tmp_path: Path) -> Iterator[Callable[[RocketMQ], Awaitable[RocketMQ]]]:
    """Return what starts another broker at the name server of a RocketMQ."""
    started: list[RocketMQ] = []

    async def start(first: RocketMQ) -> RocketMQ:
        second = RocketMQ(
            tmp_path / "second",
            version=first.version,
            jars=first.jars,
            broker_conf={"brokerName": _SECOND},
            java_properties={},
            java_flags=START_FAST,
            access=OPEN,
        )
        second.namesrv = first.namesrv
        started.append(second)
        await second.start_broker()
        return second

    yield start
    for server in started:
        server.kill()


@pytest.fixture
async def link(rocketmq: SharedRocketMQ, new_link: NewLink) -> RocketLink:
    link = new_link(rocketmq.namesrv)
    await link.start()
    return link


@pytest.fixture
async def single(make_topic: MakeTopic, link: RocketLink) -> Queue:
    """The only queue of a topic."""
    (queue,) = await link.queues(await make_topic(queues=1))
    return queue


def new_group() -> str:
    return f"GID_lib_{uuid.uuid4().hex[:12]}"


def messages(queue: Queue, *bodies: bytes) -> list[RocketMessage]:
    return [RocketMessage(queue.topic, body, {"TAGS": "t"}) for body in bodies]


async def receive(subscription: Subscription, count: int) -> list[ReceivedMessage]:
    received: list[ReceivedMessage] = []
    async with asyncio.timeout(60):
        async for batch in subscription:
            received += batch
            if len(received) >= count:
                break
    return received


async def at_last(use: Callable[[], Awaitable[None]]) -> None:
    """Do it again after each error that says that it may help."""
    async with asyncio.timeout(60):
        while True:
            try:
                await use()
            except LinkError:
                await asyncio.sleep(0.2)
            else:
                return


async def send_at_last(link: RocketLink, queue: Queue, body: bytes = b"x") -> None:
    await at_last(lambda: link.send(queue, messages(queue, body)))


async def send_as_another(queue: Queue, body: bytes, *, namesrv: str, address: str, flags: int = 0) -> None:
    """Send to `queue` with flags, or from an address, that the native driver does not have."""
    async with Client(namesrv=namesrv, client_id="another") as client:
        # The one-letter names of SEND_MESSAGE_V2.
        fields = {"a": "GID_o", "b": queue.topic, "c": queue.topic, "d": "4", "e": str(queue.queue_id), "f": str(flags)}
        fields |= {"g": "1700000000000", "h": "0", "i": "TAGS\x01t\x02more\x01x\x02", "j": "0", "k": "false"}
        answer = await client.call(address, RequestCode.SEND_MESSAGE_V2, fields | {"m": "false"}, body)
        assert answer.code == 0, answer


# Messages


async def test_what_the_library_cannot_read_is_left_out_alone(
    link: RocketLink, single: Queue, rocketmq: SharedRocketMQ
) -> None:
    over_ipv6 = f"[::1]:{rocketmq.broker_address.rpartition(':')[2]}"
    await link.send(single, messages(single, b"0", b"1"))
    await send_as_another(
        single,
        zstandard.compress(b"z" * 5000),
        namesrv=rocketmq.namesrv,
        address=rocketmq.broker_address,
        flags=_COMPRESSED_BY_ZSTD,
    )
    await link.send(single, messages(single, b"3"))
    await send_as_another(single, b"from afar", namesrv=rocketmq.namesrv, address=over_ipv6)
    await link.send(single, messages(single, b"5", _ALL))

    subscription = await link.subscribe(single.topic, new_group(), tags="t", start=ConsumeFrom.EARLIEST)
    received = await receive(subscription, 5)

    assert [(message.offset, message.body) for message in received] == [
        (0, b"0"),
        (1, b"1"),
        (3, b"3"),
        (5, b"5"),
        (6, _ALL),
    ]
    assert subscription.unreadable == 2
    for message in received:
        subscription.settle(message)
    await waiting.until(lambda: subscription.lag == 0 and subscription.problem is None, seconds=30)


async def test_a_body_that_another_client_deflated_is_whole(
    link: RocketLink, single: Queue, rocketmq: SharedRocketMQ
) -> None:
    # Ours is deflated by the library itself.
    body = bytes(range(256)) * 100
    await link.send(single, messages(single, body))
    with RocketPeer(rocketmq.namesrv) as peer, peer.collect_bodies(single.topic) as collected:
        await waiting.until(lambda: collected == [body], seconds=30)
    subscription = await link.subscribe(single.topic, new_group(), tags="*", start=ConsumeFrom.EARLIEST)

    assert [message.body for message in await receive(subscription, 1)] == [body]


async def test_a_property_that_would_be_cut_is_refused(link: RocketLink, single: Queue) -> None:
    cut = RocketMessage(single.topic, b"x", {"TAGS": "t", "clientId": "a\0b"})

    with pytest.raises(MessageRejectedError, match="NUL"):
        await link.send(single, [*messages(single, b"1"), cut])

    await link.send(single, messages(single, b"2"))
    subscription = await link.subscribe(single.topic, new_group(), tags="*", start=ConsumeFrom.EARLIEST)
    assert [message.body for message in await receive(subscription, 1)] == [b"2"]


# Committing


async def test_rocketmq_never_hears_of_more_than_the_settled_prefix(
    link: RocketLink, single: Queue, rocketmq: SharedRocketMQ
) -> None:
    group = new_group()
    with RocketPeer(rocketmq.namesrv) as peer:

        def committed() -> int:
            return peer.committed_offset(group, single.topic, broker_address=rocketmq.broker_address)

        await link.send(single, messages(single, *(b"%d" % number for number in range(10))))
        subscription = await link.subscribe(single.topic, group, tags="*", start=ConsumeFrom.EARLIEST)
        received = await receive(subscription, 10)
        for message in [*received[:3], *received[5:]]:
            subscription.settle(message)
        await waiting.until(lambda: committed() == 3, seconds=30)
        # Pulls that bring nothing, and many commits, later.
        await asyncio.sleep(2.5)
        assert committed() == 3
        subscription.settle(received[3])
        subscription.settle(received[4])
        await waiting.until(lambda: committed() == 10, seconds=30)


# Outages


async def test_without_a_name_server_the_link_starts_and_says_so(new_link: NewLink, free_port: int) -> None:
    link = new_link(f"127.0.0.1:{free_port}")
    await link.start()

    for use in (link.queues("t"), link.probe("t"), link.topic_exists("t"), link.send(Queue("t", "b", 0), [])):
        with pytest.raises(NotConnectedError, match=str(free_port)):
            await use
    subscription = await link.subscribe("t", new_group(), tags="*", start=ConsumeFrom.LATEST)
    await waiting.until(lambda: str(free_port) in (subscription.problem or ""), seconds=30)


@pytest.mark.faults
async def test_after_the_broker_was_killed_both_ways_go_on(start_rocketmq: StartRocketMQ, new_link: NewLink) -> None:
    server = await start_rocketmq()
    await create_topic(server.namesrv, "t", queues=1)
    link = new_link(server.namesrv)
    await link.start()
    (queue,) = await link.queues("t")
    subscription = await link.subscribe("t", new_group(), tags="*", start=ConsumeFrom.EARLIEST)
    await link.send(queue, messages(queue, b"before"))
    (before,) = await receive(subscription, 1)
    server.kill_broker()

    for use in (link.send(queue, messages(queue, b"lost")), link.probe("t")):
        with pytest.raises(LinkError, match="broker-a"):
            await use
    await waiting.until(lambda: "broker-a" in (subscription.problem or ""), seconds=30)
    subscription.settle(before)
    await server.start_broker()

    await send_at_last(link, queue, b"after")
    assert [message.body for message in await receive(subscription, 1)] == [b"after"]
    await waiting.until(lambda: subscription.problem is None, seconds=30)


@pytest.mark.faults
async def test_a_broker_that_hangs_is_told_to_all_at_once_and_holds_up_no_other(
    start_rocketmq: StartRocketMQ, second_broker: Callable[[RocketMQ], Awaitable[RocketMQ]], new_link: NewLink
) -> None:
    server = await start_rocketmq()
    await create_topic(server.namesrv, "healthy", queues=1)
    hanging = await second_broker(server)
    topics = ("one", "two")
    for topic in topics:
        await create_topic(server.namesrv, topic, queues=8)
    link = new_link(server.namesrv)
    await link.start()
    (healthy,) = await link.queues("healthy")
    hung = [queue for topic in topics for queue in await link.queues(topic) if queue.broker == _SECOND]
    assert len(hung) == 16
    for queue in (*hung, healthy):
        await send_at_last(link, queue)
    subscription = await link.subscribe("one", new_group(), tags="*", start=ConsumeFrom.EARLIEST)
    await receive(subscription, 8)
    hanging.pause_broker()
    began = time.monotonic()

    async def told(use: Awaitable[None]) -> float:
        with pytest.raises(LinkError, match=_SECOND):
            await use
        return time.monotonic() - began

    sends = asyncio.gather(*(told(link.send(queue, messages(queue, b"hangs"))) for queue in hung))
    proofs = asyncio.gather(*(told(link.probe(topic)) for topic in topics))
    await link.send(healthy, messages(healthy, b"goes on"))
    assert time.monotonic() - began < 2.5
    await waiting.until(lambda: _SECOND in (subscription.problem or ""), seconds=8)
    # Each took the library's own time, 3 s and 10 s, after the one before.
    assert max(*await sends, *await proofs) < 8

    hanging.resume_broker()

    for queue in hung:
        await send_at_last(link, queue)
    await waiting.until(lambda: subscription.problem is None, seconds=60)
    await at_last(functools.partial(link.probe, "one"))


# Ends


_USE = """
import asyncio, sys
from mq2mqtt.errors import LinkError, NotConnectedError
from mq2mqtt.link import ConsumeFrom
from mq2mqtt.link.drivers import open_link
from mq2mqtt.message import RocketMessage
from mq2mqtt.settings import RocketMQSettings

async def send(link, queue, messages):
    while True:
        try:
            return await link.send(queue, messages)
        except NotConnectedError:
            raise
        except LinkError:
            await asyncio.sleep(0.1)  # a broker may be busy

async def use(times, close, topic, namesrv):
    for number in range(times):
        link = open_link(RocketMQSettings(driver="librocketmq", namesrv=namesrv), client_id="one")
        await link.start()
        subscription = await link.subscribe(topic, f"GID_use_{number}", tags="*", start=ConsumeFrom.EARLIEST)
        queues = await link.queues(topic)
        message = RocketMessage(topic, b"x", {"TAGS": "t"})
        await asyncio.gather(anext(subscription), *(send(link, queue, [message]) for queue in queues))
        if close:
            sends = [asyncio.ensure_future(link.send(queue, [message] * 500)) for queue in queues]
            await asyncio.sleep(0.01)
            # In the middle of it all.
            await asyncio.gather(link.close(), *sends, return_exceptions=True)
    print("used")

asyncio.run(use(int(sys.argv[1]), sys.argv[2] == "close", *sys.argv[3:]))
"""


@pytest.mark.parametrize(("times", "close"), [(25, True), (1, False)], ids=["closed-25-times", "not-closed"])
def test_a_process_ends_in_peace(times: int, rocketmq: SharedRocketMQ, topic: str, *, close: bool) -> None:
    arguments = [sys.executable, "-c", _USE, str(times), "close" if close else "leave", topic, rocketmq.namesrv]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=250, check=False)

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "used\n", "")


async def test_what_it_sends_and_receives_is_freed(link: RocketLink, single: Queue) -> None:
    def resident_mebibytes() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    async def round_trip(count: int) -> None:
        for _ in range(count // 100):
            await link.send(single, messages(single, *[os.urandom(4000)] * 100))
            for message in await receive(subscription, 100):
                subscription.settle(message)

    subscription = await link.subscribe(single.topic, new_group(), tags="*", start=ConsumeFrom.EARLIEST)
    await round_trip(1000)
    growths: list[float] = []
    # What an allocator or a log takes once, it does not take three times.
    while len(growths) < 3 and min(growths, default=10.0) >= 10:
        before = resident_mebibytes()
        await round_trip(5000)  # of 20 MiB
        growths.append(resident_mebibytes() - before)

    assert min(growths) < 10, growths


def test_a_log_that_cannot_be_written_is_an_error_and_no_abort(
    tmp_path: Path, rocketmq: SharedRocketMQ, topic: str
) -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("root alone can mount what nobody can write")
    # Where releases write it, and where the build of the tests does.
    mounts = 'for log in "$HOME" /logs; do mkdir -p "$log" && mount -t tmpfs -o ro none "$log"; done && exec "$@"'
    arguments = ["unshare", "--mount", "sh", "-c", mounts, "sh"]
    arguments += [sys.executable, "-c", _USE, "1", "close", topic, rocketmq.namesrv]
    ended = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, "HOME": str(tmp_path / "home")},
    )

    assert (ended.returncode, ended.stdout) == (1, "")
    assert "ConfigError: librocketmq cannot start: " in ended.stderr
    assert "Read-only file system" in ended.stderr


# What is installed


def test_the_library_is_told() -> None:
    assert "rocketmq-client-python 2.0.0, CPP CORE VERSION: 2." in library(DRIVERS["librocketmq"])


def _damaged(package: Path) -> None:
    (package / "librocketmq.so").write_bytes(b"no library")


def _of_an_old_compiler(package: Path) -> None:
    """Have the package content with a library that lacks what the driver needs besides."""
    (package / "ffi.py").write_text("_DYLIB_PATH = 'libz.so.1'")


@pytest.mark.parametrize("change", [None, _damaged, _of_an_old_compiler], ids=["missing", "damaged", "old"])
def test_a_native_library_that_does_not_do_is_one_clear_line(
    tmp_path: Path, change: Callable[[Path], None] | None
) -> None:
    package = tmp_path / "rocketmq"
    installed = Path(sysconfig.get_path("platlib"), package.name)
    shutil.copytree(installed, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if change is not None:
        change(package)
    config = tmp_path / "mq2mqtt.yaml"
    config.write_text("rocketmq: {namesrv: '127.0.0.1:9', driver: librocketmq}\nrules: []\n")

    ended = subprocess.run(
        [sys.executable, "-m", "mq2mqtt", "run", "-c", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )

    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "rocketmq.driver librocketmq" in line
    assert "install Apache's rocketmq-client-cpp" in line
