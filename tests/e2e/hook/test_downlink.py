"""The sidecar's batches: handed out in order, each operation with its result; nobody else may send one."""

import asyncio
import struct
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from tests.e2e.hook.mosquitto import (
    CLIENTS,
    DELIVERED,
    NO_SUBSCRIBER,
    NOT_TAKEN,
    OFFLINE,
    REFUSED,
    STATS,
    TOKEN,
    WELCOME,
    Mosquitto,
    Sidecar,
    only,
    table_of,
)
from tests.mqtt_client import CONNACK, Client, connect_packet, packet, text
from tests.unit.hook.batches import DELIVER, HELLO, KICK, LIST, PUBLISH, Operation, batch
from tests.waiting import until

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[3]


def to(client_id: bytes, payload: bytes, *, qos: int = 1, topic: bytes | None = None) -> Operation:
    return Operation(DELIVER, qos, client_id, topic or b"devices/p2p/" + client_id, b"", payload)


def about(topic: bytes, payload: bytes, *, qos: int = 1) -> Operation:
    return Operation(PUBLISH, qos, b"", topic, b"", payload)


async def test_hello(broker: Mosquitto, sidecar: Sidecar) -> None:
    number = sidecar.send(Operation(HELLO))
    welcome = await sidecar.answer(WELCOME, number)
    major, minor, epoch, crc, flags, size = struct.unpack_from("<HHQIBI", welcome.body)
    assert (major, minor) == (0, 2)
    assert epoch == int(broker.events()[0]["channelId"].partition("-")[0], 16)
    assert crc == crc32((broker.spool / "lanes.table").read_bytes())
    assert flags & ~1 == 2 | 4
    *lines, rest = welcome.body[21:].decode().split("\n")
    assert rest == ""
    assert len(welcome.body) == 21 + size
    assert lines[0].startswith("2.")
    assert lines[1:] == [str(broker.spool)]
    # Of three parent topics, of three lanes, of events.
    assert (await sidecar.answer(STATS, number)).entries == 3 + 3 * 4 + 1


async def test_deliver_reaches_one_client_without_a_subscription(broker: Mosquitto, sidecar: Sidecar) -> None:
    device = await broker.connect("dev-1")
    spy = await broker.connect("spy")
    await spy.subscribe(("#", 2), ("devices/p2p/dev-1", 2))
    operations = [to(b"dev-1", b"%d" % qos, qos=qos) for qos in (0, 1, 2)]
    assert await sidecar.results(*operations, to(b"nobody", b"x")) == [DELIVERED] * 3 + [OFFLINE]
    messages = await device.wait_messages(3)
    assert [(one.topic, one.payload, one.qos, one.retain) for one in messages] == [
        ("devices/p2p/dev-1", b"%d" % qos, qos, False) for qos in (0, 1, 2)
    ]
    await spy.ping()
    assert spy.messages == []
    await device.drop()
    await spy.drop()


async def test_publish_reaches_subscribers_and_says_whether_there_are_any(broker: Mosquitto, sidecar: Sidecar) -> None:
    one, two = await broker.connect("one"), await broker.connect("two")
    await one.subscribe(("sensors/#", 2))
    await two.subscribe(("sensors/a", 0))
    operations = [
        about(b"sensors/a", b"1"),
        about(b"nobody/here", b"1"),
        about(b"sensors/b", b"2", qos=2),
        about(b"sensors/a", b"1"),
        to(b"one", b"3"),
        about(b"nobody/here", b""),
    ]
    assert await sidecar.results(*operations) == [
        DELIVERED,
        NO_SUBSCRIBER,
        DELIVERED,
        DELIVERED,
        DELIVERED,
        NO_SUBSCRIBER,
    ]
    messages = await one.wait_messages(4)
    assert [(message.topic, message.payload) for message in messages] == [
        ("sensors/a", b"1"),
        ("sensors/b", b"2"),
        ("sensors/a", b"1"),
        ("devices/p2p/one", b"3"),
    ]
    assert len(await two.wait_messages(2)) == 2
    # What the sidecar sends is not exported again.
    assert broker.frames("telemetry-out") == []
    await one.drop()
    await two.drop()


async def test_many_batches_at_once_are_answered_in_order(broker: Mosquitto, sidecar: Sidecar) -> None:
    device = await broker.connect("dev-1")
    await device.subscribe(("down/#", 0))
    numbers = [
        sidecar.send(*(about(b"down/%d" % (i % 7) if i % 2 else b"up/%d" % i, b"%d" % i, qos=0) for i in range(100)))
        for _ in range(30)
    ]
    for number in numbers:
        assert list((await sidecar.answer(2, number)).body) == [NO_SUBSCRIBER, DELIVERED] * 50
    assert len(await device.wait_messages(1500)) == 1500
    await device.drop()


async def test_properties_go_along(broker: Mosquitto, sidecar: Sidecar) -> None:
    client = await Client.open(broker.port)
    client.send(packet(0x10, text("MQTT") + b"\x05\x02\x00\x3c\x00" + text("dev-5")))
    await client.wait_packet(CONNACK)
    properties = b"\x03" + text("text/plain") + b"\x26" + text("k") + text("\u00fc") + b"\x26" + text("k") + text("")
    assert await sidecar.results(Operation(DELIVER, 0, b"dev-5", b"d/x", properties, b"body")) == [DELIVERED]
    message = only(await client.wait_messages(1))
    assert message.payload == bytes((len(properties),)) + properties + b"body"
    await client.drop()


@pytest.mark.parametrize(("seconds", "kept"), [(1, [b"long"]), (600, [b"short", b"long"])])
async def test_a_message_is_kept_for_a_session_no_longer_than_its_expiry(
    broker: Mosquitto, sidecar: Sidecar, seconds: int, kept: list[bytes]
) -> None:
    away = await broker.connect("away", clean=False)
    await away.subscribe(("down/#", 1))
    await away.drop()
    expiry = b"\x02" + seconds.to_bytes(4, "big")
    operations = [Operation(PUBLISH, 1, b"", b"down/x", expiry, b"short"), about(b"down/x", b"long")]
    assert await sidecar.results(*operations) == [DELIVERED, DELIVERED]
    await asyncio.sleep(2.5)
    back = await broker.connect("away", clean=False)
    assert [message.payload for message in await back.wait_messages(len(kept))] == kept
    await back.drop()


async def test_kick(broker: Mosquitto, sidecar: Sidecar) -> None:
    device = await broker.connect("dev-1", will=("alarms/gone", b"will", 1, False))
    result = await sidecar.results(
        Operation(KICK, client_id=b"dev-1"),
        Operation(KICK, client_id=b"nobody"),
        Operation(KICK, client_id=b"mq2mqtt-sidecar"),
    )
    assert result == [DELIVERED, OFFLINE, NOT_TAKEN]
    await device.wait_closed()
    assert (await broker.event("tcpclean", "dev-1"))["reason"] == "kick"
    await until(lambda: broker.payloads("alarms-out") == [b"will"], what="the will")
    await device.drop()


def clients_of(body: bytes) -> tuple[bool, int, list[tuple[str, str, str, int, bool]]]:
    last, offset = struct.unpack_from("<BQ", body)
    position, found = 9, []
    while position < len(body):
        texts = []
        for _ in range(3):
            (size,) = struct.unpack_from("<H", body, position)
            texts.append(body[position + 2 : position + 2 + size].decode())
            position += 2 + size
        connected, clean = struct.unpack_from("<QB", body, position)
        position += 9
        found.append((texts[0], texts[1], texts[2], connected, bool(clean)))
    return bool(last), offset, found


async def test_list_of_the_connected_clients(broker: Mosquitto, sidecar: Sidecar) -> None:
    devices = [await broker.connect(f"dev-{number}", clean=bool(number % 2)) for number in range(600)]
    await devices[0].disconnect()
    await broker.gone("dev-0")
    number = sidecar.send(Operation(LIST))
    found: list[Any] = []
    while True:
        answer = await sidecar.answer(CLIENTS, number)
        last, offset, clients = clients_of(answer.body)
        assert answer.entries == len(clients)
        found += clients
        if last:
            break
    by_id = {client[0]: client for client in found}
    assert len(found) == len(by_id) == 599
    assert set(by_id) == {f"dev-{number}" for number in range(1, 600)}
    event = await broker.event("connect", "dev-7")
    assert by_id["dev-7"] == ("dev-7", event["channelId"], "127.0.0.1", event["time"], True)
    assert by_id["dev-8"][4] is False
    # The events before this offset are in the list.
    assert offset == len(broker.events()) + int(next((broker.spool / ".clients").glob("*.seg")).stem)
    for device in devices:
        await device.drop()


@pytest.mark.parametrize(
    "payload", [b"", b"\x02\0\0\0\0\0\0\0", batch(about(b"a/#", b"x")), batch(to(b"dev-1", b"x"))[:-1]], ids=repr
)
async def test_a_batch_that_is_not_sound_is_refused_whole(payload: bytes, broker: Mosquitto, sidecar: Sidecar) -> None:
    sidecar.send_bytes(payload)
    number = 7 if payload.startswith(b"\1") else 0
    refused = await sidecar.answer(REFUSED, number)
    assert struct.unpack_from("<I", refused.body)[0] <= len(payload)
    assert (await sidecar.stats())["events_lost", ""] == 0
    assert "is refused at byte" in broker.log.read_text()


@pytest.mark.parametrize(
    "text_",
    [
        b"",
        b"mq2mqtt-table\t2\t1000\tprocess\t-\t-\n",
        table_of({"telemetry-out": "sensors"})[:-1],
        table_of({"../x": "sensors"}),
        table_of({"telemetry-out": "sensors/a"}),
        table_of({"telemetry-out": "$SYS"}),
        table_of({"a-out": "sensors", "b-out": "sensors"}),
        table_of({}, max_bytes=0),
    ],
    ids=repr,
)
async def test_a_table_that_is_not_sound_changes_nothing(text_: bytes, broker: Mosquitto, sidecar: Sidecar) -> None:
    before = (broker.spool / "lanes.table").read_bytes()
    good, problem = await sidecar.table(text_)
    assert not good
    assert problem.startswith("lane table, line ")
    assert (broker.spool / "lanes.table").read_bytes() == before
    device = await broker.connect("dev-1")
    await device.publish("sensors/a", b"1", qos=1)
    assert broker.payloads("telemetry-out") == [b"1"]
    await device.drop()


async def test_a_new_table_moves_topics_between_lanes(broker: Mosquitto, sidecar: Sidecar) -> None:
    device = await broker.connect("dev-1")
    await device.publish("sensors/a", b"1", qos=1)
    assert await sidecar.table(table_of({"other-out": "sensors", "telemetry-out": "fresh"})) == (True, "")
    await device.publish("sensors/a", b"2", qos=1)
    await device.publish("fresh/a", b"3", qos=1)
    await device.publish("alarms/a", b"4", qos=1)
    assert broker.payloads("telemetry-out") == [b"1", b"3"]
    assert broker.payloads("other-out") == [b"2"]
    assert broker.payloads("alarms-out") == []
    await device.drop()


async def test_nobody_else_may_send_a_batch_or_read_answers(broker: Mosquitto, sidecar: Sidecar) -> None:
    victim, thief = await broker.connect("dev-1"), await broker.connect("thief")
    # Mosquitto 2.0 grants a subscription that is denied with the code 128.
    assert await thief.subscribe(("$mq2mqtt/#", 0), ("$mq2mqtt/v1/results", 0)) == [128, 128]
    await thief.publish(
        "$CONTROL/mq2mqtt/v1", batch(to(b"dev-1", b"forged"), Operation(KICK, client_id=b"dev-1")), qos=1
    )
    await thief.publish("$mq2mqtt/v1/results", struct.pack("<BBHI", 1, 2, 0, 1), qos=1)
    assert await sidecar.results(to(b"dev-1", b"real")) == [DELIVERED]
    assert only(await victim.wait_messages(1)).payload == b"real"
    assert not victim.closed.is_set()
    assert thief.messages == []
    for client in (victim, thief):
        await client.drop()


@pytest.mark.parametrize(
    "password",
    [
        {},
        {"username": "mq2mqtt"},
        {"username": "mq2mqtt", "password": TOKEN[:-1]},
        {"username": "x", "password": TOKEN},
    ],
)
async def test_nobody_else_may_be_the_sidecar(password: dict[str, str], broker: Mosquitto, sidecar: Sidecar) -> None:
    forger = await broker.connect("mq2mqtt-sidecar", code=5, **password)
    await forger.drop()
    device = await broker.connect("dev-1")
    assert await sidecar.results(to(b"dev-1", b"x")) == [DELIVERED]
    await device.drop()


async def test_the_sidecar_may_come_by_a_unix_socket(stopped: Mosquitto) -> None:
    path = stopped.directory / "sidecar.sock"
    del stopped.options["token_file"]
    stopped.options["socket"] = str(path)
    stopped.lines.append(f"listener 0 {path}")
    await stopped.start()
    forger = await stopped.connect("mq2mqtt-sidecar", username="mq2mqtt", password=TOKEN, code=5)
    await forger.drop()
    await until(path.exists)
    reader, writer = await asyncio.open_unix_connection(str(path))
    client = Client(reader, writer, acknowledge=True)
    client.send(connect_packet("mq2mqtt-sidecar"))
    assert (await client.wait_packet(CONNACK)).body[1] == 0
    sidecar = Sidecar(client)
    await sidecar.answer(WELCOME, sidecar.send(Operation(HELLO)))
    await client.drop()


async def test_a_sidecar_that_comes_again_takes_over(broker: Mosquitto, sidecar: Sidecar) -> None:
    for _ in range(3):
        again = await Sidecar.connect(broker)
        device = await broker.connect("dev-1")
        assert await again.results(about(b"x", b"y"), to(b"dev-1", b"x")) == [NO_SUBSCRIBER, DELIVERED]
        await device.drop()
        await again.client.drop()
    await sidecar.client.wait_closed()
    # Nothing is told of the sidecar's own connections.
    assert {event["clientId"] for event in broker.events()} == {"", "dev-1"}


def _deployed_queue() -> list[str]:
    """Return the lines about queues of the configuration that we hand out."""
    lines = (ROOT / "deploy" / "mosquitto.conf").read_text().splitlines()
    return [line for line in lines if line.startswith("max_queued_")]


@pytest.mark.parametrize(("lines", "kept"), [([], 1000), (_deployed_queue(), 1300)], ids=["default", "deployed"])
async def test_mosquitto_drops_what_is_beyond_its_queue_without_a_word(
    lines: list[str], kept: int, stopped: Mosquitto
) -> None:
    stopped.general = lines
    (stopped.spool / "lanes.table").write_bytes(table_of({}, ["devices"]))
    await stopped.start()
    device = await stopped.connect("dev-1", clean=False)
    await device.subscribe(("devices/#", 1))
    await device.disconnect()
    await stopped.gone("dev-1")
    sidecar = await Sidecar.connect(stopped)
    for first in range(0, 1300, 100):
        numbers = range(first, first + 100)
        operations = [Operation(PUBLISH, 1, b"", b"devices/a", b"", b"%d" % number) for number in numbers]
        assert await sidecar.results(*operations) == [DELIVERED] * 100
    # All of them were taken; so many are there.
    device = await stopped.connect("dev-1", clean=False)
    await device.wait_messages(kept)
    await sidecar.results(Operation(PUBLISH, 1, b"", b"devices/a", b"", b"last"))
    messages = await device.wait_messages(kept + 1)
    assert [message.payload for message in messages] == [*(b"%d" % number for number in range(kept)), b"last"]
    for client in (device, sidecar.client):
        await client.drop()
