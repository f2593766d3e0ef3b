import pytest

from mq2mqtt.rocketmq.admin import create_topic
from mq2mqtt.rocketmq.codes import RequestCode
from mq2mqtt.rocketmq.errors import NoBroker
from mq2mqtt.rocketmq.names import NameServers
from mq2mqtt.rocketmq.remoting import Response


class Cluster:
    """A name server `names:1` with the brokers that are registered there; remembers where topics were created."""

    def __init__(self, *brokers: str) -> None:
        self._brokers = brokers
        self.created_on: list[str] = []

    async def call(self, address: str, code: int, _fields: dict[str, str]) -> Response:
        if code == RequestCode.GET_ROUTEINFO_BY_TOPIC:
            return Response(17, 1, 1, "no route", {}, b"")
        if code == RequestCode.UPDATE_AND_CREATE_TOPIC:
            self.created_on.append(address)
        table = ",".join(f'"{broker}":{{"brokerAddrs":{{0:"{broker}:2"}}}}' for broker in self._brokers)
        return Response(0, 1, 1, "", {}, f'{{"brokerAddrTable":{{{table}}}}}'.encode())


async def create_on(cluster: Cluster) -> None:
    await create_topic(cluster, NameServers(("names:1",), cluster.call), "t", queues=4, perm=6)


async def test_a_topic_is_created_on_every_broker() -> None:
    cluster = Cluster("a", "b")
    await create_on(cluster)
    assert sorted(cluster.created_on) == ["a:2", "b:2"]


async def test_without_a_broker_a_topic_is_not_created_and_that_is_said() -> None:
    with pytest.raises(NoBroker, match="no broker is registered at names:1"):
        await create_on(Cluster())
