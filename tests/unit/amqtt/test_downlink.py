"""What RocketMQ sends to devices: on a real broker, with a raw client."""

import asyncio
import time

import pytest
from amqtt.session import Session

from mq2mqtt.host import DELIVERY_TIMEOUT, Delivery, Outcome, Settled
from mq2mqtt.message import MqttMessage
from mq2mqtt_amqtt import outbox
from mq2mqtt_amqtt.outbox import STUCK_UNSETTLED, WINDOW
from mq2mqtt_amqtt.wire import BUFFER_HIGH
from tests.mqtt_client import PUBACK, PUBCOMP, PUBREC, PUBREL, Client, ack_packet, publish_packet
from tests.unit.amqtt.conftest import StartWorld
from tests.unit.amqtt.plugins import ACL
from tests.unit.amqtt.world import AUTH, World, until

DELIVERED = ("delivered", None)
SLOW = ("dropped", "slow_device")


async def test_nobody_subscribes(world: World) -> None:
    await world.client("dev")
    assert await world.publish("into/a").outcome() == ("no_subscriber", None)


@pytest.mark.parametrize(("message_qos", "granted", "qos"), [(0, 2, 0), (1, 0, 0), (1, 2, 1), (2, 1, 1), (2, 2, 2)])
async def test_qos_is_the_lower_of_message_and_subscription(
    world: World, message_qos: int, granted: int, qos: int
) -> None:
    device = await world.client("dev")
    await device.subscribe(("into/+", granted))
    receipt = world.publish("into/a", b"\x00payload", qos=message_qos)
    (message,) = await device.wait_messages(1)
    assert (message.topic, message.payload, message.qos) == ("into/a", b"\x00payload", qos)
    assert (message.retain, message.dup) == (False, False)
    assert await receipt.outcome() == DELIVERED
    assert receipt.handed == 1


async def test_overlapping_filters_give_one_copy_with_the_highest_qos(world: World) -> None:
    device = await world.client("dev")
    await device.subscribe(("into/#", 0), ("into/a", 1), ("+/a", 0), ("#", 0))
    assert await world.publish("into/a", b"1", qos=2).outcome() == DELIVERED
    assert await world.publish("into/b", b"2", qos=2).outcome() == DELIVERED
    await device.wait_messages(2)
    assert [(m.payload, m.qos) for m in device.messages] == [(b"1", 1), (b"2", 0)]


async def test_subscriptions_count_from_suback_to_unsuback(world: World) -> None:
    device = await world.client("dev")
    for _ in range(2):
        assert await world.publish("into/a").outcome() == ("no_subscriber", None)
        await device.subscribe(("into/a", 0))
        assert await world.publish("into/a").outcome() == DELIVERED
        await device.subscribe(("into/a", 1))
        assert await world.publish("into/a").outcome() == DELIVERED
        await device.unsubscribe("into/a")
    await device.wait_messages(4)
    # MQTT-3.8.4-3: the second SUBSCRIBE replaces the QoS of the first.
    assert [m.qos for m in device.messages] == [0, 1, 0, 1]


async def test_the_shown_topic_changes_only_what_receivers_see(world: World) -> None:
    device = await world.client("dev")
    await device.subscribe(("into/real", 1))
    assert await world.publish("into/shown", shown="into/real").outcome() == ("no_subscriber", None)
    assert await world.publish("into/real", shown="into/shown").outcome() == DELIVERED
    (message,) = await device.wait_messages(1)
    assert message.topic == "into/shown"


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_deliver_needs_no_subscription_and_keeps_the_qos(world: World, qos: int) -> None:
    device = await world.client("dev")
    receipt = world.deliver("dev", "into/p2p/dev", b"for you", qos=qos)
    (message,) = await device.wait_messages(1)
    assert (message.topic, message.payload, message.qos) == ("into/p2p/dev", b"for you", qos)
    assert await receipt.outcome() == DELIVERED
    assert world.deliver("nobody", "into/p2p/nobody").deliveries[0].reason == "not_persistent"


async def test_who_is_away(world: World) -> None:
    for client_id, clean, qos in (("clean", True, 1), ("qos0", False, 0)):
        device = await world.client(client_id, clean=clean)
        await device.subscribe(("into/a", qos))
        await device.disconnect()
        await until(lambda name=client_id: not world.host.is_online(name))  # type: ignore[misc]
    assert await world.publish("into/a").outcome() == ("no_subscriber", None)
    device = await world.client("persistent", clean=False)
    await device.subscribe(("into/a", 1))
    await device.disconnect()
    await until(lambda: not world.host.is_online("persistent"))
    assert await world.publish("into/a").outcome() == ("queued", None)
    assert await world.publish("into/a", qos=0).outcome() == ("no_subscriber", None)
    online = await world.client("online")
    await online.subscribe(("into/#", 1))
    assert await world.publish("into/a").outcome() == DELIVERED


async def test_a_persistent_session_misses_what_it_does_not_acknowledge(world: World) -> None:
    silent = await world.client("silent", clean=False, acknowledge=False)
    await silent.subscribe(("into/#", 1))
    clean = await world.client("clean", acknowledge=False)
    await clean.subscribe(("into/two", 1))
    late = world.publish("into/one", qos=2)
    both = world.publish("into/two")
    gone = world.publish("into/three")
    unacknowledged = world.publish("into/one", qos=0)
    private = world.deliver("silent", "into/p2p/silent")
    assert await unacknowledged.outcome() == DELIVERED
    await silent.wait_messages(4)
    assert not late.missed
    assert await late.outcome() == ("queued", None)
    assert await both.outcome() == ("queued", None)
    assert late.missed == both.missed == [("silent", 1)]
    assert await private.outcome() == SLOW
    silent.abort()
    assert await gone.outcome() == ("queued", None)
    assert gone.missed == [("silent", 1)]
    assert not unacknowledged.missed


async def test_what_a_connection_leaves_unacknowledged_is_missed(world: World) -> None:
    device = await world.client("dev", clean=False, acknowledge=False)
    await device.subscribe(("into/#", 2))
    receipts = [world.publish("into/a", qos=qos) for qos in (1, 2)]
    await device.wait_messages(2)
    device.abort()
    assert [await receipt.outcome() for receipt in receipts] == [("queued", None)] * 2
    assert [receipt.missed for receipt in receipts] == [[("dev", 1)], [("dev", 2)]]


async def test_what_a_session_may_not_receive_it_does_not_miss(start_world: StartWorld) -> None:
    world = await start_world(plugins={AUTH: {"allow_anonymous": True}, ACL: {}})
    device = await world.client("dev", clean=False)
    await device.subscribe(("into/#", 1))
    assert await world.publish("into/secret").outcome() == ("dropped", "not_authorized")
    await device.disconnect()
    await until(lambda: not world.host.is_online("dev"))
    assert await world.publish("into/secret").outcome() == ("dropped", "not_authorized")
    kept = world.publish("into/a")
    assert await kept.outcome() == ("queued", None)
    assert kept.missed == [("dev", 1)]


async def test_an_anonymous_session_misses_nothing(start_world: StartWorld) -> None:
    world = await start_world(plugins={"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}})
    device = await world.client("dev", clean=False, acknowledge=False)
    await device.subscribe(("into/#", 1))
    receipt = world.publish("into/a")
    await device.wait_messages(1)
    device.abort()
    assert await receipt.outcome() == ("dropped", "disconnected")
    assert await world.publish("into/a").outcome() == ("no_subscriber", None)


async def test_nothing_is_settled_before_the_last_acknowledgement(world: World) -> None:
    quick, late = await world.client("quick"), await world.client("late", acknowledge=False)
    for device in (quick, late):
        await device.subscribe(("into/#", 2))
    receipt = world.publish("into/a", qos=2)
    (message,) = await late.wait_messages(1)
    late.send(ack_packet(PUBREC, message.packet_id))
    await late.wait_packet(PUBREL, message.packet_id)
    await quick.wait_packet(PUBREL)
    await late.ping()
    assert not receipt.deliveries
    assert receipt.handed == 2
    late.send(ack_packet(PUBCOMP, message.packet_id))
    assert await receipt.outcome() == DELIVERED


async def test_order_of_the_calls_is_kept_and_the_window_is_bounded(world: World) -> None:
    device = await world.client("dev", acknowledge=False)
    await device.subscribe(("into/#", 1))
    receipts = [world.publish("into/a", b"%d" % n, qos=n % 2) for n in range(3 * WINDOW)]
    await device.wait(lambda: sum(m.qos for m in device.messages) == WINDOW, "a full window")
    await device.ping()
    assert sum(m.qos for m in device.messages) == WINDOW
    acknowledged = 0
    while acknowledged < len(receipts) // 2:
        inflight = [m for m in device.messages if m.qos]
        for message in inflight[acknowledged:]:
            device.send(ack_packet(PUBACK, message.packet_id))
        acknowledged = len(inflight)
        await device.ping()
    await device.wait_messages(len(receipts))
    assert [m.payload for m in device.messages] == [b"%d" % n for n in range(3 * WINDOW)]
    for receipt in receipts:
        assert await receipt.outcome() == DELIVERED


async def test_a_silent_device_is_settled_after_5_s_and_its_identifier_stays_taken(world: World) -> None:
    device = await world.client("dev", acknowledge=False)
    await device.subscribe(("into/#", 2))
    begin = time.monotonic()
    receipts = [world.publish("into/a", qos=qos) for qos in (1, 2)]
    assert [await receipt.outcome() for receipt in receipts] == [SLOW, SLOW]
    assert DELIVERY_TIMEOUT - 0.1 < time.monotonic() - begin < DELIVERY_TIMEOUT + 15
    first, second = (m.packet_id for m in device.messages)
    session = world.broker.sessions["dev"][0]
    session._packet_id = first - 1  # noqa: SLF001 - it would take 65 535 messages to come round
    third = world.publish("into/a", qos=1)
    await device.wait_messages(3)
    assert device.messages[2].packet_id not in (first, second)
    # Late answers: nothing is settled twice, and the QoS 2 exchange still comes to its end.
    device.send(ack_packet(PUBACK, first) + ack_packet(PUBREC, second))
    await device.wait_packet(PUBREL, second)
    device.send(ack_packet(PUBCOMP, second) + ack_packet(PUBACK, device.messages[2].packet_id))
    assert await third.outcome() == DELIVERED
    assert [len(receipt.deliveries) for receipt in receipts] == [1, 1]
    assert not session.inflight_out


async def test_messages_that_a_device_leaves_out_do_not_use_up_its_window(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "DELIVERY_TIMEOUT", 0.5)
    monkeypatch.setattr(outbox, "MAX_LEFT_OUT", WINDOW)
    device = await world.client("dev", acknowledge=False)
    # Too long for it, say: it never answers them, and goes on.
    left_out = [world.deliver("dev", "into/p2p/dev", b"long", qos=1 + n % 2) for n in range(WINDOW)]
    assert {await receipt.outcome() for receipt in left_out} == {SLOW}
    await device.wait_messages(WINDOW)
    monkeypatch.setattr(outbox, "DELIVERY_TIMEOUT", 20)
    for number in range(WINDOW, WINDOW + 3):
        receipt = world.deliver("dev", "into/p2p/dev", b"short")
        await device.wait_messages(number + 1)
        assert device.messages[-1].packet_id not in {m.packet_id for m in device.messages[:-1]}
        device.send(ack_packet(PUBACK, device.messages[-1].packet_id))
        assert await receipt.outcome() == DELIVERED
    # Their identifiers stay taken: it may answer yet.
    for message in device.messages[:WINDOW]:
        if message.qos == 1:
            device.send(ack_packet(PUBACK, message.packet_id))
        else:
            device.send(ack_packet(PUBREC, message.packet_id))
            await device.wait_packet(PUBREL, message.packet_id)
            device.send(ack_packet(PUBCOMP, message.packet_id))
    await device.ping()
    assert not world.broker.sessions["dev"][0].inflight_out
    assert [len(receipt.deliveries) for receipt in left_out] == [1] * WINDOW


async def test_a_device_that_leaves_out_too_many_messages_is_disconnected(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "DELIVERY_TIMEOUT", 0.3)
    monkeypatch.setattr(outbox, "MAX_LEFT_OUT", 3)
    monkeypatch.setattr(outbox, "WINDOW", 50)
    device = await world.client("dev", acknowledge=False)
    for _ in range(4):
        receipt = world.deliver("dev", "into/p2p/dev", b"long")
        assert await receipt.outcome() == SLOW
    monkeypatch.setattr(outbox, "DELIVERY_TIMEOUT", 20)
    receipt = world.deliver("dev", "into/p2p/dev", b"short")
    await device.wait_messages(5)
    device.send(ack_packet(PUBACK, device.messages[-1].packet_id))
    assert await receipt.outcome() == DELIVERED
    await device.wait_closed()
    assert not world.broker.sessions.get("dev", (Session(), None))[0].inflight_out


async def test_a_cut_connection_settles_and_nothing_is_sent_again(world: World) -> None:
    device = await world.client("dev", acknowledge=False, clean=False)
    await device.subscribe(("into/#", 1))
    receipt = world.publish("into/a", qos=1)
    await device.wait_messages(1)
    device.abort()
    assert await receipt.outcome() == ("queued", None)
    assert not world.broker.sessions["dev"][0].inflight_out
    again = await world.client("dev", clean=False)
    assert await world.publish("into/a", b"new", qos=1).outcome() == DELIVERED
    assert [m.payload for m in again.messages] == [b"new"]


async def test_amqtts_own_messages_share_the_packet_identifiers(world: World) -> None:
    device = await world.client("dev", acknowledge=False)
    await device.subscribe(("#", 1))
    other = await world.client("other")
    receipts = []
    for number in range(20):
        await other.publish("plain", b"%d" % number, qos=1)
        receipts.append(world.publish("into/a", b"ours", qos=1))
    await device.wait_messages(40)
    assert len({m.packet_id for m in device.messages}) == 40
    for message in device.messages:
        device.send(ack_packet(PUBACK, message.packet_id))
    for receipt in receipts:
        assert await receipt.outcome() == DELIVERED
    session = world.broker.sessions["dev"][0]
    await until(lambda: not session.inflight_out)


async def _stuck(world: World) -> tuple[Client, Client]:
    stuck, healthy = await world.client("stuck", keep_alive=0), await world.client("healthy")
    await stuck.subscribe(("into/#", 0))
    await healthy.subscribe(("into/#", 1))
    stuck.stop_reading()
    return stuck, healthy


async def test_a_device_that_does_not_read_holds_up_nobody_and_no_memory(world: World) -> None:
    stuck, healthy = await _stuck(world)
    payload = bytes(60_000)
    for number in range(200):
        begin = time.monotonic()
        world.publish("into/a", payload, qos=1)
        await healthy.wait_messages(number + 1)
        assert time.monotonic() - begin < DELIVERY_TIMEOUT
    assert world.buffered("stuck") <= BUFFER_HIGH + len(payload) + 100
    only = world.deliver("stuck", "into/p2p/stuck", payload, qos=0)
    assert await only.outcome() == SLOW
    await stuck.drop()
    await until(lambda: world.intake.told("stuck") == ["connect", "tcpclean"])


async def test_a_stuck_device_is_refused_more_until_it_moves_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "DELIVERY_TIMEOUT", 20)
    stuck, healthy = await _stuck(world)
    while True:  # until neither system's buffers take more
        receipt = world.deliver("stuck", "into/p2p/stuck", bytes(100_000), qos=0)
        await asyncio.sleep(0)
        if not receipt.deliveries:
            break
    waiting = [world.deliver("stuck", "into/p2p/stuck", qos=1) for _ in range(STUCK_UNSETTLED + 1)]
    await asyncio.sleep(1.5)
    at_once = world.deliver("stuck", "into/p2p/stuck", qos=1)
    if not at_once.deliveries:  # the first look may still see what the system took meanwhile
        await asyncio.sleep(1.5)
        at_once = world.deliver("stuck", "into/p2p/stuck", qos=1)
    assert [d.reason for d in at_once.deliveries] == ["slow_device"]
    assert await world.deliver("healthy", "into/p2p/healthy", qos=1).outcome() == DELIVERED
    stuck.resume_reading()
    for pending in waiting:
        assert await pending.outcome() in (DELIVERED, SLOW)
    assert await world.deliver("stuck", "into/p2p/stuck", qos=1).outcome() == DELIVERED
    assert healthy.messages


async def test_a_burst_to_a_device_that_never_acknowledges_is_given_up_before_its_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "DELIVERY_TIMEOUT", 10)
    await world.client("mute", acknowledge=False)
    burst = [world.deliver("mute", "into/p2p/mute", qos=1) for _ in range(STUCK_UNSETTLED + 500)]
    for receipt in burst[STUCK_UNSETTLED:]:
        assert await receipt.outcome() == SLOW
    # Seconds before `DELIVERY_TIMEOUT`, which the others have.
    assert not any(receipt.deliveries for receipt in burst[:STUCK_UNSETTLED])
    for receipt in burst[:STUCK_UNSETTLED]:
        assert await receipt.outcome() == SLOW


async def test_a_device_that_does_not_move_while_the_bridge_is_held_up_is_not_stuck(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "DELIVERY_TIMEOUT", 20)
    await world.client("mute", acknowledge=False)
    burst = [world.deliver("mute", "into/p2p/mute", qos=1) for _ in range(STUCK_UNSETTLED + 50)]
    await asyncio.sleep(0.3)
    burst.append(world.deliver("mute", "into/p2p/mute", qos=1))
    time.sleep(2)  # noqa: ASYNC251 - the machine has other things to do
    await asyncio.sleep(0.1)
    assert not any(receipt.deliveries for receipt in burst)
    assert await burst[-1].outcome() == SLOW


@pytest.mark.parametrize("p2p", [True, False])
async def test_what_is_kept_for_a_stuck_device_is_given_up_in_the_order_of_the_calls(
    world: World, monkeypatch: pytest.MonkeyPatch, *, p2p: bool
) -> None:
    monkeypatch.setattr(outbox, "DELIVERY_TIMEOUT", 15)
    device = await world.client("mute", clean=False, acknowledge=False)
    await device.subscribe(("into/#", 1))
    kept: list[int] = []

    def publish(number: int) -> None:
        def settled(_: Delivery) -> None:
            kept.append(number)

        def missed(_client_id: str, _qos: int, told: Settled) -> None:
            told(Delivery(Outcome.QUEUED))

        message = MqttMessage("into/a", b"%d" % number, clean_session=False)
        if p2p:
            world.host.deliver("mute", message, settled, handed=lambda: None)
        else:
            world.host.publish(message, settled, handed=lambda: None, missed=missed)

    burst = STUCK_UNSETTLED + 500
    for number in range(burst):
        publish(number)
    # All of it, seconds before `DELIVERY_TIMEOUT`; what comes then follows at once.
    await until(lambda: bool(kept))
    assert kept == list(range(burst))
    publish(burst)
    assert kept[-1] == burst
    # It moves again: what comes now waits for its acknowledgement.
    await device.wait_messages(1)
    device.send(ack_packet(PUBACK, device.messages[0].packet_id))
    await device.ping()
    publish(burst + 1)
    assert kept == list(range(burst + 1))
    for number in range(burst + 2, 2 * burst):
        publish(number)
    device.abort()
    await until(lambda: not world.host.is_online("mute"))
    assert kept == list(range(2 * burst))


async def test_a_burst_to_an_idle_but_healthy_device_arrives_whole(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough for 3000 messages on a busy machine.
    monkeypatch.setattr(outbox, "DELIVERY_TIMEOUT", 60)
    device = await world.client("dev")
    await device.subscribe(("into/#", 1))
    assert await world.publish("into/a", qos=1).outcome() == DELIVERED
    await asyncio.sleep(1.5)
    receipts = [world.publish("into/a", b"%d" % n, qos=1) for n in range(3000)]
    for receipt in receipts:
        assert await receipt.outcome() == DELIVERED
    assert [m.payload for m in device.messages[1:]] == [b"%d" % n for n in range(3000)]


async def test_who_may_not_receive_does_not(start_world: StartWorld) -> None:
    world = await start_world(plugins={AUTH: {"allow_anonymous": True}, ACL: {}})
    device = await world.client("dev")
    await device.subscribe(("into/#", 1))
    receipts = [world.publish(topic, qos=1) for topic in ("into/a", "into/secret", "into/b")]
    # P2P names its receiver, who needs no permission.
    private = world.deliver("dev", "into/p2p/secret", qos=1)
    outcomes = [await receipt.outcome() for receipt in receipts]
    assert outcomes == [DELIVERED, ("dropped", "not_authorized"), DELIVERED]
    assert await private.outcome() == DELIVERED
    assert [m.topic for m in device.messages] == ["into/a", "into/b", "into/p2p/secret"]


async def test_a_device_that_never_reads_its_acknowledgements_is_not_read_either(world: World) -> None:
    device = await world.client("dev", keep_alive=0)
    device.stop_reading()
    while world.buffered("dev") <= BUFFER_HIGH:  # until neither system's buffers take more
        world.deliver("dev", "into/p2p/dev", bytes(100_000), qos=0)
        await asyncio.sleep(0)
    for _ in range(30):
        device.send(b"".join(publish_packet("lane/a", b"", qos=1, packet_id=n) for n in range(1, 10_001)))
    lane = world.intake.lane("lane")
    count = -1
    while count < len(lane):
        count = len(lane)
        await asyncio.sleep(1)
    assert 0 < count < 200_000
    assert world.buffered("dev") < 3 * BUFFER_HIGH
