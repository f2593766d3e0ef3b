"""P2P messages reach their client alone; the wills of clients are exported with the client's own id."""

import asyncio
import signal

import pytest

from tests.e2e.hook.mosquitto import DELIVERED, Mosquitto, Sidecar, only, settle, table_of, wrapper
from tests.mqtt_client import PUBACK, publish_packet
from tests.unit.hook.batches import DELIVER, Operation
from tests.waiting import until

pytestmark = pytest.mark.e2e


async def test_p2p_reaches_its_client_alone_and_is_not_kept(broker: Mosquitto) -> None:
    target, spy = await broker.connect("dev-2"), await broker.connect("spy")
    await target.subscribe(("sensors/p2p/dev-2", 1))
    await spy.subscribe(("sensors/#", 1), ("sensors/p2p/dev-2", 1), ("#", 1))
    sender = await broker.connect("dev-1")
    await sender.publish("sensors/p2p/dev-2", b"secret", qos=1, retain=True)
    message = only(await target.wait_messages(1))
    assert (message.topic, message.payload, message.qos, message.retain) == ("sensors/p2p/dev-2", b"secret", 1, False)
    late = await broker.connect("late")
    await late.subscribe(("sensors/#", 1))
    for client in (spy, late, target):
        await client.ping()
    assert (spy.messages, late.messages) == ([], [])
    assert len(target.messages) == 1
    # It is exported as every publish, without the retain flag.
    (frame,) = broker.frames("telemetry-out")
    assert (frame.topic, frame.client_id, frame.retain) == ("sensors/p2p/dev-2", "dev-1", False)
    for client in (target, spy, sender, late):
        await client.drop()


async def test_p2p_under_a_rule_without_a_lane_is_private_too(broker: Mosquitto) -> None:
    target, spy = await broker.connect("dev-2"), await broker.connect("spy")
    await spy.subscribe(("devices/#", 1))
    await target.publish("devices/p2p/dev-2", b"to myself", qos=1)
    assert only(await target.wait_messages(1)).payload == b"to myself"
    await target.publish("devices/p2p/a/b", b"ordinary", qos=1)
    await target.publish("other/p2p/dev-2", b"no rule", qos=1)
    assert only(await spy.wait_messages(1)).payload == b"ordinary"
    assert len(target.messages) == 1
    for client in (target, spy):
        await client.drop()


@pytest.mark.parametrize("qos", [1, 2])
async def test_kept_p2p_is_in_its_lane_when_it_is_acknowledged_and_is_left_to_the_sidecar(
    qos: int, broker: Mosquitto
) -> None:
    target = await broker.connect("dev-2", clean=False)
    sender = await broker.connect("dev-1", clean=False)
    await sender.publish("devices/p2p/dev-2", b"kept", qos=qos, retain=True)
    await sender.publish("sensors/p2p/nobody", b"exported too", qos=qos)
    frames = broker.frames(".p2p")
    assert [(frame.topic, frame.payload, frame.client_id) for frame in frames] == [
        ("devices/p2p/dev-2", b"kept", "dev-1"),
        ("sensors/p2p/nobody", b"exported too", "dev-1"),
    ]
    assert {(frame.qos, frame.retain, frame.clean_session, frame.will) for frame in frames} == {
        (qos, False, False, False)
    }
    assert broker.payloads("telemetry-out") == [b"exported too"]
    await target.ping()
    assert target.messages == []
    broker.kill()
    assert broker.payloads(".p2p") == [b"kept", b"exported too"]
    for client in (target, sender):
        await client.drop()


async def test_p2p_that_its_sender_does_not_have_kept_is_for_a_client_that_is_there(
    broker: Mosquitto, sidecar: Sidecar
) -> None:
    there = await broker.connect("there")
    away = await broker.connect("away", clean=False)
    await away.disconnect()
    await broker.gone("away")
    clean, persistent = await broker.connect("dev-1"), await broker.connect("dev-2", clean=False)
    for sender, qos, topic in (
        (persistent, 0, "sensors/p2p/"),
        (clean, 0, "sensors/p2p/"),
        (clean, 1, "devices/p2p/"),
        (clean, 2, "devices/p2p/"),
    ):
        await sender.publish(f"{topic}there", b"%d" % qos, qos=qos)
        await sender.publish(f"{topic}away", b"%d" % qos, qos=qos)
        await sender.ping()
    assert sorted(message.payload for message in await there.wait_messages(4)) == [b"0", b"0", b"1", b"2"]
    assert broker.payloads(".p2p") == []
    stats = await sidecar.stats()
    assert (stats["dropped_not_persistent", "sensors"], stats["dropped_not_persistent", "devices"]) == (2, 2)
    # Another table keeps the count.
    assert (await sidecar.table(table_of({"telemetry-out": "sensors"}, ("more", "devices"))))[0]
    stats = await sidecar.stats()
    assert [stats["dropped_not_persistent", name] for name in ("sensors", "more", "devices")] == [2, 0, 2]
    away = await broker.connect("away", clean=False)
    await away.ping()
    assert away.messages == []
    for client in (there, away, clean, persistent):
        await client.drop()


@pytest.mark.parametrize("restarted", [False, True])
async def test_p2p_for_a_client_that_is_away_waits_in_no_queue_of_its_subscriptions(
    restarted: bool,  # noqa: FBT001 - a case
    stopped: Mosquitto,
) -> None:
    (stopped.spool / "lanes.table").write_bytes(table_of({}, ("devices",)))
    if restarted:
        if any(wrapper()):
            pytest.skip("Mosquitto 2.0.11 reads beyond user names when it saves its sessions")
        stopped.general += ["persistence true", f"persistence_location {stopped.directory}/"]
    await stopped.start()
    sidecar = await Sidecar.connect(stopped, parents=("devices",))
    away = await stopped.connect("away", clean=False)
    await away.subscribe(("devices/#", 1), ("devices/p2p/away", 2))
    await away.disconnect()
    await stopped.gone("away")
    if restarted:
        await stopped.stop()
        await stopped.start()
        await sidecar.client.drop()
        sidecar = await Sidecar.connect(stopped, parents=("devices",))
    clean, persistent = await stopped.connect("dev-1"), await stopped.connect("dev-2", clean=False)
    await clean.publish("devices/p2p/away", b"not kept", qos=1)
    await persistent.publish("devices/p2p/away", b"kept", qos=1)
    await persistent.publish("devices/a", b"ordinary", qos=1)
    for client_id, is_clean in (("dev-3", True), ("dev-4", False)):
        will = ("devices/p2p/away", b"will", 1, False)
        (await stopped.connect(client_id, clean=is_clean, will=will)).abort()
    await until(lambda: stopped.payloads(".p2p") == [b"kept", b"will"], what="what is kept")

    async def dropped() -> int:
        return (await sidecar.stats())["dropped_not_persistent", "devices"]

    for _ in range(600):
        if await dropped() == 2:
            break
        await asyncio.sleep(0.05)
    assert await dropped() == 2
    away = await stopped.connect("away", clean=False)
    await away.ping()
    # What is kept is the sidecar's to hand over.
    assert [message.payload for message in away.messages] == [b"ordinary"]
    for client in (clean, persistent, away, sidecar.client):
        await client.drop()


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_session_keeps_p2p_that_it_was_handed(qos: int, broker: Mosquitto) -> None:
    target = await broker.connect("dev-2", clean=False, acknowledge=False)
    sender = await broker.connect("dev-1")
    await sender.publish("devices/p2p/dev-2", b"unanswered", qos=qos)
    await target.wait_messages(1)
    await target.drop()
    await broker.event("tcpclean", "dev-2")
    target = await broker.connect("dev-2", clean=False)
    assert [message.payload for message in await target.wait_messages(1)] == [b"unanswered"]
    for client in (target, sender):
        await client.drop()


async def test_kept_p2p_is_not_acknowledged_while_its_lane_is_full(broker: Mosquitto, sidecar: Sidecar) -> None:
    assert (await sidecar.table(table_of({"telemetry-out": "sensors"}, ("devices",), max_bytes=2000)))[0]
    target = await broker.connect("dev-2")
    sender = await broker.connect("dev-1", clean=False)
    for number in range(3):
        await sender.publish("devices/p2p/dev-2", b"%d" % number * 500, qos=1)
    sender.send(publish_packet("devices/p2p/dev-2", b"x" * 500, qos=1, packet_id=99))
    await sender.wait_closed()
    assert 99 not in [packet.packet_id for packet in sender.packets if packet.kind == PUBACK]
    again = await broker.connect("dev-1", clean=False)
    again.send(publish_packet("sensors/p2p/dev-2", b"x" * 500, qos=1, packet_id=99))
    await again.wait_closed()
    assert (await sidecar.stats())["refused", ".p2p"] == 2
    # Its sender may try for hours: it is not exported each time.
    assert broker.payloads("telemetry-out") == []
    assert "bytes are unsent, max_bytes is 2000" in (await sidecar.problems())[".p2p"]
    # What is not kept goes on, and so does a will: it has no sender that would try again.
    other = await broker.connect("dev-3", clean=False, will=("devices/p2p/dev-2", b"farewell" * 50, 1, False))
    await other.publish("devices/p2p/dev-2", b"y" * 500)
    await other.publish("sensors/a", b"z" * 500, qos=1)
    assert only(await target.wait_messages(1)).payload == b"y" * 500
    settle(broker.spool / ".p2p")
    await sender.drop()
    sender = await broker.connect("dev-1", clean=False)
    await sender.publish("devices/p2p/dev-2", b"x" * 500, qos=1)
    assert broker.payloads(".p2p") == [b"x" * 500]
    assert await sidecar.problems() == {}
    for client in (target, sender, again, other):
        await client.drop()


async def test_kept_p2p_that_is_longer_than_its_lane_is_handed_over(broker: Mosquitto, sidecar: Sidecar) -> None:
    await sidecar.table(table_of({}, ("devices",), max_bytes=2000))
    target, sender = await broker.connect("dev-2"), await broker.connect("dev-1", clean=False)
    await sender.publish("devices/p2p/dev-2", b"x" * 3000, qos=1)
    assert len(only(await target.wait_messages(1)).payload) == 3000
    assert (await sidecar.stats())["dropped_too_large", ".p2p"] == 1
    for client in (target, sender):
        await client.drop()


async def test_kept_p2p_without_a_lane_is_not_acknowledged(stopped: Mosquitto) -> None:
    (stopped.spool / "lanes.table").write_bytes(table_of({}, ("devices",)))
    (stopped.spool / ".p2p").touch()
    await stopped.start()
    sidecar = await Sidecar.connect(stopped)
    sender = await stopped.connect("dev-1", clean=False)
    sender.send(publish_packet("devices/p2p/dev-2", b"kept", qos=1, packet_id=1))
    await sender.wait_closed()
    await sender.drop()
    assert str(stopped.spool / ".p2p") in (await sidecar.problems())[".p2p"]
    (stopped.spool / ".p2p").unlink()
    stopped.process.send_signal(signal.SIGHUP)
    await until((stopped.spool / ".p2p").is_dir, what="the lane")
    sender = await stopped.connect("dev-1", clean=False)
    await sender.publish("devices/p2p/dev-2", b"kept", qos=1)
    assert stopped.payloads(".p2p") == [b"kept"]
    for client in (sender, sidecar.client):
        await client.drop()


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_will_is_exported_once_with_its_clients_id(qos: int, broker: Mosquitto, sidecar: Sidecar) -> None:
    watcher = await broker.connect("watcher")
    await watcher.subscribe(("sensors/#", 0))
    device = await broker.connect("dev-1", clean=False, will=("sensors/last", b"gone", qos, True))
    await device.publish("sensors/last", b"here", qos=1)
    device.abort()
    await until(lambda: len(broker.frames("telemetry-out")) == 2, what="the will")
    await watcher.wait_messages(2)
    await sidecar.stats()
    frames = broker.frames("telemetry-out")
    assert [(frame.payload, frame.will) for frame in frames] == [(b"here", False), (b"gone", True)]
    will = frames[1]
    assert (will.client_id, will.topic, will.qos, will.retain, will.clean_session) == (
        "dev-1",
        "sensors/last",
        qos,
        True,
        False,
    )
    assert (await sidecar.stats())["wills", "telemetry-out"] == 1
    await watcher.drop()


async def test_a_will_is_exported_while_the_sidecar_is_away(broker: Mosquitto, sidecar: Sidecar) -> None:
    await sidecar.client.drop()
    device = await broker.connect("dev-1", will=("sensors/last", b"gone", 1, False))
    device.abort()
    await until(lambda: broker.payloads("telemetry-out") == [b"gone"], what="the will")
    again = await Sidecar.connect(broker)
    await again.stats()
    assert len(broker.frames("telemetry-out")) == 1
    await again.client.drop()


async def test_a_clean_disconnect_leaves_no_will(broker: Mosquitto, sidecar: Sidecar) -> None:
    device = await broker.connect("dev-1", will=("sensors/last", b"gone", 1, False))
    await device.disconnect()
    await broker.gone("dev-1")
    assert await sidecar.results(Operation(DELIVER, 0, b"dev-1", b"a", b"", b"")) != [DELIVERED]
    assert broker.frames("telemetry-out") == []


async def test_a_private_will(broker: Mosquitto, sidecar: Sidecar) -> None:
    target, spy = await broker.connect("dev-2"), await broker.connect("spy")
    await spy.subscribe(("sensors/#", 1))
    device = await broker.connect("dev-1", will=("sensors/p2p/dev-2", b"farewell", 1, True))
    device.abort()
    assert only(await target.wait_messages(1)).payload == b"farewell"
    await spy.ping()
    assert spy.messages == []
    (frame,) = broker.frames("telemetry-out")
    assert (frame.will, frame.retain, frame.client_id) == (True, False, "dev-1")
    await sidecar.stats()
    for client in (target, spy):
        await client.drop()


async def test_a_private_will_that_is_kept(broker: Mosquitto, sidecar: Sidecar) -> None:
    target = await broker.connect("dev-2")
    device = await broker.connect("dev-1", clean=False, will=("sensors/p2p/dev-2", b"farewell", 1, True))
    device.abort()
    await until(lambda: broker.payloads(".p2p") == [b"farewell"], what="the will")
    (frame,) = broker.frames(".p2p")
    assert (frame.will, frame.retain, frame.clean_session, frame.client_id) == (True, False, False, "dev-1")
    await sidecar.stats()
    await target.ping()
    assert target.messages == []
    assert broker.payloads("telemetry-out") == [b"farewell"]
    await target.drop()
