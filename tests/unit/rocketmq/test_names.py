import json

import pytest

from mq2mqtt.rocketmq.errors import AnswerError, NotConnected, RequestTimeout, TopicNotFound
from mq2mqtt.rocketmq.names import NameServers, parse_addresses
from mq2mqtt.rocketmq.remoting import Response

ROUTE = json.dumps({"brokerDatas": [{"brokerName": "b", "brokerAddrs": {"0": "h:1"}}], "queueDatas": []}).encode()


class Servers:
    """Name servers by address: an answer, or an error to raise; remembers who was asked."""

    def __init__(self, **behaviour: Response | Exception) -> None:
        self.behaviour: dict[str, Response | Exception] = behaviour
        self.asked: list[str] = []

    async def call(self, address: str, _code: int, _fields: dict[str, str]) -> Response:
        self.asked.append(address)
        answer = self.behaviour[address]
        if isinstance(answer, Exception):
            raise answer
        return answer


def answer(code: int = 0, body: bytes = ROUTE) -> Response:
    return Response(code, 1, 1, "remark", {}, body)


def away(address: str) -> NotConnected:
    return NotConnected(address, "refused")


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("127.0.0.1:9876", ("127.0.0.1:9876",)),
        ("a:1;b:2", ("a:1", "b:2")),
        (" a:1 ; ;b:2; ", ("a:1", "b:2")),
        ("[::1]:9876", ("[::1]:9876",)),
    ],
)
def test_addresses(text: str, addresses: tuple[str, ...]) -> None:
    assert parse_addresses(text) == addresses


@pytest.mark.parametrize("text", ["", ";", "host", "host:", ":9876", "host:0", "host:65536", "host:x", "a:1;b", "h:²"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_addresses(text)


async def test_stays_with_the_one_that_works() -> None:
    servers = Servers(a=away("a"), b=answer(), c=answer())
    names = NameServers(("a", "b", "c"), servers.call)
    for _ in range(3):
        assert (await names.route("t")).master("b") == "h:1"
    assert servers.asked == ["a", "b", "b", "b"]
    servers.behaviour.update(b=RequestTimeout("b", 3), c=away("c"), a=answer())
    await names.route("t")
    assert servers.asked[4:] == ["b", "c", "a"]


async def test_a_topic_is_unknown_only_when_no_server_knows_it() -> None:
    servers = Servers(a=answer(17), b=answer())
    names = NameServers(("a", "b"), servers.call)
    assert (await names.route("t")).topic == "t"
    servers.behaviour["b"] = answer(17)
    with pytest.raises(TopicNotFound):
        await names.route("t")


async def test_unknown_to_the_one_that_answers_is_unknown() -> None:
    servers = Servers(a=away("a"), b=answer(17))
    names = NameServers(("a", "b"), servers.call)
    with pytest.raises(TopicNotFound, match="b answered code 17"):
        await names.route("t")


async def test_none_answers() -> None:
    names = NameServers(("a", "b"), Servers(a=away("a"), b=away("b")).call)
    with pytest.raises(NotConnected, match="not connected to b: refused"):
        await names.cluster_masters()


async def test_another_error_is_raised_at_once() -> None:
    servers = Servers(a=answer(1), b=answer())
    with pytest.raises(AnswerError) as caught:
        await NameServers(("a", "b"), servers.call).route("t")
    assert (caught.value.code, servers.asked) == (1, ["a"])
