"""Connects and disconnects in the lane `.clients`, each connection with an id of its own."""

import asyncio
import contextlib
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.hook.mosquitto import WELCOME, Mosquitto, Sidecar, says_why, table_of
from tests.mqtt_client import CONNACK, Client, connect_packet
from tests.unit.hook.batches import HELLO, Operation
from tests.waiting import until

pytestmark = pytest.mark.e2e


async def test_coming_and_going(broker: Mosquitto) -> None:
    device = await broker.connect("dev-1", clean=False)
    came = await broker.event("connect", "dev-1")
    assert re.fullmatch(r"[0-9a-f]{16}-\d+", came["channelId"])
    assert came["clientIp"] == "127.0.0.1"
    assert came["cleanSession"] is False
    await device.disconnect()
    gone = await broker.gone("dev-1")
    assert gone["channelId"] == came["channelId"]
    device = await broker.connect("dev-1")
    await until(lambda: broker.events()[-1]["type"] == "connect", what="the second connect")
    again = await broker.event("connect", "dev-1")
    assert again["channelId"] != came["channelId"]
    assert again["cleanSession"] is True
    await device.drop()
    await until(lambda: broker.events()[-1]["type"] == "tcpclean", what="the end of the connection")
    last = broker.events()[-1]
    assert (last["channelId"], last["reason"]) == (again["channelId"], "close" if says_why() else "unknown")
    assert [event["type"] for event in broker.events()] == ["boot", "connect", gone["type"], "connect", "tcpclean"]


async def test_a_client_that_sends_nonsense(broker: Mosquitto, sidecar: Sidecar) -> None:
    welcome = await sidecar.answer(WELCOME, sidecar.send(Operation(HELLO)))
    device = await broker.connect("dev-1")
    await broker.event("connect", "dev-1")
    device.send(b"\xf5\0")
    await device.wait_closed()
    told = "invalid" if welcome.body[16] & 1 else "close" if says_why() else "unknown"
    assert (await broker.event("tcpclean", "dev-1"))["reason"] == told
    await device.drop()


async def test_the_life_of_the_broker(broker: Mosquitto) -> None:
    device = await broker.connect("dev-1")
    await broker.event("connect", "dev-1")
    await broker.stop()
    await broker.start()
    broker.kill()
    await broker.start()
    events = broker.events()
    assert [event["type"] for event in events] == ["boot", "connect", "shutdown", "boot", "boot"]
    assert len({event["channelId"] for event in events if event["type"] == "boot"}) == 3
    await device.drop()


async def test_a_takeover_shows_the_old_connection_go_and_the_new_one_come(broker: Mosquitto) -> None:
    old = await broker.connect("dev-1")
    first = await broker.event("connect", "dev-1")
    new = await broker.connect("dev-1")
    await old.wait_closed()
    await new.ping()
    gone = await broker.event("tcpclean", "dev-1")
    assert (gone["channelId"], gone["reason"]) == (first["channelId"], "takeover")
    second = await broker.event("connect", "dev-1")
    assert second["channelId"] != first["channelId"]
    await new.disconnect()
    await until(lambda: broker.events()[-1]["type"] != "connect", what="the end of the second")
    assert broker.events()[-1]["channelId"] == second["channelId"]
    await old.drop()


async def test_whoever_is_turned_away_never_was_there(stopped: Mosquitto) -> None:
    stopped.options["auth"] = "defer"
    stopped.lines = ["allow_anonymous false", f"password_file {stopped.directory / 'passwords'}"]
    # "secret", as mosquitto_passwd writes it.
    (stopped.directory / "passwords").write_text("")
    await stopped.start()
    for name in ("one", "two"):
        client = await Client.open(stopped.port)
        client.send(connect_packet(name, username="alice", password="wrong"))  # noqa: S106 - the test's own
        assert (await client.wait_packet(CONNACK)).body[1] == 5
        await client.wait_closed()
        await client.drop()
    sidecar = await Sidecar.connect(stopped)
    await sidecar.stats()
    assert [event["type"] for event in stopped.events()] == ["boot"]
    await sidecar.client.drop()


async def test_sockets_without_a_connect_are_nobody(broker: Mosquitto) -> None:
    for _ in range(5):
        (await Client.open(broker.port)).abort()
    device = await broker.connect("dev-1")
    await broker.event("connect", "dev-1")
    assert [event["type"] for event in broker.events()] == ["boot", "connect"]
    await device.drop()


async def test_events_that_find_no_space_are_counted_and_told_of(
    stopped: Mosquitto, small_disk: Callable[[Path], None]
) -> None:
    small_disk(stopped.spool)
    (stopped.spool / "lanes.table").write_bytes(table_of({}))
    await stopped.start()
    sidecar = await Sidecar.connect(stopped)
    filler = stopped.spool / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    lost = 0
    while not lost:
        # The last page of the lane has to be full too.
        device = await stopped.connect("dev-1")
        await device.disconnect()
        lost = (await sidecar.stats())["events_lost", ""]
    filler.unlink()
    device = await stopped.connect("dev-2")
    await stopped.event("connect", "dev-2")
    kinds = [event["type"] for event in stopped.events()]
    assert kinds.count("overflow") == 1
    assert kinds[kinds.index("overflow") - 1] in {"connect", "disconnect", "tcpclean"}
    assert (await sidecar.stats())["events_lost", ""] >= lost
    await device.drop()
    await sidecar.client.drop()


@pytest.mark.parametrize("reload", [False, True])
async def test_a_lane_of_events_that_was_no_directory_is_opened_when_it_is_mended(
    reload: bool,  # noqa: FBT001 - a case
    stopped: Mosquitto,
) -> None:
    lane = stopped.spool / ".clients"
    lane.touch()
    await stopped.start()
    sidecar = await Sidecar.connect(stopped)
    device = await stopped.connect("dev-1")
    assert str(lane) in (await sidecar.problems())[".clients"]
    lane.unlink()
    if reload:
        stopped.process.send_signal(signal.SIGHUP)
    # Else it is looked at again after 5 s.
    await until(lambda: stopped.events() != [], what="the lane")
    # Who came before is in the list that this asks for.
    assert [event["type"] for event in stopped.events()] == ["overflow"]
    assert await sidecar.problems() == {}
    await device.drop()
    assert (await stopped.event("tcpclean", "dev-1"))["channelId"].endswith("-2")
    await sidecar.client.drop()


@pytest.mark.parametrize("idle", [False, True])
async def test_a_lane_of_events_that_is_deleted_is_begun_anew(
    idle: bool,  # noqa: FBT001 - a case
    broker: Mosquitto,
    sidecar: Sidecar,
) -> None:
    device = await broker.connect("dev-1")
    await broker.event("connect", "dev-1")
    shutil.rmtree(broker.spool / ".clients")
    # The hook looks once in a millisecond.
    await asyncio.sleep(0.01)
    if not idle:
        await device.drop()
    await until_problem(sidecar)
    assert (await sidecar.stats())["events_lost", ""] == (0 if idle else 1)
    await until(lambda: [event["type"] for event in broker.events()] == ["overflow"], what="the lane")
    assert await sidecar.problems() == {}
    again = await broker.connect("dev-2")
    await broker.event("connect", "dev-2")
    for client in (device, again):
        await client.drop()


async def until_problem(sidecar: Sidecar) -> None:
    """Wait until the hook says that the lane of events was deleted."""
    async with asyncio.timeout(30):
        while "was deleted" not in (await sidecar.problems()).get(".clients", ""):
            await asyncio.sleep(0.05)


async def test_many_clients_come_and_go(broker: Mosquitto) -> None:
    async def life(name: str) -> None:
        for _ in range(5):
            device = await broker.connect(name)
            await device.publish("sensors/x", name.encode(), qos=1)
            await device.disconnect()

    await asyncio.gather(*(life(f"dev-{number}") for number in range(60)))
    await broker.gone("dev-59")
    assert len({event["channelId"] for event in broker.events() if event["type"] == "connect"}) == 300
    assert len(broker.frames("telemetry-out")) == 300
