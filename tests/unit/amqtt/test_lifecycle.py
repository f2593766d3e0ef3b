"""Clients come and go: on a real broker, with a raw client."""

import asyncio
import contextlib
import re
import socket
import ssl
import time
from pathlib import Path

import pytest

from mq2mqtt_amqtt import lifecycle
from tests.certificates import Authority
from tests.mqtt_client import CONNACK, PUBLISH, Client, connect_packet
from tests.unit.amqtt.conftest import StartWorld
from tests.unit.amqtt.plugins import ACL, CRASH, GATE, OPEN, WRONG
from tests.unit.amqtt.world import AUTH, World, until

DELIVERED = ("delivered", None)


async def test_a_clean_logout_gives_connect_disconnect_tcpclean(world: World) -> None:
    before = time.time_ns() // 1_000_000
    device = await world.client("dev")
    address = device.address
    assert world.host.is_online("dev")
    assert world.host.connected_clients == 1
    await device.disconnect()
    await until(lambda: world.intake.told("dev") == ["connect", "disconnect", "tcpclean"])
    events = world.intake.events
    assert {event.client_ip for event in events} == {address}
    (channel,) = {event.channel_id for event in events}
    assert re.fullmatch("[0-9a-f]{32}", channel)
    assert before <= events[0].time_ms <= events[1].time_ms <= events[2].time_ms
    assert world.host.connected_clients == 0


@pytest.mark.parametrize("start", [b"", connect_packet("dev")[:8], b"GET / HTTP/1.1\r\n\r\n"])
async def test_a_connection_without_connect_is_closed(
    world: World, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(lifecycle, "CONNECT_SECONDS", 0.2)
    silent = await Client.open(world.port)
    silent.send(start)
    await silent.wait_closed()
    await until(lambda: world.open_connections == 0)
    await silent.drop()


async def test_a_lost_connection_gives_connect_tcpclean_and_the_next_one_is_another_channel(world: World) -> None:
    for clean in (True, False):
        device = await world.client("dev", clean=clean)
        device.abort()
        await until(lambda: not world.host.is_online("dev") and world.intake.told("dev")[-1] == "tcpclean")
    assert world.intake.told("dev") == ["connect", "tcpclean"] * 2
    assert len({event.channel_id for event in world.intake.events}) == 2
    assert len({event.client_ip for event in world.intake.events}) == 2


@pytest.mark.parametrize("will", [None, ("lane/will", b"gone", 1, False)])
@pytest.mark.parametrize("clean", [True, False])
async def test_take_over_closes_the_old_connection_before_the_new_one_is_told(
    world: World, *, clean: bool, will: tuple[str, bytes, int, bool] | None
) -> None:
    old = await world.client("dev", clean=clean, will=will)
    await old.subscribe(("into/#", 1))
    new = await world.client("dev", clean=clean)
    await old.wait_closed()
    assert world.intake.told("dev") == ["connect", "tcpclean", "connect"]
    first, second, third = (event.channel_id for event in world.intake.events)
    assert first == second != third
    assert [event.client_ip for event in world.intake.events] == [old.address, old.address, new.address]
    assert [m.payload for m in world.intake.wills] == ([b"gone"] if will else [])
    assert world.host.is_online("dev")
    assert world.host.connected_clients == 1
    if clean:
        assert await world.publish("into/a").outcome() == ("no_subscriber", None)
        await new.subscribe(("into/#", 1))
    assert await world.publish("into/a", b"now").outcome() == DELIVERED
    other = await world.client("other")
    await other.publish("into/b", b"from amqtt", qos=1)
    await new.wait_messages(2)
    assert [m.payload for m in new.messages] == [b"now", b"from amqtt"]
    await new.publish("lane/a", b"x", qos=2)
    await new.disconnect()
    await until(lambda: world.intake.told("dev")[3:] == ["disconnect", "tcpclean"])


async def test_many_connections_with_one_client_id_leave_one(world: World) -> None:
    clients = [await Client.open(world.port) for _ in range(10)]
    world.clients.extend(clients)
    for number, client in enumerate(clients):
        client.send(connect_packet("dev", clean=number % 2 == 0))
    await until(lambda: sum(not client.closed.is_set() for client in clients) == 1)
    await until(lambda: world.intake.told("dev")[-1] == "connect")
    told = world.intake.told("dev")
    assert told == ["connect", "tcpclean"] * (len(told) // 2) + ["connect"]
    (survivor,) = [client for client in clients if not client.closed.is_set()]
    await survivor.subscribe(("into/#", 1))
    assert await world.publish("into/a").outcome() == DELIVERED


async def test_a_stuck_predecessor_is_cut(world: World) -> None:
    old = await world.client("dev", keep_alive=0)
    old.stop_reading()
    for _ in range(200):
        world.deliver("dev", "into/p2p/dev", bytes(60_000), qos=0)
    new = await world.client("dev")
    assert world.intake.told("dev") == ["connect", "tcpclean", "connect"]
    await new.ping()


async def test_keep_alive_is_enforced_at_one_and_a_half(world: World) -> None:
    device = await world.client("dev", keep_alive=1, will=("lane/will", b"silent", 1, False))
    alive = await world.client("alive", keep_alive=4)
    for _ in range(7):
        await asyncio.sleep(1)
        await alive.ping()
    await device.wait_closed()
    assert world.intake.told("dev") == ["connect", "tcpclean"]
    connected, closed = (event.time_ms for event in world.intake.events if event.client_id == "dev")
    assert closed - connected >= 1500
    assert [m.payload for m in world.intake.wills] == [b"silent"]
    assert world.host.is_online("alive")


async def test_kick_closes_and_tells(world: World) -> None:
    device = await world.client("dev")
    await world.host.kick("dev")
    await device.wait_closed()
    assert world.intake.told("dev") == ["connect", "tcpclean"]
    assert not world.host.is_online("dev")
    await world.host.kick("nobody")


async def test_failed_logins_give_no_events_and_leave_nothing(start_world: StartWorld) -> None:
    world = await start_world(plugins={GATE: {}})
    await world.client("dev", username="u", password=WRONG, code=5)
    assert not world.intake.events
    assert not world.broker.sessions
    crashed = await Client.open(world.port)
    world.clients.append(crashed)
    crashed.send(connect_packet("dev", username="u", password=CRASH))
    await crashed.wait_closed()
    assert not world.broker.sessions
    assert world.open_connections == 0


@pytest.mark.parametrize("clean", [True, False])
async def test_a_login_that_fails_does_not_disturb_the_real_client(start_world: StartWorld, *, clean: bool) -> None:
    world = await start_world(plugins={GATE: {}})
    device = await world.client("dev", clean=clean, username="real", password=OPEN)
    await device.subscribe(("into/#", 1))
    for password in (WRONG, None):
        for intruder_clean in (True, False):
            await world.client("dev", clean=intruder_clean, username="intruder", password=password, code=5)
    assert await world.publish("into/a").outcome() == DELIVERED
    assert world.intake.told("dev") == ["connect"]
    session = world.broker.sessions["dev"][0]
    assert (session.username, session.attributes["gate"]) == ("real", "real")
    assert (await device.subscribe(("more", 1))) == [1]


async def test_a_persistent_session_is_resumed_and_a_clean_one_never(world: World) -> None:
    first = await world.client("dev", clean=False)
    await first.subscribe(("into/#", 1))
    await first.disconnect()
    await until(lambda: not world.host.is_online("dev"))
    await asyncio.sleep(1.5)  # amqtt removes what it does not keep within a second
    again = await Client.open(world.port)
    world.clients.append(again)
    again.send(connect_packet("dev", clean=False))
    assert (await again.wait_packet(CONNACK)).body == b"\x01\x00"
    assert await world.publish("into/a").outcome() == DELIVERED
    await again.disconnect()
    await until(lambda: not world.host.is_online("dev"))
    for clean in (True, False):
        other = await Client.open(world.port)
        world.clients.append(other)
        other.send(connect_packet("dev", clean=clean))
        assert (await other.wait_packet(CONNACK)).body == b"\x00\x00"
        assert await world.publish("into/a").outcome() == ("no_subscriber", None)
        assert world.broker.sessions["dev"][0].clean_session is clean
        await other.disconnect()
        await until(lambda: not world.host.is_online("dev"))


async def test_the_flag_of_a_message_is_that_of_its_connections_connect(world: World) -> None:
    for clean in (False, True, False):
        device = await world.client("dev", clean=clean)
        await device.publish("lane/a", b"x", qos=1)
        assert world.intake.lane("lane")[-1].clean_session is clean
        await device.disconnect()
        await until(lambda: not world.host.is_online("dev"))


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_will_is_exported_routed_and_retained(world: World, qos: int) -> None:
    reader = await world.client("reader")
    await reader.subscribe(("lane/#", 2))
    device = await world.client("dev", clean=False, will=("lane/will", b"gone", qos, True))
    await device.publish("lane/last", b"last words", qos=1)
    device.abort()
    await reader.wait_messages(2)
    assert [m.payload for m in reader.messages] == [b"last words", b"gone"]
    will = world.intake.lane("lane")[-1]
    assert (will.topic, will.payload, will.qos, will.retain) == ("lane/will", b"gone", qos, True)
    assert (will.client_id, will.clean_session) == ("dev", False)
    assert world.broker.retained_messages["lane/will"].data == b"gone"
    assert world.intake.wills == [will]


async def test_no_will_after_disconnect(world: World) -> None:
    device = await world.client("dev", will=("lane/will", b"gone", 1, False))
    await device.disconnect()
    await until(lambda: world.intake.told("dev")[-1] == "tcpclean")
    assert not world.intake.wills


async def test_the_will_is_that_of_this_connection_alone(world: World) -> None:
    first = await world.client("dev", clean=False, will=("lane/will", b"first", 1, False))
    second = await world.client("dev", clean=False)
    await first.wait_closed()
    second.abort()
    await until(lambda: world.intake.told("dev")[-1] == "tcpclean" and len(world.intake.events) == 4)
    assert [m.payload for m in world.intake.wills] == [b"first"]


async def test_a_p2p_will_goes_to_its_target_alone(world: World) -> None:
    spy = await world.client("spy")
    await spy.subscribe(("#", 1))
    device = await world.client("dev", will=("lane/p2p/target", b"gone", 1, True))
    device.abort()
    await until(lambda: bool(world.intake.private))
    assert [(to, m.payload, m.retain) for to, m in world.intake.private] == [("target", b"gone", False)]
    assert [m.topic for m in world.intake.lane("lane")] == ["lane/p2p/target"]
    await spy.ping()
    assert not spy.messages
    assert not world.broker.retained_messages


async def test_a_p2p_will_waits_to_be_kept(world: World) -> None:
    world.intake.full.add("lane")
    world.intake.relay_is_full = True
    device = await world.client("dev", clean=False, will=("lane/p2p/target", b"gone", 1, False))
    device.abort()
    await until(lambda: world.intake.told("dev") == ["connect", "tcpclean"])
    world.intake.make_space()
    await until(lambda: bool(world.intake.unkept))
    world.intake.keep_private()
    assert [(to, m.payload, m.clean_session) for to, m in world.intake.private] == [("target", b"gone", False)]


async def test_a_will_waits_for_its_lane(world: World) -> None:
    world.intake.full.add("lane")
    device = await world.client("dev", will=("lane/p2p/target", b"gone", 1, False))
    device.abort()
    await until(lambda: world.intake.told("dev") == ["connect", "tcpclean"])
    assert not world.intake.private
    world.intake.make_space()
    await until(lambda: bool(world.intake.private))
    assert len(world.intake.lane("lane")) == 1


@pytest.mark.parametrize("topic", ["lane/forbidden", "$SYS/x", "lane/#", "$SYS/enableOrderMsg"])
async def test_a_will_that_may_not_be_published_is_not(start_world: StartWorld, topic: str) -> None:
    world = await start_world(plugins={AUTH: {"allow_anonymous": True}, ACL: {}})
    spy = await world.client("spy")
    await spy.subscribe(("#", 1), ("$SYS/#", 1))
    device = await world.client("dev", will=(topic, b"gone", 1, True))
    device.abort()
    await until(lambda: world.intake.told("dev") == ["connect", "tcpclean"])
    await spy.ping()
    assert not world.intake.lanes
    assert not spy.messages
    assert not world.broker.retained_messages


async def test_a_will_over_the_limits_is_refused(world: World) -> None:
    world.intake.max_payload = 3
    device = await world.client("dev", will=("lane/will", b"gone", 1, False))
    device.abort()
    await until(lambda: world.intake.told("dev") == ["connect", "tcpclean"])
    assert not world.intake.wills


async def test_shutdown_ends_everybody_first(world: World) -> None:
    device = await world.client("dev", will=("lane/will", b"shut", 1, False))
    silent = await Client.open(world.port)
    world.clients.append(silent)
    await until(lambda: world.open_connections == 2)
    await world.host.close()
    await device.wait_closed()
    await silent.wait_closed()
    assert world.intake.told("dev") == ["connect", "tcpclean"]
    assert [m.payload for m in world.intake.wills] == [b"shut"]
    late = await Client.open(world.port)
    world.clients.append(late)
    late.send(connect_packet("late"))
    await late.wait_closed()
    assert not late.packets


async def test_stopping_does_not_wait_for_who_says_nothing_not_even_goodbye(
    start_world: StartWorld, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    world = await start_world(tls=authority.issue("broker"))
    context = ssl.create_default_context(cafile=str(authority.ca))

    def connect() -> ssl.SSLSocket:
        return context.wrap_socket(socket.create_connection(("127.0.0.1", world.port)), server_hostname="127.0.0.1")

    with contextlib.ExitStack() as sockets:
        for _ in range(3):
            sockets.enter_context(await asyncio.to_thread(connect))
        await until(lambda: world.open_connections == 3)
        # TLS would wait 30 s for each.
        await asyncio.wait_for(world.host.close(), 10)


async def test_a_second_connect_closes(world: World) -> None:
    device = await world.client("dev")
    device.send(connect_packet("dev"))
    await device.wait_closed()
    assert world.intake.told("dev") == ["connect", "tcpclean"]
    assert PUBLISH not in [p.kind for p in device.packets]


@pytest.mark.parametrize("allowed", [True, False])
async def test_our_auth_plugin(start_world: StartWorld, *, allowed: bool) -> None:
    world = await start_world(plugins={AUTH: {"allow_anonymous": allowed}})
    await world.client("dev", clean=False, code=0 if allowed else 5)
    assert [session.is_anonymous for session, _ in world.broker.sessions.values()] == ([False] if allowed else [])


async def test_our_auth_plugin_leaves_the_decision_to_others(start_world: StartWorld) -> None:
    world = await start_world(plugins={AUTH: {"allow_anonymous": False}, GATE: {}})
    await world.client("dev", username="u", password=OPEN)
    await world.client("other", username="u", password=WRONG, code=5)
