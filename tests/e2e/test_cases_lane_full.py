"""RocketMQ away for longer than the lanes last: fail closed, rule by rule, and go on in order."""

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bridge_process import BridgeProcess, wait_for
from tests.conftest import SharedRocketMQ
from tests.mqtt_client import PINGRESP, PUBACK, PUBCOMP, PUBREC, PUBREL, Client, ack_packet, publish_packet
from tests.rocket_peer import RocketPeer
from tests.tcp_proxy import TcpProxy
from tests.waiting import until

pytestmark = pytest.mark.e2e


@pytest.fixture
def proxy() -> Iterator[TcpProxy]:
    with TcpProxy() as one:
        yield one


def _acknowledged(client: Client) -> list[int]:
    return [packet.packet_id for packet in client.packets if packet.kind == PUBACK]


async def test_a_full_lane(rocketmq: SharedRocketMQ, proxy: TcpProxy, tmp_path: Path) -> None:
    full, other = f"full_{uuid.uuid4().hex[:12]}", f"other_{uuid.uuid4().hex[:12]}"
    rules: list[dict[str, Any]] = [
        {"id": "full-out", "type": "outbound", "source": "full", "target": full},
        {"id": "other-out", "type": "outbound", "source": "other", "target": other},
    ]
    bridge = BridgeProcess(tmp_path, namesrv=proxy.listen(rocketmq.namesrv), rules=rules)
    bridge.config["rocketmq"]["address_map"] = {rocketmq.broker_address: proxy.listen(rocketmq.broker_address)}
    bridge.config["spool"]["max_bytes"] = "64KiB"
    with RocketPeer(rocketmq.namesrv) as peer:
        for topic in (full, other):
            await asyncio.to_thread(peer.create_topic, topic)
        await asyncio.to_thread(bridge.start)
        device = await Client.connect(bridge.mqtt_port, "dev")
        proxy.cut()
        await asyncio.to_thread(wait_for, lambda: bridge.get("/readyz")[0] == 503)

        for number in range(1, 101):
            device.send(publish_packet("full/x", b"%d " % number + bytes(1000), qos=1, packet_id=number))
        await device.ping()
        accepted = _acknowledged(device)
        assert accepted == list(range(1, len(accepted) + 1))
        assert 0 < len(accepted) < 100
        device.send(publish_packet("full/x", b"101 ", qos=2, packet_id=101))
        await device.wait_packet(PUBREC, 101)
        device.send(ack_packet(PUBREL, 101))
        for _ in range(5):
            await device.publish("full/x", b"lost", qos=0)
        # Other topics of the same client go on.
        await device.publish("other/x", b"other", qos=2)
        await device.publish("none/x", b"none", qos=1)
        # Until 256 publishes wait: then nothing more is read from this connection.
        flooder = await Client.connect(bridge.mqtt_port, "flooder")
        for number in range(1, 401):
            flooder.send(publish_packet("full/x", b"%d " % number, qos=1, packet_id=number))
        flooder.send(b"\xc0\x00")
        mortal = await Client.connect(bridge.mqtt_port, "mortal", will=("full/x", b"1 ", 1, False))
        mortal.abort()

        assert bridge.metric("mq2mqtt_dropped_total", rule="full-out", reason="lane_full") == 5
        assert "max_bytes" in bridge.readiness()["full-out"]["reason"]
        assert _acknowledged(device)[len(accepted) :] == []
        assert not [packet for packet in flooder.packets if packet.kind == PINGRESP]
        proxy.mend()
        await device.wait(lambda: len(_acknowledged(device)) == 100)
        await device.wait_packet(PUBCOMP, 101)
        await flooder.wait_packet(PINGRESP)
        assert _acknowledged(flooder) == list(range(1, 401))
        await asyncio.to_thread(wait_for, lambda: bridge.get("/readyz")[0] == 200)
        with peer.collect(full) as messages, peer.collect(other) as others:
            await until(lambda: len({(m.properties["clientId"], m.body) for m in messages}) == 502)
            await until(lambda: [message.body for message in others] == [b"other"])
        for client_id, count in (("dev", 101), ("flooder", 400), ("mortal", 1)):
            bodies = dict.fromkeys(m.body for m in messages if m.properties["clientId"] == client_id)
            assert [int(body.split()[0]) for body in bodies] == list(range(1, count + 1))
        await until(lambda: bridge.metric("mq2mqtt_lane_messages") == 0)
        total = "mq2mqtt_messages_total"
        assert bridge.metric(total, rule="full-out", outcome="accepted") == 502
        assert bridge.metric(total, rule="full-out", outcome="sent") == 502
    await device.drop()
    await flooder.drop()
    assert await asyncio.to_thread(bridge.stop) == 0
