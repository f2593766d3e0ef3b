"""However clients reach Mosquitto: what they publish is exported, they are seen to come and go."""

import asyncio
import signal
import ssl
from pathlib import Path

import pytest

from mq2mqtt.quickstart.ports import free_port
from tests.certificates import Authority, Certificate
from tests.e2e.hook.mosquitto import DELIVERED, Mosquitto, Sidecar, says_why, table_of
from tests.mqtt_client import CONNACK, PUBACK, Client, connect_packet, packet, publish_packet, text
from tests.unit.hook.batches import DELIVER, Operation
from tests.waiting import until

pytestmark = pytest.mark.e2e
RULE = "telemetry-out"


@pytest.fixture
def second_port() -> int:
    return free_port()


async def tls_client(
    port: int, client_id: str, authority: Authority, own: Certificate | None, *, clean: bool = True
) -> Client:
    context = ssl.create_default_context(cafile=str(authority.ca))
    if own:
        context.load_cert_chain(own.certificate, own.key)
    client = Client(*await asyncio.open_connection("127.0.0.1", port, ssl=context), acknowledge=True)
    client.send(connect_packet(client_id, clean=clean))
    assert (await client.wait_packet(CONNACK)).body[1] == 0
    return client


@pytest.mark.parametrize("with_certificate", [False, True])
async def test_tls(with_certificate: bool, second_port: int, stopped: Mosquitto, tmp_path: Path) -> None:  # noqa: FBT001
    authority = Authority(tmp_path / "certificates")
    server = authority.issue("server")
    stopped.lines += [
        *(f"listener {second_port} 127.0.0.1", f"cafile {authority.ca}"),
        *(f"certfile {server.certificate}", f"keyfile {server.key}"),
    ]
    if with_certificate:
        # Mosquitto 2.0 asks no plugin whether such a client may connect.
        stopped.lines += ["require_certificate true", "use_identity_as_username true"]
    (stopped.spool / "lanes.table").write_bytes(table_of({RULE: "sensors"}))
    await stopped.start()
    device = await tls_client(second_port, "dev-1", authority, authority.issue("dev-1") if with_certificate else None)
    await device.publish("sensors/a", b"1", qos=1)
    (frame,) = stopped.frames(RULE)
    assert (frame.client_id, frame.payload) == ("dev-1", b"1")
    assert (await stopped.event("connect", "dev-1"))["clientIp"] == "127.0.0.1"
    sidecar = await Sidecar.connect(stopped)
    assert await sidecar.results(Operation(DELIVER, 1, b"dev-1", b"devices/p2p/dev-1", b"", b"x")) == [DELIVERED]
    await device.wait_messages(1)
    await device.disconnect()
    await stopped.gone("dev-1")
    await sidecar.client.drop()


async def test_a_certificates_client_that_only_listens_is_seen_when_a_message_reaches_it(
    second_port: int, stopped: Mosquitto, tmp_path: Path
) -> None:
    if not says_why():
        pytest.skip("this build of Mosquitto lets plugins see no client's state")
    authority = Authority(tmp_path / "certificates")
    server, own = authority.issue("server"), authority.issue("dev-1")
    stopped.lines += [
        *(f"listener {second_port} 127.0.0.1", f"cafile {authority.ca}"),
        *(f"certfile {server.certificate}", f"keyfile {server.key}"),
        *("require_certificate true", "use_identity_as_username true"),
    ]
    (stopped.spool / "lanes.table").write_bytes(table_of({RULE: "sensors"}))
    await stopped.start()
    sender = await stopped.connect("dev-2")
    device = await tls_client(second_port, "dev-1", authority, own, clean=False)
    await device.subscribe(("sensors/#", 1))
    device.acknowledge = False
    await sender.publish("sensors/p2p/dev-1", b"private", qos=1)
    await device.wait_messages(1)
    await device.disconnect()
    went = await stopped.gone("dev-1")
    device = await tls_client(second_port, "dev-1", authority, own, clean=False)
    # What its session was handed before comes again.
    assert [message.payload for message in await device.wait_messages(1)] == [b"private"]
    await sender.publish("sensors/a", b"1", qos=1)
    await device.wait_messages(2)
    came = await stopped.event("connect", "dev-1")
    assert came["channelId"] != went["channelId"]
    sidecar = await Sidecar.connect(stopped)
    assert await sidecar.results(Operation(DELIVER, 1, b"dev-1", b"devices/p2p/dev-1", b"", b"x")) == [DELIVERED]
    await device.wait_messages(3)
    for client in (device, sender, sidecar.client):
        await client.drop()


async def test_what_a_bridge_brings_in(stopped: Mosquitto, hook: Path, tmp_path: Path) -> None:
    """A bridge that this broker has opened is no client of it: what comes by it is exported."""
    (tmp_path / "remote").mkdir()
    remote = await Mosquitto(tmp_path / "remote", hook).start()
    stopped.lines += [
        *("connection far", f"address 127.0.0.1:{remote.port}", "topic sensors/# in 1"),
        *("local_clientid far-local", "remote_clientid far-remote", "notifications false"),
    ]
    (stopped.spool / "lanes.table").write_bytes(table_of({RULE: "sensors"}))
    await stopped.start()
    await remote.event("connect", "far-remote")
    device = await remote.connect("dev-1")

    async def arrives() -> None:
        # Until the bridge has subscribed nothing arrives.
        while not stopped.frames(RULE):
            await device.publish("sensors/a", b"1", qos=1)
            await asyncio.sleep(0.1)

    await asyncio.wait_for(arrives(), 30)
    frame = stopped.frames(RULE)[0]
    assert (frame.client_id, frame.payload) == ("far-local", b"1")
    assert [event["type"] for event in stopped.events()] == ["boot"]
    await device.drop()
    await remote.stop()


async def test_a_listener_with_settings_of_its_own(stopped: Mosquitto) -> None:
    stopped.lines = ["allow_anonymous true"]
    stopped.general = ["per_listener_settings true"]
    (stopped.spool / "lanes.table").write_bytes(table_of({RULE: "sensors"}))
    await stopped.start()
    sidecar = await Sidecar.connect(stopped, parents=["sensors"])
    device = await stopped.connect("dev-1", will=("sensors/a", b"will", 1, False))
    await device.publish("sensors/a", b"1", qos=1)
    await stopped.event("connect", "dev-1")
    device.abort()
    await stopped.event("tcpclean", "dev-1")
    await until(lambda: stopped.payloads(RULE) == [b"1", b"will"], what="the will")
    await sidecar.stats()
    stopped.process.send_signal(signal.SIGHUP)
    await until(lambda: "Reloading config" in stopped.log.read_text(), what="reload")
    await sidecar.stats()
    await sidecar.client.drop()


async def test_a_second_listener_with_settings_of_its_own_cannot_have_the_hook(
    second_port: int, stopped: Mosquitto
) -> None:
    stopped.general = ["per_listener_settings true"]
    stopped.lines = [
        "allow_anonymous true",
        f"plugin {stopped.hook}",
        *(f"plugin_opt_{name} {value}" for name, value in stopped.options.items()),
        *(f"listener {second_port} 127.0.0.1", "allow_anonymous true"),
    ]
    assert "mq2mqtt hook: Mosquitto loads the hook twice" in stopped.refused_to_start()


async def test_a_delayed_will(broker: Mosquitto, sidecar: Sidecar) -> None:
    device = await Client.open(broker.port)
    # Session expiry 60 s; the will waits a second.
    head = text("MQTT") + b"\x05\x0e\x00\x3c\x05\x11\x00\x00\x00\x3c"
    will = b"\x05\x18\x00\x00\x00\x01" + text("sensors/a") + text(b"late")
    device.send(packet(0x10, head + text("dev-5") + will))
    assert (await device.wait_packet(CONNACK)).body[1] == 0
    device.abort()
    await until(lambda: broker.payloads(RULE), what="the will")
    (frame,) = broker.frames(RULE)
    assert (frame.client_id, frame.payload, frame.will) == ("dev-5", b"late", True)
    assert (await sidecar.stats())["wills", RULE] == 1


async def test_many_clients_connect_at_once(broker: Mosquitto) -> None:
    many = 400
    clients = [await Client.open(broker.port) for _ in range(many)]
    for number, client in enumerate(clients):
        client.send(connect_packet(f"dev-{number}") + publish_packet("sensors/a", b"%d" % number, qos=1, packet_id=1))
    for client in clients:
        await client.wait_packet(PUBACK, 1)
    assert sorted(map(int, broker.payloads(RULE))) == list(range(many))
    for client in clients:
        client.abort()

    def told() -> bool:
        return [event["type"] for event in broker.events()].count("tcpclean") == many

    await until(told, what="the end of all")
    channels: dict[str, list[str]] = {}
    for event in broker.events():
        channels.setdefault(event["channelId"], []).append(event["type"])
    assert sorted(map(tuple, channels.values())) == [("boot",), *[("connect", "tcpclean")] * many]
