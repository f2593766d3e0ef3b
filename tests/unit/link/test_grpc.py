"""What of the driver `grpc` needs no client: message groups, what is refused before it is sent, routes, settings."""

import asyncio
import contextlib
import logging
import sys
from pathlib import Path

import pytest

from mq2mqtt.errors import (
    ConfigError,
    LinkError,
    MessageRejectedError,
    NotAuthorizedError,
    NotConnectedError,
    TopicNotFoundError,
)
from mq2mqtt.link import Queue
from mq2mqtt.link import grpc as driver
from mq2mqtt.link.grpc import route as routes
from mq2mqtt.link.grpc.groups import group_names
from mq2mqtt.link.grpc.outgoing import require_sendable
from mq2mqtt.link.grpc.route import Route, Routes
from mq2mqtt.message import RocketMessage
from mq2mqtt.settings import RocketMQSettings
from tests.certificates import Authority

# Message groups


def test_the_groups_are_those_that_a_real_proxy_spread_over_four_queues() -> None:
    # Seen on RocketMQ 5.3.3: each of them in the queue of its number.
    assert group_names(4) == ("mq2mqtt-0-5", "mq2mqtt-1-3", "mq2mqtt-2-0", "mq2mqtt-3-0")


@pytest.mark.parametrize("count", [1, 2, 16, 128])
def test_each_queue_has_a_group_of_its_own_that_the_proxy_takes(count: int) -> None:
    names = group_names(count)

    assert len(set(names)) == count
    assert max(map(len, names)) < 64
    assert group_names(count) == names


# What is refused


@pytest.mark.parametrize(
    ("body", "properties", "words"),
    [
        (b"", {}, "the body is empty"),
        (b"12345", {}, "the body has 5 bytes, the proxy takes 4"),
        (b"x", {"k": "a\nb"}, "property 'k' has a control character, which the proxy refuses"),
        (b"x", {"k\x85": "v"}, r"property 'k\x85' has a control character, which the proxy refuses"),
        (b"x", {"k": "\ud800"}, "property 'k' is no Unicode text"),
        (b"x", {"k": "ü" * 16_384}, "the properties have 32769 bytes, RocketMQ takes 32767"),
        (b"x", {"TAGS": "a||b"}, "the proxy takes no tag 'a||b'"),
        (b"x", {"TAGS": " "}, "the proxy takes no tag ' '"),
    ],
)
def test_what_the_proxy_would_refuse_is_known_before(body: bytes, properties: dict[str, str], words: str) -> None:
    with pytest.raises(MessageRejectedError) as refused:
        require_sendable(RocketMessage("t", body, properties), max_body=4)
    assert str(refused.value) == words


def test_the_rest_is_sendable() -> None:
    require_sendable(RocketMessage("t", b"\0\1\2\3", {"TAGS": "a", "k": " ü ", "empty": ""}), max_body=4)


# Routes


def route(*, count: int = 2, ordered: bool = True, readable: bool = True) -> Route:
    queues = tuple(Queue("t", "b", number) for number in range(count))
    return Route(topic="t", queues=queues, readable=readable, ordered=ordered)


def test_a_queue_is_the_group_of_its_position() -> None:
    known = route()
    assert [known.group(queue) for queue in known.queues] == list(group_names(2))
    with pytest.raises(LinkError, match="topic t has no queue 2 on b any more"):
        known.group(Queue("t", "b", 2))


def test_a_topic_that_keeps_no_order_is_not_written() -> None:
    route().require_writable()
    with pytest.raises(LinkError, match=r"its type must be FIFO: mqadmin updateTopic .* -t t -a \+message.type=FIFO"):
        route(ordered=False).require_writable()
    with pytest.raises(NotAuthorizedError, match="topic t is not writable"):
        route(count=0).require_writable()


def test_a_topic_without_readable_queues_is_not_read() -> None:
    route().require_readable()
    with pytest.raises(NotAuthorizedError, match="topic t is not readable"):
        route(readable=False).require_readable()


class Proxy:
    """Answers with what a test has put there."""

    def __init__(self) -> None:
        self.answer: Route | Exception = route()
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def ask(self, topic: str) -> Route:
        assert topic == "t"
        self.asked += 1
        await self.may_answer.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def test_a_route_is_asked_for_once_by_many_and_kept() -> None:
    proxy = Proxy()
    known = Routes(proxy.ask)
    assert set(await asyncio.gather(*(known.get("t") for _ in range(5)))) == {proxy.answer}
    assert await known.get("t", max_age=60.0) == proxy.answer
    assert proxy.asked == 1

    await known.get("t", max_age=0.0)
    known.forget("t")
    await known.get("t")

    assert proxy.asked == 3


async def test_an_old_route_serves_while_it_is_refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_REFRESH_SECONDS", 0.0)
    proxy = Proxy()
    known = Routes(proxy.ask)
    old = await known.get("t")
    proxy.answer = route(count=3)
    proxy.may_answer.clear()

    assert await known.get("t") == old
    proxy.may_answer.set()
    while await known.get("t") == old:
        await asyncio.sleep(0)
    proxy.answer = NotConnectedError("away")
    for _ in range(5):
        # A proxy that is away takes no route away.
        assert await known.get("t") == route(count=3)
        await asyncio.sleep(0)
    proxy.answer = TopicNotFoundError("gone")
    while proxy.asked < 10:
        with contextlib.suppress(TopicNotFoundError):
            await known.get("t")
        await asyncio.sleep(0)
    with pytest.raises(TopicNotFoundError):
        await known.get("t")


async def test_closing_ends_who_waits_for_a_route() -> None:
    proxy = Proxy()
    proxy.may_answer.clear()
    known = Routes(proxy.ask)
    waiting = asyncio.create_task(known.get("t"), name="waiting")
    await asyncio.sleep(0)

    await known.close()

    with pytest.raises(NotConnectedError):
        await waiting


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"proxy": "[::1]:8081"},
            "rocketmq.proxy: the gRPC client takes no IPv6 address; name the proxy's host instead",
        ),
        (
            {"proxy": "one:8081;two:8081"},
            "rocketmq.proxy: the gRPC client takes one host name, or several IPv4 addresses",
        ),
        (
            {"tls": {"check_hostname": False}},
            "rocketmq.tls.check_hostname: driver grpc always checks the name; leave it true",
        ),
        (
            {"tls": {"ca_file": "/nowhere.pem"}},
            "rocketmq.tls.ca_file: /nowhere.pem cannot be read: No such file or directory",
        ),
    ],
)
def test_what_the_client_has_no_setting_for_is_refused(settings: dict[str, object], words: str) -> None:
    made = RocketMQSettings.model_validate({"driver": "grpc", "proxy": "127.0.0.1:8081"} | settings)
    with pytest.raises(ConfigError) as refused:
        driver.make_link(made, client_id="one")
    assert str(refused.value) == words


def test_a_certificate_of_its_own_is_refused(tmp_path: Path) -> None:
    mine = Authority(tmp_path).issue("client")
    tls = {"cert_file": mine.certificate, "key_file": mine.key}
    made = RocketMQSettings.model_validate({"driver": "grpc", "proxy": "127.0.0.1:8081", "tls": tls})
    with pytest.raises(ConfigError, match="driver grpc shows no certificate of its own; use driver native"):
        driver.make_link(made, client_id="one")


# What the package writes


def record_of(module: str) -> logging.LogRecord:
    """Log an error that came from `module`."""
    try:
        exec("1 / 0", {"__name__": module})  # noqa: S102 - a frame of that module
    except ZeroDivisionError:
        return logging.LogRecord("concurrent.futures", logging.ERROR, "", 1, "exception", (), sys.exc_info())
    raise AssertionError(module)


def test_errors_of_the_packages_own_callbacks_are_not_logged() -> None:
    kept = driver.not_of_the_package
    assert not kept(record_of("rocketmq.v5.client.client"))
    assert kept(record_of("rocketmq_of_others"))
    assert kept(record_of("mq2mqtt.link"))
    assert kept(logging.LogRecord("concurrent.futures", logging.ERROR, "", 1, "text", (), None))
