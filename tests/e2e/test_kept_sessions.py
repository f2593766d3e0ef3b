"""Persistent sessions on amqtt outlive the broker, and so do the messages that they miss, also while it is down."""

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.bridge_process import BridgeProcess
from tests.conftest import SharedRocketMQ
from tests.faults.report import assert_invariants
from tests.mqtt_client import CONNACK, Client, connect_packet
from tests.rocket_peer import RocketPeer
from tests.stock_amqtt import StockAmqtt
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.amqtt("Mosquitto keeps its sessions itself")]

_BATCH: Final = 30
_MISSED: Final = 40
_BURST: Final = 600
"""More than what makes a device that does not move count as stuck."""
_NAME: Final = "GID_kept@@@session"


class StockWithSessions(StockAmqtt):
    """The `amqtt` command with an authentication plugin that leaves sessions persistent."""

    auth = "mq2mqtt_amqtt.AuthPlugin"


def _kill(bridge: BridgeProcess) -> None:
    bridge.kill()


def _stop(bridge: BridgeProcess) -> None:
    assert bridge.stop() == 0


@pytest.mark.parametrize(("kind", "end"), [(BridgeProcess, _kill), (StockWithSessions, _stop)])
async def test_what_a_session_misses_comes_when_it_is_back(
    rocketmq: SharedRocketMQ,
    peer: RocketPeer,
    tmp_path: Path,
    kind: type[BridgeProcess],
    end: Callable[[BridgeProcess], None],
) -> None:
    into = f"in_{uuid.uuid4().hex[:12]}"
    peer.create_topic(into, queues=1)
    rule = {"id": "devices-in", "type": "inbound", "source": into, "target": "devices"}
    bridge = kind(tmp_path, namesrv=rocketmq.namesrv, rules=[rule])

    async def send(first: int, last: int) -> None:
        for number in range(first, last):
            await asyncio.to_thread(peer.send, into, b"%d" % number, mqttSecondTopic="/a", qoslevel="1")

    bridge.start()
    try:
        device = await Client.connect(bridge.mqtt_port, _NAME, clean=False)
        await device.subscribe(("devices/#", 1), ("other", 1))
        await device.unsubscribe("other")
        await device.disconnect()
        await send(0, 5)
        await until(lambda: bridge.metric("mq2mqtt_offline_messages") == 5)
        end(bridge)
        await send(5, _MISSED)
        bridge.start()
        await until(lambda: bridge.metric("mq2mqtt_offline_messages") >= _MISSED)
        await _come_back(bridge, peer, into)
        await until(lambda: bridge.metric("mq2mqtt_offline_messages") == 0)
        assert_invariants(bridge)
        assert bridge.stop() == 0
        assert "Traceback" not in bridge.log_file.read_text()
    finally:
        bridge.kill()


async def _come_back(bridge: BridgeProcess, peer: RocketPeer, into: str) -> None:
    """Connect: a batch comes at once, a live message past what waits, then the rest."""
    device = await Client.open(bridge.mqtt_port)
    try:
        device.send(connect_packet(_NAME, clean=False))
        assert (await device.wait_packet(CONNACK)).body == b"\x01\x00"
        await device.wait_messages(_BATCH)
        await asyncio.to_thread(peer.send, into, b"live", mqttSecondTopic="/a", qoslevel="1")
        await device.wait_messages(_BATCH + 1)
        assert device.messages[_BATCH].payload == b"live"
        everything = {b"live", *(b"%d" % number for number in range(_MISSED))}
        await device.wait(lambda: {message.payload for message in device.messages} == everything, "what was missed")
        await device.ping()
    finally:
        await device.drop()
    assert {(message.topic, message.qos, message.retain) for message in device.messages} == {("devices/a", 1, False)}
    # What was settled just before the kill may be fetched again.
    kept = list(dict.fromkeys(message.payload for message in device.messages if message.payload != b"live"))
    assert kept == [b"%d" % number for number in range(_MISSED)]


async def test_what_a_stuck_device_does_not_get_comes_in_its_order_when_it_is_back(
    rocketmq: SharedRocketMQ, peer: RocketPeer, tmp_path: Path
) -> None:
    into = f"in_{uuid.uuid4().hex[:12]}"
    peer.create_topic(into, queues=1)
    rule = {"id": "devices-in", "type": "inbound", "source": into, "target": "devices"}
    bridge = BridgeProcess(tmp_path, namesrv=rocketmq.namesrv, rules=[rule])
    bridge.start()
    try:
        stuck = await Client.connect(bridge.mqtt_port, _NAME, clean=False)
        stuck.stop_reading()
        bodies = [b"%d" % number for number in range(_BURST)]
        to_it = {"mqttSecondTopic": f"/p2p/{_NAME}", "qoslevel": "1", "cleansessionflag": "false"}
        await asyncio.to_thread(peer.send_many, into, bodies, **to_it)
        await until(lambda: bridge.metric("mq2mqtt_offline_messages") == _BURST)
        stuck.abort()
        back = await Client.connect(bridge.mqtt_port, _NAME, clean=False)
        await back.wait_messages(2 * _BATCH)
        await back.drop()
        assert [message.payload for message in back.messages[: 2 * _BATCH]] == bodies[: 2 * _BATCH]
        assert_invariants(bridge)
    finally:
        bridge.kill()
