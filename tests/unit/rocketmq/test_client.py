import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from mq2mqtt import rocketmq
from mq2mqtt.message import RocketMessage
from mq2mqtt.rocketmq import Client, NoPermission, NotConnected, RequestCode, SendStatus, SystemBusy, TopicNotFound
from mq2mqtt.rocketmq.remoting import Command, encode_request, frame
from tests.unit.rocketmq.peer import Peer, peer, requests
from tests.waiting import until

MESSAGE = RocketMessage("t", b"body", {})


class Cluster:
    """A name server and broker in one that answers with what a test sets."""

    def __init__(self) -> None:
        self.address = ""
        self.masters = {"0": "self"}
        self.send_code = 0
        self.send_fields = {"queueOffset": "7"}
        self.heartbeat_code = 0
        self.forbidden: str | None = None
        self.seen: list[Command] = []
        self.push: bytes = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for request in requests(reader):
            self.seen.append(request)
            code, fields, body = 0, {}, b""
            if request.code == RequestCode.GET_ROUTEINFO_BY_TOPIC:
                body = self._route()
            elif request.code == RequestCode.SEND_MESSAGE_V2:
                code, fields = self.send_code, self.send_fields
            elif request.code == RequestCode.HEART_BEAT:
                groups = {one["groupName"] for one in json.loads(request.body)["consumerDataSet"]}
                code = 16 if self.forbidden in groups else self.heartbeat_code
            header = {"code": code, "opaque": request.opaque, "flag": 1, "extFields": fields, "remark": "as told"}
            writer.write(frame(json.dumps(header).encode(), body) + self.push)
            self.push = b""

    def _route(self) -> bytes:
        addresses = {number: self.address if to == "self" else to for number, to in self.masters.items()}
        queues = {"brokerName": "b", "perm": 6, "readQueueNums": 1, "writeQueueNums": 1}
        return json.dumps(
            {"brokerDatas": [{"brokerName": "b", "brokerAddrs": addresses}], "queueDatas": [queues]}
        ).encode()

    def codes(self) -> list[int]:
        return [request.code for request in self.seen]


@asynccontextmanager
async def started(cluster: Cluster) -> AsyncIterator[Client]:
    server: Peer
    async with peer(cluster.serve) as server:
        cluster.address = server.address
        async with Client(namesrv=server.address, client_id="c", request_timeout=10) as client:
            yield client


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="together"):
        Client(namesrv="h:1", client_id="c", access_key="a")
    with pytest.raises(ValueError, match="HOST:PORT"):
        Client(namesrv="h", client_id="c")


def test_a_client_shows_no_secret() -> None:
    secret = "s3cret"  # noqa: S105 - made up
    client = Client(namesrv="h:1;i:2", client_id="c", access_key="a", secret_key=secret)
    assert repr(client) == "Client('h:1;i:2', client_id='c')"


def test_what_the_package_offers_exists_and_is_sorted() -> None:
    constants = [name for name in rocketmq.__all__ if name.isupper()]
    classes = [name for name in rocketmq.__all__ if re.match(r"[A-Z]", name) and not name.isupper()]
    functions = [name for name in rocketmq.__all__ if name.islower()]
    assert rocketmq.__all__ == sorted(constants) + sorted(classes) + sorted(functions)
    assert all(hasattr(rocketmq, name) for name in rocketmq.__all__)


@pytest.mark.parametrize("status", list(SendStatus))
async def test_a_message_whose_disk_or_replica_is_late_is_stored(status: SendStatus) -> None:
    cluster = Cluster()
    cluster.send_code = int(status)
    async with started(cluster) as client:
        result = await client.send("t", "b", 0, [MESSAGE])
    assert (result.status, result.offset) == (status, 7)


async def test_a_stored_message_without_an_offset_is_stored() -> None:
    cluster = Cluster()
    cluster.send_fields = {}
    async with started(cluster) as client:
        assert (await client.send("t", "b", 0, [MESSAGE])).offset == -1


async def test_a_refused_send_is_an_error_and_casts_doubt_on_the_route_where_it_should() -> None:
    cluster = Cluster()
    async with started(cluster) as client:
        for code, error in ((2, SystemBusy), (17, TopicNotFound)):
            cluster.send_code = code
            with pytest.raises(error, match="as told"):
                await client.send("t", "b", 0, [MESSAGE])
        await asyncio.sleep(1.1)
        with pytest.raises(TopicNotFound):
            await client.send("t", "b", 0, [MESSAGE])
        while cluster.codes().count(RequestCode.GET_ROUTEINFO_BY_TOPIC) < 2:
            await asyncio.sleep(0.01)


async def test_a_broker_without_a_master_is_not_connected() -> None:
    cluster = Cluster()
    cluster.masters = {"1": "self"}
    async with started(cluster) as client:
        with pytest.raises(NotConnected, match="none has a master"):
            await client.queues("t")
        with pytest.raises(NotConnected, match="no master"):
            await client.send("t", "b", 0, [MESSAGE])


async def test_requests_of_a_broker() -> None:
    cluster = Cluster()
    changed = asyncio.Event()
    async with started(cluster) as client:
        client.on_group_changed("g", changed.set)
        cluster.push = b"".join(
            encode_request(code, number, fields)
            for number, (code, fields) in enumerate(
                [
                    (RequestCode.CHECK_TRANSACTION_STATE, {}),
                    (RequestCode.NOTIFY_CONSUMER_IDS_CHANGED, {"consumerGroup": "other"}),
                    (RequestCode.NOTIFY_CONSUMER_IDS_CHANGED, {"consumerGroup": "g"}),
                    (220, {}),
                ]
            )
        )
        await client.route("t")
        await asyncio.wait_for(changed.wait(), 10)
        while sum(one.is_response for one in cluster.seen) < 3:
            await asyncio.sleep(0.01)
        answers = {(one.opaque, one.code) for one in cluster.seen if one.is_response}
        assert answers == {(1, 0), (2, 0), (3, 3)}
        client.on_group_changed("g", None)
        changed.clear()
        cluster.push = encode_request(RequestCode.NOTIFY_CONSUMER_IDS_CHANGED, 9, {"consumerGroup": "g"})
        await client.route("t", max_age=0)
        await client.route("t", max_age=0)
        assert not changed.is_set()


async def test_groups_are_told_at_once_on_change_and_on_leaving() -> None:
    cluster = Cluster()
    async with started(cluster) as client:
        await client.send("t", "b", 0, [MESSAGE])
        client.register_producer("p")
        client.register_consumer("g", {"consumeType": "CONSUME_PASSIVELY"})
        while not any(b'"g"' in one.body for one in cluster.seen):
            await asyncio.sleep(0.01)
        beat = json.loads(next(one.body for one in cluster.seen if b'"g"' in one.body))
        assert beat["clientID"] == "c"
        assert beat["consumerDataSet"] == [{"consumeType": "CONSUME_PASSIVELY", "groupName": "g"}]
        assert beat["producerDataSet"] == [{"groupName": "DEFAULT_PRODUCER"}, {"groupName": "p"}]
        await client.unregister_consumer("g")
        await client.unregister_producer("p")
        left = [one.fields for one in cluster.seen if one.code == RequestCode.UNREGISTER_CLIENT]
        assert left == [{"clientID": "c", "consumerGroup": "g"}, {"clientID": "c", "producerGroup": "p"}]
    left = [one.fields for one in cluster.seen if one.code == RequestCode.UNREGISTER_CLIENT]
    assert left[2:] == [{"clientID": "c", "producerGroup": "DEFAULT_PRODUCER"}]


async def test_a_refused_heartbeat_is_an_error_to_who_asks_and_no_harm_otherwise() -> None:
    cluster = Cluster()
    cluster.heartbeat_code = 2
    async with started(cluster) as client:
        await client.send("t", "b", 0, [MESSAGE])
        with pytest.raises(SystemBusy):
            await client.heartbeat(cluster.address)
        await client.send("t", "b", 0, [MESSAGE])


async def test_one_forbidden_group_does_not_keep_the_others_from_being_known() -> None:
    cluster = Cluster()
    cluster.forbidden = "b"
    async with started(cluster) as client:
        await client.route("t")
        for group in ("a", "b", "c"):
            client.register_consumer(group, {"consumeType": "CONSUME_PASSIVELY"})

        def known() -> set[str]:
            beats = [json.loads(one.body) for one in cluster.seen if one.code == RequestCode.HEART_BEAT]
            groups = [{data["groupName"] for data in beat["consumerDataSet"]} for beat in beats]
            return set().union(*(beat for beat in groups if "b" not in beat))

        await until(lambda: known() == {"a", "c"})
        with pytest.raises(NoPermission):
            await client.heartbeat(cluster.address, consumer="b")


async def test_connections_that_nobody_uses_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq2mqtt.rocketmq.client._IDLE_SECONDS", -1)
    monkeypatch.setattr("mq2mqtt.rocketmq.client._TICK_SECONDS", 0.05)
    cluster = Cluster()
    async with peer(cluster.serve) as server:
        cluster.address = server.address
        async with Client(namesrv=server.address, client_id="c") as client:
            while server.connections < 2:
                with suppress(NotConnected):  # it may be closed just now
                    await client.call(server.address, 4711, {})
                await asyncio.sleep(0.1)


async def test_a_bug_in_the_upkeep_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with started(Cluster()) as client:
        await client.route("t")
        client.register_consumer("g", {"not": {"JSON"}})
        while "rocketmq.maintain[c] ended" not in caplog.text:
            await asyncio.sleep(0.01)
    assert caplog.records[-1].levelno == logging.ERROR


async def test_a_closed_client_says_so() -> None:
    cluster = Cluster()
    async with started(cluster) as client:
        await client.route("t")
        await client.close()
        for address in (cluster.address, "127.0.0.1:1"):
            with pytest.raises(NotConnected, match="this client is closed"):
                await client.call(address, 1, {})
