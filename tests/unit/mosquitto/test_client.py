"""The connection to a broker, against a real Mosquitto without the hook."""

import asyncio
import contextlib
import gc
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Self

import pytest

from mq2mqtt.message import MqttProperties
from mq2mqtt.quickstart.ports import free_port
from mq2mqtt_mosquitto.client import NO_SUBSCRIBER, BrokerLimits, Incoming, Login, MqttClient, MqttError, Subscription
from tests.certificates import Authority
from tests.mosquitto import hook_library
from tests.plain_mosquitto import PlainMosquitto
from tests.unit.amqtt.world import until


class Broker:
    def __init__(self, directory: Path) -> None:
        self.port, self.tls_port, self.closed_port = free_port(), free_port(), free_port()
        self.socket = directory / "socket"
        self.authority = Authority(directory / "certificates")
        server = self.authority.issue("server")
        (directory / "passwords").touch(mode=0o600)
        lines = [
            "per_listener_settings true",
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous true",
            f"listener {self.tls_port} 127.0.0.1",
            "allow_anonymous true",
            f"cafile {self.authority.ca}",
            f"certfile {server.certificate}",
            f"keyfile {server.key}",
            "require_certificate true",
            f"listener 0 {self.socket}",
            "allow_anonymous true",
            f"listener {self.closed_port} 127.0.0.1",
            "allow_anonymous false",
            f"password_file {directory / 'passwords'}",
            "user root",
        ]
        (directory / "mosquitto.conf").write_text("\n".join(lines) + "\n")
        self.process = subprocess.Popen(["mosquitto", "-c", str(directory / "mosquitto.conf")])


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    hook_library()  # skips where there is no Mosquitto
    broker = Broker(tmp_path_factory.mktemp("broker"))
    yield broker
    broker.process.kill()
    broker.process.wait()


class Connection:
    """A client with what it received."""

    def __init__(self) -> None:
        self.received: list[Incoming] = []
        self.rooms = 0
        self.client: MqttClient

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.received]

    def room(self) -> None:
        self.rooms += 1


@contextlib.asynccontextmanager
async def connected(
    url: str, client_id: str, *, clean_start: bool = True, **options: object
) -> AsyncIterator[Connection]:
    connection = Connection()
    login = Login(url, client_id, clean_start=clean_start, **options)  # type: ignore[arg-type]
    # The broker has just been started.
    async with asyncio.timeout(20):
        while True:
            try:
                connection.client = await MqttClient.connect(
                    login, received=connection.received.append, room=connection.room
                )
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)
    try:
        yield connection
    finally:
        connection.client.close()


def tcp(broker: Broker) -> str:
    return f"mqtt://127.0.0.1:{broker.port}"


async def test_a_message_keeps_its_properties_and_tells_how_it_ended(broker: Broker) -> None:
    properties = MqttProperties(content_type="json", user=(("a", "1"), ("a", "2")))
    reasons: list[int] = []
    async with connected(tcp(broker), "reader") as reader, connected(tcp(broker), "writer") as writer:
        await reader.client.subscribe([Subscription("t/#", qos=1)])
        for qos in (0, 1, 2):
            writer.client.publish("t/1", b"%d" % qos, qos=qos, properties=properties, done=reasons.append)
        writer.client.publish("nobody", b"", qos=1, done=reasons.append)
        await until(lambda: len(reader.received) == 3 and len(reasons) == 4)
        assert sorted(reasons) == [0, 0, 0, NO_SUBSCRIBER]
        assert [(m.topic, m.payload, m.qos) for m in reader.received] == [
            ("t/1", b"0", 0),
            ("t/1", b"1", 1),
            ("t/1", b"2", 1),
        ]
        assert {m.properties for m in reader.received} == {properties}
        with pytest.raises(ValueError, match="wildcard"):
            writer.client.publish("t/+", b"")
        with pytest.raises(ValueError, match="a property does not fit"):
            writer.client.publish("t", b"", qos=1, properties=MqttProperties(expiry_seconds=1 << 32))


async def test_what_is_not_acknowledged_comes_again(broker: Broker) -> None:
    async with (
        connected(tcp(broker), "keeper", clean_start=False, receive_maximum=2) as keeper,
        connected(tcp(broker), "writer") as writer,
    ):
        assert not keeper.client.session_present
        await keeper.client.subscribe([Subscription("kept", qos=1)])
        for number in range(4):
            writer.client.publish("kept", b"%d" % number, qos=1)
        await until(lambda: len(keeper.received) == 2)
        keeper.client.acknowledge(keeper.received[0])
        await until(lambda: len(keeper.received) == 3)
    async with connected(tcp(broker), "keeper", clean_start=False) as keeper:
        assert keeper.client.session_present
        await until(lambda: len(keeper.received) == 3)
        assert keeper.payloads == [b"1", b"2", b"3"]
    async with connected(tcp(broker), "keeper", session_expiry=0) as keeper:
        assert not keeper.client.session_present


async def test_subscriptions_end_and_can_leave_out_ones_own(broker: Broker) -> None:
    async with connected(tcp(broker), "one") as one:
        one.client.publish("own/kept", b"kept", retain=True)
        await one.client.subscribe([Subscription("own/#", no_local=True)])
        one.client.publish("own/1", b"own")
        await one.client.subscribe([Subscription("own/kept", no_local=True, retained=True)])
        await until(lambda: one.payloads == [b"kept"])
        assert one.received[0].retain
        await one.client.unsubscribe(["own/#", "own/kept"])
        async with connected(tcp(broker), "other") as other:
            other.client.publish("own/2", b"late", qos=1, done=lambda _: one.client.publish("end", b""))
            await one.client.subscribe([Subscription("end")])
            await until(lambda: len(one.received) == 2)
        assert one.payloads == [b"kept", b""]


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
async def test_tls_with_a_certificate_of_ones_own(broker: Broker) -> None:
    own = broker.authority.issue("client")
    trusting = ssl.create_default_context(cafile=broker.authority.ca)
    trusting.load_cert_chain(own.certificate, own.key)
    url = f"mqtts://127.0.0.1:{broker.tls_port}"
    async with connected(tcp(broker), "plain") as plain, connected(url, "tls", tls=trusting) as tls:
        await tls.client.subscribe([Subscription("big", qos=1), Subscription("small")])
        # Longer than what TLS decrypts at once, and many in what it does.
        for number in range(100):
            plain.client.publish("small", b"%d" % number)
        plain.client.publish("big", bytes(300_000), qos=1)
        await until(lambda: len(tls.received) == 101)
        assert tls.payloads[:100] == [b"%d" % number for number in range(100)]
        await plain.client.subscribe([Subscription("back")])
        tls.client.publish("back", bytes(300_000))
        await until(lambda: plain.payloads == [bytes(300_000)])
    with pytest.raises(ssl.SSLCertVerificationError):
        await MqttClient.connect(Login(url, "stranger"), received=print, room=unneeded)
    wrong_name = Login(url.replace("127.0.0.1", "localhost"), "wrong name", tls=trusting)
    with pytest.raises(ssl.SSLCertVerificationError):
        await MqttClient.connect(wrong_name, received=print, room=unneeded)
    trusting.check_hostname = False
    (await MqttClient.connect(wrong_name, received=print, room=unneeded)).close()
    gc.collect()


async def test_a_unix_socket(broker: Broker) -> None:
    async with connected(tcp(broker), "reader") as reader, connected(f"unix://{broker.socket}", "writer") as writer:
        await reader.client.subscribe([Subscription("u")])
        writer.client.publish("u", b"1")
        await until(lambda: reader.payloads == [b"1"])


async def test_why_it_ended(broker: Broker) -> None:
    async with connected(tcp(broker), "twice") as first, connected(tcp(broker), "twice"):
        # Later versions of Mosquitto say why.
        assert await first.client.closed in {"the broker closed the connection", "the broker says: Session taken over"}
        with pytest.raises(MqttError, match="closed"):
            await first.client.subscribe([Subscription("t")])
        first.client.publish("t", b"nobody gets it")
    refused = Login(f"mqtt://127.0.0.1:{broker.closed_port}", "who", username="nobody", password="wrong")  # noqa: S106
    with pytest.raises(MqttError, match="the broker refuses client id who: Not authorized"):
        await MqttClient.connect(refused, received=print, room=unneeded)


class Pretender:
    """Answers the first thing that is said to it, and listens no more."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self.port = free_port()
        self._hangs_up, self._has_hung_up = asyncio.Event(), asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1)
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(self._answer)
        await self._hangs_up.wait()
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        self._has_hung_up.set()

    async def __aexit__(self, *_: object) -> None:
        await self.hang_up()
        self._server.close()
        await self._server.wait_closed()

    async def hang_up(self) -> None:
        self._hangs_up.set()
        await self._has_hung_up.wait()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n" + bytes(100), "before it let anybody in"),
        (b"\x20\x02\0\x01", "Unsupported protocol version"),
        (b"\x20\x09\0\0\x06\x26\0\xff\0\x01a", "before it let anybody in"),
    ],
)
async def test_who_is_no_broker(answer: bytes, problem: str) -> None:
    async with Pretender(answer) as pretender:
        with pytest.raises(MqttError, match=problem):
            await MqttClient.connect(Login(f"mqtt://127.0.0.1:{pretender.port}", "a"), received=print, room=unneeded)


async def test_a_goodbye_of_the_broker() -> None:
    said = b"\x20\x03\0\0\0" + b"\xe0\x02\x8b\0"
    async with Pretender(said) as pretender, connected(f"mqtt://127.0.0.1:{pretender.port}", "a") as one:
        assert await one.client.closed == "the broker says: Server shutting down"


async def test_it_is_full_while_the_broker_does_not_read() -> None:
    async with Pretender(b"\x20\x03\0\0\0") as pretender, connected(f"mqtt://127.0.0.1:{pretender.port}", "a") as one:
        client = one.client
        client.publish("t", bytes(1 << 20))
        assert not client.is_full
        for _ in range(16):
            client.publish("t", bytes(1 << 20))
        # What the kernel takes is sent by then.
        await asyncio.sleep(0.2)
        assert client.is_full
        assert one.rooms == 0
        await pretender.hang_up()
        assert await client.closed == "the broker closed the connection"


async def test_there_is_room_again_when_all_is_sent(broker: Broker) -> None:
    async with connected(tcp(broker), "writer") as writer:
        for _ in range(4):
            writer.client.publish("t", bytes(1 << 20))
        assert writer.client.is_full
        await until(lambda: writer.rooms == 1)
        assert not writer.client.is_full


def unneeded() -> None:
    """Nobody waits for room."""


async def test_a_text_that_paho_refuses_and_mqtt_allows(broker: Broker) -> None:
    async with connected(tcp(broker), "odd") as odd:
        await odd.client.subscribe([Subscription("odd", qos=1)])
        for number in range(2):
            properties = MqttProperties(user=(("\ufeffname", "a\ufeffb"),), content_type="\ufeff")
            odd.client.publish("odd", b"%d" % number, qos=1, properties=properties)
        await until(lambda: odd.payloads == [b"0", b"1"])
        assert odd.received[0].properties == properties


async def test_what_the_broker_takes_and_grants(tmp_path: Path) -> None:
    plain = PlainMosquitto(tmp_path, options=("max_qos 1", "max_inflight_messages 7", "max_packet_size 2000"))
    plain.start()
    try:
        async with connected(plain.url, "limited") as limited:
            assert limited.client.limits == BrokerLimits(qos=1, receive_maximum=7, packet_bytes=2000)
            assert await limited.client.subscribe(
                [Subscription("a/#", qos=2), Subscription("b", as_published=True)]
            ) == [1, 0]
            limited.client.publish("a/x", b"retained", retain=True)
            await until(lambda: limited.payloads == [b"retained"])
            assert not limited.received[0].retain
            limited.client.publish("b", b"flagged", retain=True)
            await until(lambda: limited.payloads == [b"retained", b"flagged"])
            assert limited.received[1].retain
    finally:
        plain.kill()
