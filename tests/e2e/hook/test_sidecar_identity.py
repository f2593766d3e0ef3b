"""Who is taken for the sidecar: nobody by what a client can claim of itself."""

import asyncio
import base64
import os
import socket
from pathlib import Path

import pytest

from mq2mqtt.quickstart.ports import free_port
from tests.certificates import Authority
from tests.e2e.hook.mosquitto import DELIVERED, SIDECAR, Mosquitto, Sidecar, only, table_of
from tests.e2e.hook.test_listeners import tls_client
from tests.mqtt_client import connect_packet
from tests.unit.hook.batches import DELIVER, Operation, batch
from tests.waiting import until

pytestmark = pytest.mark.e2e


async def web_connack(port: int, connect: bytes, *headers: str) -> int:
    """Send CONNECT by a WebSocket; return the code of CONNACK."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        *("GET /mqtt HTTP/1.1", "Host: localhost", "Upgrade: websocket", "Connection: Upgrade"),
        *(f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Protocol: mqtt", *headers, "", ""),
    ]
    writer.write("\r\n".join(lines).encode())
    async with asyncio.timeout(20):
        await reader.readuntil(b"\r\n\r\n")
        # A masked binary frame; the mask is zero.
        writer.write(bytes((0x82, 0x80 | len(connect))) + bytes(4) + connect)
        frame = await reader.readexactly(6)
    writer.close()
    assert frame[:4] == b"\x82\x04\x20\x02"
    return frame[5]


async def test_a_forwarded_address_is_no_unix_socket(stopped: Mosquitto) -> None:
    """Mosquitto takes a WebSocket client's word for the address that it comes from."""
    path, port = stopped.directory / "sidecar.sock", free_port()
    stopped.options["socket"] = str(path)
    stopped.lines += [f"listener {port} 127.0.0.1", "protocol websockets", f"listener 0 {path}"]
    await stopped.start()

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    await until(listens, what="the WebSocket listener")
    assert await web_connack(port, connect_packet("dev-1")) == 0
    assert await web_connack(port, connect_packet(SIDECAR), f"X-Forwarded-For: {path}") == 5


async def test_a_certificate_does_not_make_a_sidecar(stopped: Mosquitto, tmp_path: Path) -> None:
    """Mosquitto 2.0 asks no plugin about a client that its certificate identifies, whatever client id it takes."""
    authority, port = Authority(tmp_path / "certificates"), free_port()
    server = authority.issue("server")
    stopped.lines += [
        *(f"listener {port} 127.0.0.1", f"cafile {authority.ca}"),
        *(f"certfile {server.certificate}", f"keyfile {server.key}"),
        *("require_certificate true", "use_identity_as_username true"),
    ]
    (stopped.spool / "lanes.table").write_bytes(table_of({"telemetry-out": "sensors"}))
    await stopped.start()
    device = await stopped.connect("dev-1")
    forger = await tls_client(port, SIDECAR, authority, authority.issue("dev-2"))
    assert await forger.subscribe(("$mq2mqtt/v1/results", 0), ("sensors/#", 1), ("other/#", 1)) == [128, 128, 128]
    for topic in ("$CONTROL/mq2mqtt/v1", "sensors/a"):
        await forger.publish(topic, batch(Operation(DELIVER, 1, b"dev-1", b"forged", b"", b"x")), qos=1)
    sidecar = await Sidecar.connect(stopped)
    await forger.wait_closed()
    assert await sidecar.results(Operation(DELIVER, 1, b"dev-1", b"real", b"", b"x")) == [DELIVERED]
    assert only(await device.wait_messages(1)).topic == "real"
    assert (stopped.frames("telemetry-out"), forger.messages) == ([], [])
    for client in (device, forger, sidecar.client):
        await client.drop()
