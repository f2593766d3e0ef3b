"""What devices publish comes into the lanes before it is acknowledged."""

import asyncio
import shutil
import signal

import pytest

from tests.e2e.hook.mosquitto import Mosquitto, Sidecar, settle, table_of
from tests.mqtt_client import PUBACK, PUBREC, publish_packet
from tests.unit.hook.batches import HELLO, Operation
from tests.waiting import until

pytestmark = pytest.mark.e2e
RULE = "telemetry-out"


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_publish_is_in_the_lane_when_it_is_acknowledged(qos: int, broker: Mosquitto) -> None:
    device = await broker.connect("dev-1", clean=False)
    watcher = await broker.connect("watcher")
    await watcher.subscribe(("sensors/#", 1))
    await device.publish("sensors/room/1", b"21.5\0\xff", qos=qos, retain=True)
    (frame,) = broker.frames(RULE)
    assert (frame.kind, frame.client_id, frame.topic, frame.payload) == (1, "dev-1", "sensors/room/1", b"21.5\0\xff")
    assert (frame.qos, frame.retain, frame.clean_session, frame.will) == (qos, True, False, False)
    # Mosquitto's own subscribers get it as ever.
    (message,) = await watcher.wait_messages(1)
    assert (message.topic, message.payload) == ("sensors/room/1", b"21.5\0\xff")
    await device.disconnect()
    await watcher.disconnect()


async def test_only_what_a_rule_takes_goes_into_its_lane(broker: Mosquitto) -> None:
    device = await broker.connect("dev-1")
    for topic in ("sensors", "sensors/", "alarms/fire", "sensorsx/a", "devices/a", "other", "x/sensors"):
        await device.publish(topic, topic.encode(), qos=1)
    assert broker.payloads(RULE) == [b"sensors", b"sensors/"]
    assert broker.payloads("alarms-out") == [b"alarms/fire"]
    await device.disconnect()


async def test_a_qos_2_message_is_there_before_pubrec(broker: Mosquitto) -> None:
    device = await broker.connect("dev-1")
    device.send(publish_packet("sensors/a", b"2", qos=2, packet_id=7))
    await device.wait_packet(PUBREC, 7)
    assert broker.payloads(RULE) == [b"2"]
    await device.drop()


async def test_without_a_table_nothing_is_exported_and_publishing_works(stopped: Mosquitto) -> None:
    await stopped.start()
    device = await stopped.connect("dev-1")
    await device.publish("sensors/a", b"1", qos=1)
    assert not (stopped.spool / RULE).exists()
    assert "no lane table yet" in stopped.log.read_text()
    # The sidecar brings it, and it holds without the sidecar and over a restart.
    sidecar = await Sidecar.connect(stopped)
    assert await sidecar.table(table_of({RULE: "sensors"})) == (True, "")
    await sidecar.client.drop()
    await device.publish("sensors/a", b"2", qos=1)
    await device.drop()
    await stopped.stop()
    await stopped.start()
    device = await stopped.connect("dev-1")
    await device.publish("sensors/a", b"3", qos=1)
    assert stopped.payloads(RULE) == [b"2", b"3"]
    await device.drop()


async def test_what_was_acknowledged_survives_kill_9(broker: Mosquitto) -> None:
    device = await broker.connect("dev-1")
    acknowledged = 0
    for number in range(1, 3001):
        device.send(publish_packet("sensors/a", b"%d" % number, qos=1, packet_id=number))
    await device.wait(lambda: sum(p.kind == PUBACK for p in device.packets) > 500, "500 PUBACKs")
    broker.kill()
    await device.wait_closed()
    acknowledged = sum(p.kind == PUBACK for p in device.packets)
    found = broker.payloads(RULE)
    assert len(found) >= acknowledged
    assert found == [b"%d" % number for number in range(1, len(found) + 1)]
    await device.drop()
    await broker.start()
    device = await broker.connect("dev-1")
    await device.publish("sensors/a", b"after", qos=1)
    assert broker.payloads(RULE)[-1] == b"after"
    await device.drop()


async def test_a_full_lane_acknowledges_nothing_and_takes_again(broker: Mosquitto, sidecar: Sidecar) -> None:
    assert (await sidecar.table(table_of({RULE: "sensors"}, max_bytes=2000)))[0]
    device = await broker.connect("dev-1")
    for number in range(3):
        await device.publish("sensors/a", b"%d" % number * 500, qos=1)
    device.send(publish_packet("sensors/a", b"x" * 500, qos=1, packet_id=99))
    await device.wait_closed()
    assert not [p for p in device.packets if p.kind == PUBACK]
    # QoS 0 is dropped and counted, and goes on to subscribers; other topics are not concerned.
    other = await broker.connect("dev-2")
    await other.subscribe(("sensors/#", 0))
    await other.publish("sensors/b", b"y" * 500)
    await other.wait_messages(1)
    await other.publish("elsewhere", b"z" * 500, qos=1)
    stats = await sidecar.stats()
    assert (stats["refused", RULE], stats["dropped_lane_full", RULE]) == (1, 1)
    assert "bytes are unsent, max_bytes is 2000" in (await sidecar.problems())[RULE]
    settle(broker.spool / RULE)
    # Known before anybody publishes again.
    assert await sidecar.problems() == {}
    await other.publish("sensors/a", b"x" * 500, qos=1)
    assert broker.payloads(RULE) == [b"x" * 500]
    await other.drop()
    await device.drop()


async def test_limits_refuse_as_a_forbidden_publish_is_refused(broker: Mosquitto, sidecar: Sidecar) -> None:
    await sidecar.table(table_of({RULE: "sensors"}, topic_chars=10, payload_bytes=5))
    device = await broker.connect("dev-1")
    watcher = await broker.connect("watcher")
    await watcher.subscribe(("#", 0))
    await device.publish("sensors/abc", b"1", qos=1)
    await device.publish("sensors/\u00e4\u00e4", b"12345", qos=1)
    await device.publish("sensors/a", b"123456", qos=1)
    await device.publish("elsewhere/and/longer", b"123456", qos=1)
    assert broker.payloads(RULE) == [b"12345"]
    assert [message.payload for message in await watcher.wait_messages(2)] == [b"12345", b"123456"]
    await device.drop()
    await watcher.drop()


async def test_a_message_longer_than_its_lane_is_acknowledged_and_counted(broker: Mosquitto, sidecar: Sidecar) -> None:
    await sidecar.table(table_of({RULE: "sensors"}, max_bytes=2000))
    device = await broker.connect("dev-1")
    await device.publish("sensors/a", b"x" * 3000, qos=1)
    assert (await sidecar.stats())["dropped_too_large", RULE] == 1
    await device.drop()


@pytest.mark.parametrize("sync_ms", [None, "1"])
async def test_durability_power(sync_ms: str | None, stopped: Mosquitto) -> None:
    (stopped.spool / "lanes.table").write_bytes(table_of({RULE: "sensors"}, durability="power", max_bytes=8192))
    if sync_ms:
        stopped.options["sync_ms"] = sync_ms
    await stopped.start()
    device = await stopped.connect("dev-1")
    for number in range(50):
        await device.publish("sensors/a", b"%d" % number, qos=1)
    assert stopped.payloads(RULE) == [b"%d" % number for number in range(50)]
    assert len(list((stopped.spool / RULE).glob("*.seg"))) > 2
    await device.drop()
    # Mosquitto's own thread gets the signal.
    await stopped.stop()


async def test_a_damaged_lane_takes_nothing_until_it_is_mended(broker: Mosquitto) -> None:
    device = await broker.connect("dev-1")
    for number in range(3):
        await device.publish("sensors/a", b"%d" % number, qos=1)
    await device.publish("alarms/a", b"fire", qos=1)
    await device.drop()
    await broker.stop()
    (path,) = (broker.spool / RULE).glob("*.seg")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    await broker.start()
    sidecar = await Sidecar.connect(broker)
    number = sidecar.send(Operation(HELLO))
    welcome = await sidecar.answer(1, number)
    assert welcome.body[16] & 8
    assert f"{RULE}: {path}: byte " in welcome.body.decode("latin1")
    assert (await sidecar.problems())[RULE].startswith(f"{path}: byte ")
    device = await broker.connect("dev-1")
    await device.publish("alarms/a", b"smoke", qos=1)
    device.send(publish_packet("sensors/a", b"3", qos=1, packet_id=1))
    await device.wait_closed()
    assert broker.payloads("alarms-out") == [b"fire", b"smoke"]
    await device.drop()
    remedy = broker.log.read_text().rpartition("truncate -s ")[2].split()
    path.write_bytes(data[: int(remedy[0])])
    device = await broker.connect("dev-1")
    broker.process.send_signal(signal.SIGHUP)
    await until(lambda: "Reloading config" in broker.log.read_text(), what="reload")
    await device.ping()
    await device.publish("sensors/a", b"3", qos=1)
    assert broker.payloads(RULE)[-1] == b"3"
    await device.drop()
    await sidecar.client.drop()


async def test_a_lane_that_is_deleted_under_the_broker_acknowledges_nothing(broker: Mosquitto) -> None:
    device = await broker.connect("dev-1")
    await device.publish("sensors/a", b"1", qos=1)
    shutil.rmtree(broker.spool / RULE)
    # The hook looks once in a millisecond.
    await asyncio.sleep(0.01)
    device.send(publish_packet("sensors/a", b"2", qos=1, packet_id=9))
    await device.wait_closed()
    assert "its last file was deleted" in broker.log.read_text()
    await device.drop()
    # It is opened anew, at once when Mosquitto is told to reload.
    broker.process.send_signal(signal.SIGHUP)
    device = await broker.connect("dev-1")
    await until(lambda: "Reloading config" in broker.log.read_text(), what="reload")
    await device.ping()
    await device.publish("sensors/a", b"2", qos=1)
    assert broker.payloads(RULE) == [b"2"]
    await device.drop()
