"""RocketMQ, or one of its topics, away for longer than a lane lasts: fail closed, rule by rule, and go on in order."""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mq2mqtt.message import ReceivedMessage
from tests.bridge_process import BridgeProcess, wait_for
from tests.conftest import SharedRocketMQ
from tests.device import Device
from tests.faults.report import FaultRow, FaultTable, assert_invariants
from tests.mqtt_client import PINGRESP, PUBACK, PUBCOMP, PUBREC, PUBREL, Client, ack_packet, publish_packet
from tests.new_bridge import new_bridge
from tests.rocket_peer import RocketPeer
from tests.stream import Stream
from tests.tcp_proxy import TcpProxy
from tests.waiting import PATIENCE, settled, until

pytestmark = pytest.mark.faults

_TOLD_SECONDS = 5.0 * PATIENCE
_QOS_0 = 5


@pytest.fixture
def proxy() -> Iterator[TcpProxy]:
    with TcpProxy() as one:
        yield one


def _acknowledged(client: Client) -> list[int]:
    return [packet.packet_id for packet in client.packets if packet.kind == PUBACK]


def _assert_all_in_order(messages: list[ReceivedMessage], **counts: int) -> None:
    """Each client's messages, numbered from 1, came in the order in which it published them."""
    for client_id, count in counts.items():
        bodies = dict.fromkeys(m.body for m in messages if m.properties["clientId"] == client_id)
        assert [int(body.split()[0]) for body in bodies] == list(range(1, count + 1))


def _of_the_lane(reason: str, bridge: BridgeProcess) -> str:
    """Return the part of a rule's reason that is the lane's, without where this test has it."""
    return reason.rpartition("; ")[2].replace(f"{bridge.directory}/", "")


@pytest.mark.amqtt("Mosquitto closes the connections of publishes that the lane has no space for")
async def test_rocketmq_away_for_longer_than_the_lane_lasts(
    rocketmq: SharedRocketMQ, proxy: TcpProxy, fault_table: FaultTable, tmp_path: Path
) -> None:
    full, other = f"full_{uuid.uuid4().hex[:12]}", f"other_{uuid.uuid4().hex[:12]}"
    rules: list[dict[str, Any]] = [
        {"id": "full-out", "type": "outbound", "source": "full", "target": full},
        {"id": "other-out", "type": "outbound", "source": "other", "target": other},
    ]
    bridge = new_bridge(tmp_path, namesrv=proxy.listen(rocketmq.namesrv), rules=rules)
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
        reason = bridge.readiness()["full-out"]["reason"]
        assert "max_bytes" in reason
        assert bridge.metric("mq2mqtt_rule_up", rule="full-out") == 0
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
        _assert_all_in_order(messages, dev=101, flooder=400, mortal=1)
        fault_table.add(
            FaultRow.of(
                fault="lane full, RocketMQ away",
                traffic="uplink QoS 1, 400 at once",
                acknowledged={b"%d" % number for number in range(1, 401)},
                arrivals=[m.body.strip() for m in messages if m.properties["clientId"] == "flooder"],
                longest_stall=None,
                reason=_of_the_lane(reason, bridge),
            )
        )
        await until(lambda: bridge.metric("mq2mqtt_lane_messages") == 0)
        outcomes = ("accepted", "sent")
        assert [bridge.metric("mq2mqtt_messages_total", rule="full-out", outcome=one) for one in outcomes] == [502, 502]
        await asyncio.to_thread(assert_invariants, bridge)
    await asyncio.gather(device.drop(), flooder.drop())
    assert await asyncio.to_thread(bridge.stop) == 0


async def test_one_topic_missing_for_longer_than_its_lane_lasts(
    rocketmq: SharedRocketMQ, fault_table: FaultTable, tmp_path: Path
) -> None:
    full, other = f"full_{uuid.uuid4().hex[:12]}", f"other_{uuid.uuid4().hex[:12]}"
    rules: list[dict[str, Any]] = [
        {"id": "full-out", "type": "outbound", "source": "full", "target": full},
        {"id": "other-out", "type": "outbound", "source": "other", "target": other},
    ]
    bridge = new_bridge(tmp_path, namesrv=rocketmq.namesrv, rules=rules)
    bridge.config["spool"]["max_bytes"] = "64KiB"
    streams = {
        (rule, qos): Stream(bridge.mqtt_port, f"{rule}/x", rate=200, qos=qos, client_id=f"GID_{rule}@@@{qos}")
        for rule in ("full", "other")
        for qos in (1, 2)
    }
    with RocketPeer(rocketmq.namesrv) as peer:
        await asyncio.to_thread(peer.create_topic, other)
        await asyncio.to_thread(bridge.start, ready=False)
        try:
            told = await _fill_and_mend(bridge, streams, lambda: peer.create_topic(full))
        finally:
            for stream in streams.values():
                await asyncio.to_thread(stream.stop)
        await until(lambda: bridge.metric("mq2mqtt_lane_messages") == 0, seconds=60)
        with peer.collect(full) as of_full, peer.collect(other) as of_other:
            wanted = {(stream.client_id, body) for stream in streams.values() for body in stream.acknowledged}
            await until(
                lambda: wanted <= {(m.properties["clientId"], m.body) for m in (*of_full, *of_other)}, seconds=60
            )
    for (rule, qos), stream in streams.items():
        fault_table.add(
            FaultRow.of(
                fault="lane full, its topic missing",
                traffic=f"uplink QoS {qos}, 200/s, {'that rule' if rule == 'full' else 'another rule'}",
                acknowledged=stream.acknowledged,
                arrivals=[m.body for m in (*of_full, *of_other) if m.properties["clientId"] == stream.client_id],
                longest_stall=stream.longest_stall,
                told_down=told[0] if rule == "full" else None,
                reason=_of_the_lane(told[1], bridge) if rule == "full" else "",
            )
        )
    await asyncio.to_thread(assert_invariants, bridge)
    assert await asyncio.to_thread(bridge.stop) == 0


async def _fill_and_mend(
    bridge: BridgeProcess, streams: dict[tuple[str, int], Stream], create_topic: Callable[[], None]
) -> tuple[float, str]:
    """Let the lane fill, hold that for a while, and create the topic; return when it was told, and the reason."""
    for stream in streams.values():
        stream.start()

    def acknowledged(rule: str) -> list[int]:
        return [len(streams[rule, qos].acknowledged) for qos in (1, 2)]

    def full() -> bool:
        return bridge.metric("mq2mqtt_lane_bytes", rule="full-out") > 65_400

    await until(full, seconds=60)
    began = time.monotonic()
    await until(lambda: "max_bytes" in str(bridge.readiness()["full-out"]["reason"]), seconds=_TOLD_SECONDS)
    told = time.monotonic() - began, str(bridge.readiness()["full-out"]["reason"])
    with Device(bridge.mqtt_port, "GID_dev@@@1") as device:
        for _ in range(_QOS_0):
            device.publish("full/x", b"lost", qos=0)
    await until(lambda: bridge.metric("mq2mqtt_dropped_total", rule="full-out", reason="lane_full") == _QOS_0)
    # Some were on their way when it filled.
    held, before = await settled(lambda: acknowledged("full")), acknowledged("other")
    await until(lambda: all(now > then + 200 for now, then in zip(acknowledged("other"), before, strict=True)))
    assert acknowledged("full") == held
    assert bridge.metric("mq2mqtt_rule_up", rule="full-out") == 0
    assert bridge.metric("mq2mqtt_rule_up", rule="other-out") == 1
    await asyncio.to_thread(create_topic)
    await until(lambda: bridge.get("/readyz")[0] == 200, seconds=60)
    await until(lambda: all(now > then + 200 for now, then in zip(acknowledged("full"), held, strict=True)))
    return told
