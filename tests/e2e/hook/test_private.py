"""P2P messages reach their client alone; the wills of clients are exported with the client's own id."""

import pytest

from tests.e2e.hook.mosquitto import DELIVERED, Mosquitto, Sidecar, only
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


async def test_p2p_waits_for_a_client_with_a_session(broker: Mosquitto) -> None:
    target = await broker.connect("dev-2", clean=False)
    await target.disconnect()
    await broker.gone("dev-2")
    sender = await broker.connect("dev-1")
    await sender.publish("sensors/p2p/dev-2", b"kept", qos=1)
    spy = await broker.connect("spy")
    await spy.subscribe(("sensors/#", 1))
    target = await broker.connect("dev-2", clean=False)
    assert only(await target.wait_messages(1)).payload == b"kept"
    await spy.ping()
    assert spy.messages == []
    for client in (target, spy, sender):
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
