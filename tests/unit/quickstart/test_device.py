"""The quickstart's device on a real broker."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mq2mqtt.host import Delivery, Outcome
from mq2mqtt.message import MqttMessage
from mq2mqtt.quickstart.device import Device, DeviceError, Received
from mq2mqtt.settings import Settings
from mq2mqtt_amqtt.run import RunningBroker, run_broker


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    settings = Settings.model_validate(
        {
            "spool": {"path": tmp_path},
            "admin": {"listen": "127.0.0.1:0"},
            "mqtt": {"listen": "127.0.0.1:0"},
            "rocketmq": {"namesrv": "127.0.0.1:1"},
        }
    )
    broker = await run_broker(settings)
    yield broker
    await broker.stop()


def port_of(broker: RunningBroker) -> int:
    return int(broker.addresses[0].rpartition(":")[2])


async def test_what_it_publishes_comes_back_to_it(broker: RunningBroker) -> None:
    device = await Device("d1").connect("127.0.0.1", port_of(broker))
    await device.subscribe("#")
    await device.publish("a/b", b"x" * 300)
    assert await asyncio.wait_for(device.receive(), 20) == Received("a/b", b"x" * 300, 1)
    await device.close()
    await device.close()


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_private_message_is_acknowledged_as_its_qos_asks(broker: RunningBroker, qos: int) -> None:
    device = await Device("d1").connect("127.0.0.1", port_of(broker))
    settled: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
    message = MqttMessage("a/p2p/d1", b"psst", qos)
    broker.host.deliver("d1", message, settled.set_result, handed=lambda: None)
    assert await asyncio.wait_for(device.receive(), 20) == Received("a/p2p/d1", b"psst", qos)
    assert (await asyncio.wait_for(settled, 20)).outcome is Outcome.DELIVERED
    await device.close()


async def test_a_lost_connection_is_an_error(broker: RunningBroker) -> None:
    device = await Device("d1").connect("127.0.0.1", port_of(broker))
    waiting = asyncio.create_task(device.receive(), name="receive")
    await broker.host.kick("d1")
    with pytest.raises(DeviceError, match="lost"):
        await asyncio.wait_for(waiting, 20)
    await device.close()


async def test_nobody_there_is_an_error(free_port: int) -> None:
    with pytest.raises(DeviceError, match=f"no MQTT broker at 127.0.0.1:{free_port}"):
        await Device("d1").connect("127.0.0.1", free_port)
