"""What devices publish: on a real broker, with a raw client."""

import asyncio
import gc
from typing import Any

import pytest

from mq2mqtt_amqtt import publishes
from mq2mqtt_amqtt.publishes import PAUSE_AT
from tests.mqtt_client import (
    PUBACK,
    PUBCOMP,
    PUBREC,
    PUBREL,
    Client,
    ack_packet,
    connect_packet,
    packet,
    publish_packet,
)
from tests.unit.amqtt.conftest import StartWorld
from tests.unit.amqtt.plugins import ACL, LISTENER, Listener, SlowAcl
from tests.unit.amqtt.world import AUTH, World, until


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_publish_is_in_the_lane_before_its_acknowledgement(world: World, qos: int) -> None:
    device = await world.client("dev", clean=False)
    await device.publish("lane/a/b", b"\x00\xff", qos=qos)
    (message,) = world.intake.lane("lane")
    assert (message.topic, message.payload, message.qos) == ("lane/a/b", b"\x00\xff", qos)
    assert (message.client_id, message.clean_session, message.retain) == ("dev", False, False)


@pytest.mark.parametrize("qos", [1, 2])
async def test_what_the_lane_has_not_taken_is_not_acknowledged(world: World, qos: int) -> None:
    device = await world.client("dev")
    world.intake.full.add("lane")
    device.send(publish_packet("lane/a", b"1", qos=qos, packet_id=7))
    if qos == 2:
        await device.wait_packet(PUBREC, 7)
        device.send(ack_packet(PUBREL, 7))
    await device.ping()
    assert not device.packets
    world.intake.make_space()
    await device.wait_packet(PUBACK if qos == 1 else PUBCOMP, 7)
    assert [m.payload for m in world.intake.lane("lane")] == [b"1"]


async def test_order_of_a_client_is_kept_over_all_qos(world: World) -> None:
    device = await world.client("dev")
    for number in range(1, 301):
        device.send(publish_packet("lane/a", b"%d" % number, qos=number % 2, packet_id=number))
    await device.wait(lambda: len(device.packets) == 150, "150 PUBACK")
    assert [m.payload for m in world.intake.lane("lane")] == [b"%d" % n for n in range(1, 301)]
    assert [p.packet_id for p in device.packets] == list(range(1, 301, 2))


async def test_a_full_lane_leaves_other_topics_of_the_same_client_alone(world: World) -> None:
    device = await world.client("dev")
    world.intake.full.add("lane1")
    device.send(publish_packet("lane1/a", b"1", qos=1, packet_id=1))
    await device.publish("lane2/a", b"2", qos=1)
    await device.publish("elsewhere", b"3", qos=2)
    assert [m.payload for m in world.intake.lane("lane2")] == [b"2"]
    assert not world.intake.lane("lane1")


async def test_reading_pauses_at_256_waiting_publishes_and_resumes(world: World) -> None:
    device = await world.client("dev", keep_alive=3)
    world.intake.full.add("lane")
    for number in range(1, 1001):
        device.send(publish_packet("lane/a", b"%d" % number, qos=1, packet_id=number))
    await until(lambda: len(world.intake.waiting) >= PAUSE_AT)
    # Longer than its keep-alive allows: who is not read cannot be heard.
    await asyncio.sleep(5)
    assert len(world.intake.waiting) == PAUSE_AT
    assert world.host.is_online("dev")
    world.intake.make_space()
    await device.wait(lambda: len(device.packets) == 1000, "1000 PUBACK")
    assert [m.payload for m in world.intake.lane("lane")] == [b"%d" % n for n in range(1, 1001)]


async def test_a_client_that_leaves_while_reading_is_paused_is_offline(world: World) -> None:
    device = await world.client("dev")
    world.intake.full.add("lane")
    device.send(b"".join(publish_packet("lane/a", b"x", qos=1, packet_id=n) for n in range(1, PAUSE_AT + 1)))
    await until(lambda: len(world.intake.waiting) >= PAUSE_AT)
    await device.drop()
    await until(lambda: world.intake.told("dev") == ["connect", "tcpclean"])
    assert all(future.cancelled() for _, future in world.intake.waiting)


async def test_what_waits_is_given_up_when_its_connection_is_lost(world: World) -> None:
    device = await world.client("dev")
    world.intake.full.add("lane")
    device.send(publish_packet("lane/a", b"1", qos=1, packet_id=1))
    await until(lambda: bool(world.intake.waiting))
    device.abort()
    await until(world.intake.waiting[0][1].cancelled)
    world.intake.make_space()
    assert not world.intake.lane("lane")


async def test_a_retained_publish_is_exported_once_and_still_retained(world: World) -> None:
    device = await world.client("dev")
    await device.publish("lane/state", b"on", qos=1, retain=True)
    reader = await world.client("reader")
    await reader.subscribe(("lane/#", 1))
    (message,) = await reader.wait_messages(1)
    assert (message.payload, message.retain) == (b"on", True)
    (exported,) = world.intake.lane("lane")
    assert exported.retain


async def test_subscribers_in_the_broker_get_what_is_exported(world: World) -> None:
    reader = await world.client("reader")
    await reader.subscribe(("lane/+", 1))
    device = await world.client("dev")
    for number in range(600):
        device.send(publish_packet("lane/a", b"%d" % number, qos=1, packet_id=number + 1))
    # A clean end right behind the publishes must not cut off what was acknowledged.
    await device.wait(lambda: len(device.packets) == 600, "600 PUBACK")
    await device.disconnect()
    await reader.wait_messages(600)
    assert [m.payload for m in reader.messages] == [b"%d" % n for n in range(600)]
    assert len(world.intake.lane("lane")) == 600


async def test_who_publishes_faster_than_amqtt_routes_is_slowed_down(world: World) -> None:
    reader, device = await world.client("reader"), await world.client("dev")
    await reader.subscribe(("lane/a", 0))
    peak = 0
    queue = world.broker._broadcast_queue  # noqa: SLF001 - amqtt's own
    for start in range(0, 10_000, 1000):
        device.send(b"".join(publish_packet("lane/a", b"%d" % n) for n in range(start, start + 1000)))
        await asyncio.sleep(0)
        peak = max(peak, queue.qsize())
    await until(lambda: len(reader.messages) == 10_000)
    assert peak <= queue.maxsize
    assert [m.payload for m in reader.messages] == [b"%d" % n for n in range(10_000)]


@pytest.mark.parametrize("topic", ["$SYS/broker/x", "$own/a", "lane/+/a", "lane/#", "", "lane/\0"])
async def test_topics_that_mqtt_forbids_close_the_connection_and_reach_no_lane(world: World, topic: str) -> None:
    device = await world.client("dev")
    device.send(publish_packet(topic, b"x", qos=1, packet_id=1))
    await device.wait_closed()
    await until(lambda: world.intake.told("dev") == ["connect", "tcpclean"])
    assert not device.packets
    assert not world.intake.lanes


@pytest.mark.parametrize(
    "garbage",
    [
        packet(0x36, b"\x00\x01a\x00\x01x"),
        packet(0x32, b"\x00\x01a\x00\x00x"),
        packet(0x32, b"\x00\x09a"),
        packet(0x32, b"\x00\x01a"),
        packet(0x30, b"\x00\x01\xff"),
        packet(0x40, b"\x00"),
        packet(0x62, b""),
        packet(0x82, b"\x00"),
        packet(0xF0, b""),
        packet(0x20, b"\x00\x00"),
        b"\x30\xff\xff\xff\xff\x7f",
    ],
)
async def test_malformed_packets_close_that_connection_only(world: World, garbage: bytes) -> None:
    device, other = await world.client("dev"), await world.client("other")
    device.send(garbage)
    await device.wait_closed()
    await other.publish("lane/a", b"x", qos=1)


@pytest.mark.parametrize("topic", ["$SYS/enableOrderMsg", "$SYS/getOfflineMsg"])
@pytest.mark.parametrize("plugins", [{}, {ACL: {}}])
async def test_what_clients_of_apsaramq_ask_for_is_acknowledged_and_swallowed(
    start_world: StartWorld, topic: str, plugins: dict[str, Any]
) -> None:
    world = await start_world(plugins={AUTH: {"allow_anonymous": True}, **plugins})
    device = await world.client("dev")
    for qos in (0, 1, 2):
        await device.publish(topic, b'{"maxPushNum":30}', qos=qos)
    assert not world.intake.lanes
    assert world.host.is_online("dev")


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_what_the_acl_forbids_reaches_nobody(start_world: StartWorld, qos: int) -> None:
    SlowAcl.asked.clear()
    world = await start_world(plugins={AUTH: {"allow_anonymous": True}, ACL: {}})
    device, reader = await world.client("dev"), await world.client("reader")
    await reader.subscribe(("#", 1))
    await device.publish("lane/forbidden", b"no", qos=qos)
    await device.publish("lane/allowed", b"yes", qos=1)
    (message,) = await reader.wait_messages(1)
    assert message.topic == "lane/allowed"
    assert [m.topic for m in world.intake.lane("lane")] == ["lane/allowed"]
    assert [topic for action, topic in SlowAcl.asked if action == "publish"] == ["lane/forbidden", "lane/allowed"]


async def test_order_is_kept_while_the_acl_thinks(start_world: StartWorld) -> None:
    world = await start_world(plugins={AUTH: {"allow_anonymous": True}, ACL: {"delay": 0.05}})
    device = await world.client("dev")
    topics = ["lane/slow", "lane/quick"] * 10
    for number, topic in enumerate(topics, 1):
        device.send(publish_packet(topic, b"%d" % number, qos=number % 2, packet_id=number))
    # A DISCONNECT right behind them: what came before it counts.
    await device.disconnect()
    await until(lambda: world.intake.told("dev")[-1:] == ["tcpclean"])
    assert [m.payload for m in world.intake.lane("lane")] == [b"%d" % n for n in range(1, 21)]


async def test_a_publish_over_the_limits_is_refused_like_a_forbidden_one(world: World) -> None:
    world.intake.max_payload = 4
    device = await world.client("dev")
    await device.publish("lane/a", b"12345", qos=1)
    await device.publish("lane/a", b"1234", qos=1)
    await device.publish("elsewhere", b"123456", qos=1)
    assert [m.payload for m in world.intake.lane("lane")] == [b"1234"]


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_p2p_is_exported_delivered_privately_and_never_routed_or_retained(world: World, qos: int) -> None:
    target, spy, device = await world.client("target"), await world.client("spy"), await world.client("dev")
    await spy.subscribe(("lane/#", 2))
    await target.subscribe(("lane/p2p/target", 2))
    await device.publish("lane/p2p/target", b"secret", qos=qos, retain=True)
    await device.publish("lane/open", b"", qos=1)
    await spy.wait_messages(1)
    assert [m.topic for m in spy.messages] == ["lane/open"]
    (exported, _) = world.intake.lane("lane")
    assert (exported.topic, exported.qos, exported.retain) == ("lane/p2p/target", qos, False)
    assert [(to, m.payload) for to, m in world.intake.private] == [("target", b"secret")]
    assert not target.messages
    assert not world.broker.retained_messages


async def test_p2p_under_an_inbound_parent_topic_is_private_but_not_exported(world: World) -> None:
    device = await world.client("dev")
    await device.publish("into/p2p/target", b"x", qos=1)
    assert [to for to, _ in world.intake.private] == ["target"]
    assert not world.intake.lanes


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("parent", ["into", "lane"])
async def test_p2p_is_acknowledged_when_it_is_kept(world: World, parent: str, qos: int) -> None:
    device = await world.client("dev", clean=False)
    world.intake.full.add("lane")
    world.intake.relay_is_full = True
    device.send(publish_packet(f"{parent}/p2p/target", b"x", qos=qos, packet_id=1))
    if qos == 2:
        await device.wait_packet(PUBREC, 1)
        device.send(ack_packet(PUBREL, 1))
    await device.ping()
    world.intake.make_space()
    await device.ping()
    assert not device.packets
    world.intake.keep_private()
    await device.wait_packet(PUBACK if qos == 1 else PUBCOMP, 1)
    assert [(to, m.payload) for to, m in world.intake.private] == [("target", b"x")]
    assert len(world.intake.lane("lane")) == (parent == "lane")


async def test_p2p_that_waits_to_be_kept_is_given_up_with_its_connection(world: World) -> None:
    device = await world.client("dev", clean=False)
    world.intake.relay_is_full = True
    device.send(publish_packet("into/p2p/target", b"x", qos=1, packet_id=1))
    await until(lambda: bool(world.intake.unkept))
    device.abort()
    await until(lambda: world.intake.told("dev") == ["connect", "tcpclean"])
    world.intake.keep_private()
    assert not world.intake.private


async def test_p2p_waits_for_the_lane(world: World) -> None:
    device = await world.client("dev")
    world.intake.full.add("lane")
    device.send(publish_packet("lane/p2p/target", b"x", qos=1, packet_id=1))
    await device.ping()
    assert not world.intake.private
    world.intake.make_space()
    await device.wait_packet(PUBACK, 1)
    assert [to for to, _ in world.intake.private] == ["target"]


async def test_an_unknown_pubrel_is_answered(world: World) -> None:
    device = await world.client("dev")
    device.send(ack_packet(PUBREL, 99))
    await device.wait_packet(PUBCOMP, 99)


async def test_qos_2_sent_again_before_pubrel_is_exported_once(world: World) -> None:
    device = await world.client("dev")
    for dup in (False, True, True):
        device.send(publish_packet("lane/a", b"once", qos=2, packet_id=5, dup=dup))
        await device.wait_packet(PUBREC, 5)
    device.send(ack_packet(PUBREL, 5) + ack_packet(PUBREL, 5))
    await device.wait_packet(PUBCOMP, 5)
    await device.wait_packet(PUBCOMP, 5)
    assert [m.payload for m in world.intake.lane("lane")] == [b"once"]


async def test_qos_2_of_a_persistent_session_survives_the_connection(world: World) -> None:
    device = await world.client("dev", clean=False)
    world.intake.full.add("lane")
    device.send(publish_packet("lane/a", b"kept", qos=2, packet_id=5))
    await device.wait_packet(PUBREC, 5)
    device.send(ack_packet(PUBREL, 5))
    await until(lambda: bool(world.intake.waiting))
    device.abort()
    await until(world.intake.waiting[0][1].cancelled)
    world.intake.make_space()
    again = await world.client("dev", clean=False)
    again.send(ack_packet(PUBREL, 5))
    await again.wait_packet(PUBCOMP, 5)
    assert [m.payload for m in world.intake.lane("lane")] == [b"kept"]


@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_UNRELEASED", 3), ("MAX_UNRELEASED_BYTES", 3 * len("lane/a" + "kept 1"))]
)
async def test_too_much_without_pubrel_closes_the_connection_and_loses_nothing_acknowledged(
    world: World, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(publishes, limit, value)
    kept = [publish_packet("lane/a", b"kept %d" % number, qos=2, packet_id=number) for number in (1, 2, 3)]
    one_more = publish_packet("lane/a", b"4", qos=2, packet_id=4)
    device = await world.client("dev", clean=False)
    device.send(b"".join(kept))
    await device.wait(lambda: len(device.packets) == 3, "3 PUBREC")
    device.send(one_more)
    await device.wait_closed()
    assert [p.packet_id for p in device.packets] == [1, 2, 3]
    # They still count when it is back, and are the same messages when it sends them again.
    again = await world.client("dev", clean=False)
    again.send(b"".join(kept) + one_more)
    await again.wait_closed()
    assert [p.packet_id for p in again.packets] == [1, 2, 3]
    # With PUBREL there is room.
    last = await world.client("dev", clean=False)
    last.send(b"".join(ack_packet(PUBREL, number) for number in (1, 2, 3)) + one_more)
    await last.wait_packet(PUBREC, 4)
    last.send(ack_packet(PUBREL, 4))
    await last.wait_packet(PUBCOMP, 4)
    assert [m.payload for m in world.intake.lane("lane")] == [b"kept 1", b"kept 2", b"kept 3", b"4"]


async def test_one_qos_2_message_is_held_however_large(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishes, "MAX_UNRELEASED_BYTES", 100)
    device = await world.client("dev")
    for number in (1, 2):
        for dup in (False, True):
            device.send(publish_packet("lane/a", b"x" * 1000, qos=2, packet_id=number, dup=dup))
            await device.wait_packet(PUBREC, number)
        device.send(ack_packet(PUBREL, number))
        await device.wait_packet(PUBCOMP, number)
    assert len(world.intake.lane("lane")) == 2


async def test_a_qos_2_message_that_grows_when_it_is_sent_again_counts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishes, "MAX_UNRELEASED_BYTES", 100)
    device = await world.client("dev")
    for number in (1, 2):
        device.send(publish_packet("lane/a", b"", qos=2, packet_id=number))
    await device.wait_packet(PUBREC, 2)
    device.send(publish_packet("lane/a", b"x" * 1000, qos=2, packet_id=1, dup=True))
    await device.wait_closed()


async def test_released_qos_2_messages_wait_for_their_lane_whatever_their_size(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishes, "MAX_UNRELEASED_BYTES", 100)
    world.intake.full.add("lane")
    device = await world.client("dev", clean=False)
    for number in (1, 2, 3):
        device.send(publish_packet("lane/a", b"%d" % number * 90, qos=2, packet_id=number) + ack_packet(PUBREL, number))
    await until(lambda: len(world.intake.waiting) == 3)
    device.abort()
    await until(world.intake.waiting[2][1].cancelled)
    world.intake.make_space()
    # More than fits, and without PUBREL again: the client may send all of it again.
    again = await world.client("dev", clean=False)
    for number in (1, 2, 3):
        again.send(publish_packet("lane/a", b"%d" % number * 90, qos=2, packet_id=number, dup=True))
    await again.wait_packet(PUBREC, 3)
    again.send(b"".join(ack_packet(PUBREL, number) for number in (1, 2, 3)))
    await again.wait_packet(PUBCOMP, 3)
    assert [m.payload[:1] for m in world.intake.lane("lane")] == [b"1", b"2", b"3"]


async def test_qos_1_sent_again_is_accepted_again(world: World) -> None:
    device = await world.client("dev")
    device.send(publish_packet("lane/a", b"x", qos=1, packet_id=1))
    device.send(publish_packet("lane/a", b"x", qos=1, packet_id=1, dup=True))
    await device.wait(lambda: [p.kind for p in device.packets] == [PUBACK, PUBACK], "2 PUBACK")
    assert len(world.intake.lane("lane")) == 2


async def test_plugins_hear_what_amqtt_would_tell_them(start_world: StartWorld) -> None:
    Listener.heard.clear()
    world = await start_world(plugins={AUTH: {"allow_anonymous": True}, ACL: {}, LISTENER: {}})
    device = await world.client("dev")
    await device.publish("lane/a", b"x", qos=1)
    await device.publish("lane/forbidden", b"x", qos=1)
    await device.publish("lane/p2p/t", b"x", qos=2)
    world.deliver("dev", "lane/p2p/dev", qos=1)
    await device.wait_messages(1)
    await until(lambda: ("packet in", "PubackPacket") in Listener.heard)
    assert ("broadcast", ("dev", "lane/a")) in Listener.heard
    for topic in ("lane/a", "lane/forbidden", "lane/p2p/t"):
        assert Listener.heard.count(("received", ("dev", topic))) == 1
    for topic in ("lane/forbidden", "lane/p2p/t"):
        assert ("broadcast", ("dev", topic)) not in Listener.heard
    for name in ("PubackPacket", "PubrecPacket", "PubcompPacket", "PublishPacket", "ConnackPacket"):
        assert ("packet out", name) in Listener.heard


async def test_the_fast_path_makes_no_task_for_a_message(world: World) -> None:
    device = await world.client("dev")
    await device.publish("lane/a", b"x", qos=1)
    made: list[str] = []
    loop = asyncio.get_running_loop()

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> "asyncio.Task[Any]":  # noqa: ANN401
        made.append(repr(coro))
        return asyncio.Task(coro, loop=loop, **options)

    loop.set_task_factory(factory)
    try:
        for number in range(2, 202):
            device.send(publish_packet("lane/a", b"x", qos=1, packet_id=number))
        await device.wait_packet(PUBACK, 201)
        await asyncio.sleep(0.3)  # amqtt's routing would come behind the acknowledgement
    finally:
        loop.set_task_factory(None)
    broker_tasks = [name for name in made if "mqtt_client" not in name and "wait" not in name]
    assert len(broker_tasks) < 20, broker_tasks


async def test_nothing_of_a_connection_stays_behind(world: World) -> None:
    device = await world.client("dev")
    await device.publish("lane/a", b"x", qos=2)
    await device.disconnect()
    await until(lambda: world.intake.told("dev")[-1:] == ["tcpclean"])
    await until(lambda: not world.broker.sessions)
    gc.collect()
    names = [task.get_name() for task in asyncio.all_tasks()]
    assert not [name for name in names if "[dev]" in name]


async def test_a_publish_in_the_same_segment_as_connect_is_taken(world: World) -> None:
    early = await Client.open(world.port)
    world.clients.append(early)
    early.send(connect_packet("early") + publish_packet("lane/a", b"x", qos=1, packet_id=1) + b"\xe0\x00")
    await early.wait_packet(PUBACK, 1)
    await until(lambda: world.intake.told("early") == ["connect", "disconnect", "tcpclean"])
    assert len(world.intake.lane("lane")) == 1
