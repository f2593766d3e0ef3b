"""A real RocketMQ for whatever test asks for one, and what every test may need beside it."""

import asyncio
import os
import signal
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from mq2mqtt.link.drivers import DRIVERS
from mq2mqtt.quickstart import ports
from mq2mqtt.quickstart.cluster import broker_addresses, create_topic
from mq2mqtt.quickstart.docker import DockerError, RocketMQContainer
from mq2mqtt.quickstart.jars import rocketmq_jars
from mq2mqtt.quickstart.prerequisites import PrerequisiteError, require_java, require_postgresql
from mq2mqtt.quickstart.proxy import Proxy
from mq2mqtt.quickstart.rocketmq import DEFAULT_VERSION, RocketMQ
from mq2mqtt.settings import RocketMQSettings
from tests.new_bridge import HOSTS, choose_host
from tests.own_ports import take_own_ports
from tests.postgresql import PostgreSQL

# No limit on the time of an example or its making: the machine may be busy. All else is as chosen, in CI or not.
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tests")

MakeTopic = Callable[..., Awaitable[str]]
"""`await make_topic()` or `await make_topic(queues=1)`: the name of a new topic."""

StartRocketMQ = Callable[..., Awaitable[RocketMQ]]
"""`await start_rocketmq(version=..., broker_conf=..., ...)`: a RocketMQ of the test's own."""


@dataclass(frozen=True)
class SharedRocketMQ:
    """The RocketMQ that tests share: they may add topics and messages, never stop it."""

    namesrv: str
    broker_address: str
    version: str
    jars: Path | None
    """Directory of RocketMQ's jars; `None` for one that was given by address or runs in Docker."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mq2mqtt")
    group.addoption(
        "--rocketmq",
        metavar="HOST:PORT|docker",
        help="name server that shared tests use, or `docker` for a new RocketMQ in a container; default: on the JVM",
    )
    group.addoption(
        "--host",
        choices=HOSTS,
        default=HOSTS[0],
        help="MQTT broker that end-to-end and fault tests run the bridge with (%(default)s)",
    )
    group.addoption(
        "--driver",
        choices=tuple(DRIVERS),
        default="native",
        help="driver of the link that tests of links run with, each in the environment that has it (%(default)s)",
    )
    group.addoption("--rocketmq-version", default=DEFAULT_VERSION, help="RocketMQ that is started (%(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    take_own_ports()
    # A shell ignores it for what it runs in the background, and then so would every program that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    choose_host(config.getoption("--host"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("amqtt")
    if marker is not None and item.config.getoption("--host") != "amqtt":
        pytest.skip(f"amqtt only: {marker.args[0]}")
    if item.get_closest_marker("mosquitto") is not None and item.config.getoption("--host") != "mosquitto":
        pytest.skip("Mosquitto only: two processes")


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Show a line although output is captured: fetching RocketMQ for the first time takes a while."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    reporter = request.config.pluginmanager.getplugin("terminalreporter")

    def show(line: str) -> None:
        if capture is None or reporter is None:
            return
        with capture.global_and_fixture_disabled():
            reporter.write_line(line)

    return show


async def run_on_jvm(
    directory: Path,
    *,
    say: Callable[[str], None],
    version: str,
    **options: Any,  # noqa: ANN401 - as `RocketMQ.on_jvm`
) -> RocketMQ:
    """Start a RocketMQ, or skip the test (in CI: fail it) where it cannot be started."""
    try:
        # Only what may take minutes is shown: installing Java, fetching jars.
        await require_java(say)
        await rocketmq_jars(version, say)
        return await RocketMQ.on_jvm(directory, version=version, **options)
    except PrerequisiteError as exc:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no RocketMQ to test with: {exc}", pytrace=False)
        pytest.skip(f"no RocketMQ to test with: {exc}")


async def _run_in_docker(say: Callable[[str], None], version: str) -> RocketMQContainer:
    name = f"mq2mqtt-tests-{uuid.uuid4().hex[:8]}"
    conf = {"autoCreateTopicEnable": "false", "mappedFileSizeCommitLog": str(128 << 20)}
    try:
        return await RocketMQContainer.run(name, version=version, broker_conf=conf, say=say)
    except DockerError as exc:
        # Docker was asked for by name.
        pytest.fail(f"no RocketMQ in Docker to test with: {exc}", pytrace=False)


@pytest.fixture(scope="session")
def rocketmq(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, say: Callable[[str], None]
) -> Iterator[SharedRocketMQ]:
    """The RocketMQ that tests share, started when the first one asks."""
    given = request.config.getoption("--rocketmq")
    version = request.config.getoption("--rocketmq-version")
    if given == "docker":
        container = asyncio.run(_run_in_docker(say, version))
        address = asyncio.run(broker_addresses(container.namesrv))[0]
        yield SharedRocketMQ(container.namesrv, address, version, None)
        container.kill()
        return
    if given:
        yield SharedRocketMQ(given, asyncio.run(broker_addresses(given))[0], version, None)
        return
    # A loop of its own, gone before the test's begins: the launcher is bound to none.
    server = asyncio.run(run_on_jvm(tmp_path_factory.mktemp("rocketmq"), say=say, version=version))
    yield SharedRocketMQ(server.namesrv, server.broker_address, server.version, server.jars)
    server.kill()


@pytest.fixture(scope="session")
def rocketmq_proxy(rocketmq: SharedRocketMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of the proxy that tests share, in front of the shared RocketMQ."""
    assert rocketmq.jars is not None, "a proxy is started beside a RocketMQ on the JVM only"
    proxy = asyncio.run(Proxy.on_jvm(tmp_path_factory.mktemp("proxy"), namesrv=rocketmq.namesrv, jars=rocketmq.jars))
    yield proxy.address
    proxy.kill()


@pytest.fixture(scope="session")
def link_settings(request: pytest.FixtureRequest, rocketmq: SharedRocketMQ) -> RocketMQSettings:
    """Return how the driver that `--driver` names reaches the shared RocketMQ."""
    driver = request.config.getoption("--driver")
    proxy = request.getfixturevalue("rocketmq_proxy") if driver == "grpc" else None
    return RocketMQSettings(driver=driver, namesrv=rocketmq.namesrv, proxy=proxy)


@pytest.fixture
def make_topic(rocketmq: SharedRocketMQ) -> MakeTopic:
    """Create fresh topics on the shared RocketMQ."""

    async def make(*, queues: int = 4) -> str:
        name = f"t_{uuid.uuid4().hex[:16]}"
        await create_topic(rocketmq.namesrv, name, queues=queues)
        return name

    return make


@pytest.fixture
async def topic(make_topic: MakeTopic) -> str:
    """Name a fresh topic of four queues on the shared RocketMQ."""
    return await make_topic()


@pytest.fixture
def start_rocketmq(
    request: pytest.FixtureRequest, tmp_path: Path, say: Callable[[str], None]
) -> Iterator[StartRocketMQ]:
    """Start RocketMQs of the test's own: another version, other `broker.conf` lines, a prepared directory."""
    started: list[RocketMQ] = []

    async def start(
        *,
        version: str | None = None,
        broker_conf: dict[str, str] | None = None,
        java_properties: dict[str, str] | None = None,
        directory: Path | None = None,
    ) -> RocketMQ:
        server = await run_on_jvm(
            directory or tmp_path / f"rocketmq-{len(started)}",
            say=say,
            version=version or request.config.getoption("--rocketmq-version"),
            broker_conf=broker_conf,
            java_properties=java_properties,
        )
        started.append(server)
        return server

    yield start
    for server in started:
        server.kill()


@pytest.fixture
async def own_rocketmq(start_rocketmq: StartRocketMQ) -> RocketMQ:
    """Start a RocketMQ that the test may kill, pause and start again."""
    return await start_rocketmq()


@pytest.fixture
def free_port() -> int:
    """Name a TCP port that is free on 127.0.0.1, outside the range that outgoing connections use."""
    return ports.free_port()


@pytest.fixture(scope="session")
def postgresql(say: Callable[[str], None]) -> Iterator[PostgreSQL]:
    """The PostgreSQL that tests share, each with a database of its own; who stops it starts it again."""
    try:
        asyncio.run(require_postgresql(say))
    except PrerequisiteError as exc:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no PostgreSQL to test with: {exc}", pytrace=False)
        pytest.skip(f"no PostgreSQL to test with: {exc}")
    with PostgreSQL() as server:
        yield server
