"""The hook changes nothing of who may log in, publish and subscribe, whichever way Mosquitto is configured."""

import asyncio
import resource
import signal
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from mq2mqtt.message import MqttProperties
from tests.e2e.hook.mosquitto import DELIVERED, WELCOME, Mosquitto, Sidecar, mosquitto_program, only, table_of
from tests.mqtt_client import CONNACK, PUBACK, Client, packet, publish_packet, text
from tests.unit.hook.batches import DELIVER, HELLO, PUBLISH, Operation
from tests.unit.hook.driver import HOOK
from tests.waiting import until

pytestmark = pytest.mark.e2e
RULE = "telemetry-out"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"auth": None}, "plugin_opt_auth is missing: `defer` where a password_file"),
        ({"acl": None}, "plugin_opt_acl is missing: `defer` where an acl_file"),
        ({"auth": "maybe"}, "plugin_opt_auth is maybe: use defer or allow"),
        ({"spool": None}, "plugin_opt_spool is missing"),
        ({"spool": "/nonexistent"}, "plugin_opt_spool: cannot use /nonexistent: No such file or directory; make it"),
        ({"spool": "spool"}, "plugin_opt_spool is spool: use an absolute path"),
        ({"token_file": None}, "plugin_opt_token_file or plugin_opt_socket is missing"),
        ({"token_file": "/nonexistent"}, "plugin_opt_token_file: cannot read /nonexistent"),
        ({"sync_ms": "0"}, "plugin_opt_sync_ms is 0: use 1 to 1000 milliseconds, or leave it out"),
        ({"sync_ms": "5s"}, "plugin_opt_sync_ms is 5s: use 1 to 1000 milliseconds"),
        ({"colour": "blue"}, "unknown option plugin_opt_colour: use spool, auth"),
    ],
    ids=str,
)
async def test_without_its_options_the_broker_does_not_start(
    changes: dict[str, str | None], expected: str, stopped: Mosquitto
) -> None:
    for name, value in changes.items():
        stopped.options.pop(name, None)
        if value is not None:
            stopped.options[name] = value
    assert f"mq2mqtt hook: {expected}" in stopped.refused_to_start()


async def test_a_short_token_is_refused(stopped: Mosquitto) -> None:
    (stopped.directory / "token").write_text("short\n")
    assert "must hold one line of 16 to 1024 characters" in stopped.refused_to_start()


@pytest.fixture
def installed(hook: Path, tmp_path: Path) -> Path:
    """The file that `make install` makes."""
    make = ["make", "-C", str(HOOK), "install", f"BUILD={hook.parent}", f"DESTDIR={tmp_path}/root", "PREFIX=/usr/local"]
    subprocess.run(make, check=True, capture_output=True)
    (file,) = (path for path in (tmp_path / "root").rglob("*") if path.is_file())
    assert file == tmp_path / "root" / "usr" / "local" / "lib" / "mq2mqtt" / "mq2mqtt_hook.so"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    return file


def test_the_hook_exports_nothing_but_what_mosquitto_calls(installed: Path) -> None:
    # A name could meet one of Mosquitto's or of another plugin.
    nm = subprocess.run(["nm", "-D", "--defined-only", installed], capture_output=True, text=True, check=True)
    functions = {"mosquitto_plugin_version", "mosquitto_plugin_init", "mosquitto_plugin_cleanup"}
    assert {line.split()[-1] for line in nm.stdout.splitlines()} == functions


async def test_mosquitto_takes_the_installed_hook(installed: Path, stopped: Mosquitto) -> None:
    stopped.hook = installed
    (stopped.spool / "lanes.table").write_bytes(table_of({RULE: "sensors", "alarms-out": "alarms"}, ["devices"]))
    await stopped.start()
    said = stopped.log.read_text()
    assert f"mq2mqtt hook: version 0.2, spool {stopped.spool}" in said
    assert f"mq2mqtt hook: exported: {RULE} (sensors), alarms-out (alarms)" in said


@pytest.fixture
def guarded(stopped: Mosquitto) -> Mosquitto:
    """With passwords and an ACL of Mosquitto's own: alice may write sensors/a and read all."""
    passwords, acl = stopped.directory / "passwords", stopped.directory / "acl"
    passwords.write_text("alice:secret\n")
    passwords.chmod(0o600)
    subprocess.run(["mosquitto_passwd", "-U", passwords], check=True)
    acl.write_text("user alice\ntopic write sensors/a\ntopic read sensors/#\ntopic read devices/#\n")
    acl.chmod(0o600)
    stopped.lines = ["allow_anonymous false", f"password_file {passwords}", f"acl_file {acl}"]
    stopped.options |= {"auth": "defer", "acl": "defer"}
    (stopped.spool / "lanes.table").write_bytes(table_of({RULE: "sensors"}, ["devices"]))
    return stopped


async def test_defer_leaves_everything_to_mosquitto(guarded: Mosquitto) -> None:
    await guarded.start()
    for wrong in ({}, {"username": "alice"}, {"username": "alice", "password": "wrong"}, {"username": "bob"}):
        turned_away = await guarded.connect("dev-1", code=5, **wrong)
        await turned_away.drop()
    alice = await guarded.connect("dev-1", username="alice", password="secret")  # noqa: S106 - the test's own
    await alice.subscribe(("sensors/#", 1))
    await alice.publish("sensors/b", b"denied", qos=1)
    await alice.publish("sensors/a", b"granted", qos=1)
    assert only(await alice.wait_messages(1)).payload == b"granted"
    assert guarded.payloads(RULE) == [b"granted"]
    # The sidecar needs no line in either file.
    sidecar = await Sidecar.connect(guarded, parents=["sensors"])
    await sidecar.stats()
    await alice.drop()
    await sidecar.client.drop()


async def test_a_will_that_the_acl_denies_is_not_exported(guarded: Mosquitto) -> None:
    await guarded.start()
    sidecar = await Sidecar.connect(guarded, parents=["sensors"])
    login = {"username": "alice", "password": "secret"}
    denied = await guarded.connect("dev-1", will=("sensors/b", b"denied", 1, False), **login)
    granted = await guarded.connect("dev-2", will=("sensors/a", b"granted", 1, False), **login)
    denied.abort()
    await until(lambda: guarded.events()[-1]["type"] == "tcpclean", what="the end of the first")
    granted.abort()
    await until(lambda: guarded.payloads(RULE), what="the will")
    assert guarded.payloads(RULE) == [b"granted"]
    await sidecar.client.drop()


async def test_a_reload_keeps_everything_going(broker: Mosquitto, sidecar: Sidecar) -> None:
    device = await broker.connect("dev-1")
    for number in range(3):
        broker.process.send_signal(signal.SIGHUP)
        await until(lambda: broker.log.read_text().count("Reloading config") > number, what="reload")  # noqa: B023
        await device.publish("sensors/a", b"%d" % number, qos=1)
    assert broker.payloads(RULE) == [b"0", b"1", b"2"]
    await sidecar.stats()
    # Mosquitto asks again about those that are connected: nobody has come or gone.
    assert [event["type"] for event in broker.events()] == ["boot", "connect"]
    assert await sidecar.results(Operation(DELIVER, 0, b"dev-1", b"a", b"", b"x")) == [DELIVERED]
    await device.drop()


async def connect_5(broker: Mosquitto, client_id: str, properties: bytes = b"") -> Client:
    client = await Client.open(broker.port)
    head = text("MQTT") + b"\x05\x02\x00\x3c" + bytes((len(properties),)) + properties
    client.send(packet(0x10, head + text(client_id)))
    assert (await client.wait_packet(CONNACK)).body[1] == 0
    return client


async def publish_5(device: Client, topic: str, properties: bytes) -> None:
    body = text(topic) + struct.pack("!H", 1) + bytes((len(properties),)) + properties + b"body"
    device.send(packet(0x32, body))
    await device.wait_packet(PUBACK, 1)


EXPIRY = b"\x02\x00\x00\x00\x3c"
PROPERTIES = b"".join(
    [
        b"\x01\x01\x03" + text("text/plain"),
        b"\x08" + text("reply/to") + b"\x09" + text(b"\0\1"),
        b"\x26" + text("k") + text("v\u00fc") + b"\x26" + text("k") + text(""),
    ]
)


def reads_properties() -> bool:
    symbols = subprocess.run(["nm", "-D", mosquitto_program()], capture_output=True, text=True, check=True).stdout
    return "mosquitto_property_read_string_pair" in symbols


async def test_mqtt_5_properties_are_in_the_frame(broker: Mosquitto) -> None:
    device = await connect_5(broker, "dev-5")
    await publish_5(device, "sensors/a", EXPIRY + PROPERTIES)
    (frame,) = broker.frames(RULE)
    assert frame.payload == b"body"
    if reads_properties():
        # Mosquitto takes the expiry out before it asks plugins.
        assert frame.properties == PROPERTIES
        assert frame.mqtt_properties == MqttProperties("text/plain", None, (("k", "v\u00fc"), ("k", "")))
    else:
        assert frame.mqtt_properties is None
        assert "lets no plugin read MQTT 5 properties" in broker.log.read_text()
    await device.drop()


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (EXPIRY + PROPERTIES, PROPERTIES),
        # MQTT 5 forbids wildcards there; Mosquitto 2.0 does not look.
        (b"\x08" + text("reply/#") + b"\x26" + text("k") + text("v"), b"\x26" + text("k") + text("v")),
    ],
)
async def test_p2p_that_is_handed_over_at_once_has_its_mqtt_5_properties(
    sent: bytes, got: bytes, broker: Mosquitto, sidecar: Sidecar
) -> None:
    if not reads_properties():
        pytest.skip("this build of Mosquitto lets no plugin read MQTT 5 properties")
    welcome = await sidecar.answer(WELCOME, sidecar.send(Operation(HELLO)))
    if welcome.body[16] & 1 and b"#" in sent:
        pytest.skip("Mosquitto 2.1 closes the connection")
    device = await connect_5(broker, "dev-5")
    await publish_5(device, "devices/p2p/dev-5", sent)
    message = only(await device.wait_messages(1))
    assert message.payload == bytes((len(got),)) + got + b"body"
    await device.drop()


async def test_an_mqtt_5_client_is_told_what_was_not_taken(broker: Mosquitto, sidecar: Sidecar) -> None:
    await sidecar.table(table_of({RULE: "sensors"}, max_bytes=1000, payload_bytes=600))
    device = await connect_5(broker, "dev-5")

    def publish(number: int, size: int) -> None:
        device.send(packet(0x32, text("sensors/a") + struct.pack("!H", number) + b"\0" + b"x" * size))

    publish(1, 601)
    assert (await device.wait_packet(PUBACK, 1)).body[2] == 0x87
    publish(2, 500)
    assert len((await device.wait_packet(PUBACK, 2)).body) == 2
    publish(3, 500)
    await device.wait_closed()
    assert [found.kind for found in device.packets] == [14]
    await device.drop()


async def test_a_v5_session_that_outlives_its_connection_is_seen_to_go(broker: Mosquitto) -> None:
    device = await connect_5(broker, "dev-5", b"\x11\x00\x00\x0e\x10")
    await broker.event("connect", "dev-5")
    device.abort()
    await broker.event("tcpclean", "dev-5")


async def test_the_clean_session_flag(broker: Mosquitto) -> None:
    for client_id, clean in (("dev-1", True), ("dev-2", False)):
        device = await broker.connect(client_id, clean=clean)
        await device.publish("sensors/a", b"x", qos=1)
        await device.drop()
    flags = [(frame.client_id, frame.clean_session) for frame in broker.frames(RULE)]
    assert flags == [("dev-1", True), ("dev-2", False)]


async def test_a_second_broker_on_the_same_spool_takes_nothing(broker: Mosquitto) -> None:
    other = Mosquitto(broker.directory, broker.hook)
    other.log = broker.directory / "other.log"
    await other.start()
    device = await other.connect("dev-1")
    device.send(publish_packet("sensors/a", b"x", qos=1, packet_id=1))
    await device.wait_closed()
    await device.drop()
    await other.stop()
    for lane in (".clients", RULE):
        assert f"{lane}: process {broker.process.pid} is already its writer; stop it" in other.log.read_text()
    assert broker.frames(RULE) == []


async def test_more_lanes_than_descriptors_leave_room_for_clients(broker: Mosquitto, sidecar: Sidecar) -> None:
    resource.prlimit(broker.process.pid, resource.RLIMIT_NOFILE, (64, 64))
    good, text_ = await sidecar.table(table_of({f"r-{number}": f"parent-{number}" for number in range(40)}))
    assert good
    # Three descriptors each, of three quarters of 64; one of them is that of kept P2P.
    assert text_.count("no descriptors left for more lanes") == 40 + 1 - 16
    device = await broker.connect("dev-1")
    await device.publish("parent-0/a", b"1", qos=1)
    assert broker.payloads("r-0") == [b"1"]
    await device.drop()


async def test_a_denied_publish_does_not_make_the_sidecars_message_a_will(guarded: Mosquitto) -> None:
    await guarded.start()
    sidecar = await Sidecar.connect(guarded, parents=["sensors"])
    device = await guarded.connect("dev-1", username="alice", password="secret")  # noqa: S106 - the test's own
    guarded.process.send_signal(signal.SIGSTOP)
    # Mosquitto reads both at once: what the sidecar publishes is routed after the device was denied the same.
    number = sidecar.send(Operation(PUBLISH, 1, b"", b"sensors/forbidden", b"", b"P"))
    await asyncio.sleep(0.2)
    device.send(publish_packet("sensors/forbidden", b"P"))
    await asyncio.sleep(0.2)
    guarded.process.send_signal(signal.SIGCONT)
    assert list((await sidecar.answer(2, number)).body) == [1]
    assert guarded.frames(RULE) == []
    for client in (device, sidecar.client):
        await client.drop()
