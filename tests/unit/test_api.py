"""The API over HTTP, on a bridge between the in-process link and host."""

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from mq2mqtt.admin import guard
from mq2mqtt.spool.frame import Frame, FrameKind
from mq2mqtt.spool.parked import ParkedStore, keys_of
from tests.unit.bridge_world import IN, OUT, World, until

ODD_IDS = ["GID_dev@@@1", "a/b", "%2F", "ä ö", "..", "{x}", "a+b", "#?&=", "\u2028", "💡", "'\"<script>"]
BEARER = Frame(FrameKind.PUBLISH, 1, 5_000, "dev", "sensors/a", b"", b"\x00body\xff")
ROCKET = Frame(FrameKind.ROCKETMQ, 0, 5_000, "", "mq_commands", b"mqttSecondTopic\x01/a\x02TAGS\x01MQ2MQTT\x02", b"on")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> Any:  # noqa: ANN401 - JSON
        assert self.headers["content-type"] == "application/json; charset=utf-8", self.body
        return json.loads(self.body)

    @property
    def error(self) -> str:
        assert set(self.content) == {"error"}
        return str(self.content["error"])


async def ask_raw(world: World, request: bytes) -> Answer:
    """Send exactly these bytes, as no client library would, and read one answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.bridge.admin.port)
    try:
        writer.write(request)
        data = await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(int(status.split()[1]), headers, body)


async def ask(world: World, path: str, *, method: str = "GET", **headers: str) -> Answer:
    """Send a request; a header's name is written with `_` for `-`, an empty value leaves it out."""
    fields = {"Host": f"127.0.0.1:{world.bridge.admin.port}", "Connection": "close"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items() if value)]
    return await ask_raw(world, "\r\n".join([*lines, "", ""]).encode("latin-1"))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with World(tmp_path / "spool", OUT, IN) as world:
        yield world


# -- sessions --


async def test_a_client_that_is_connected(world: World) -> None:
    client = world.host.connect("GID_dev@@@1", clean_session=False)
    content = (await ask(world, "/api/v1/sessions/GID_dev%40%40%401")).content
    connection = world.bridge.presence.connections["GID_dev@@@1"]
    assert content == {
        "clientId": "GID_dev@@@1",
        "online": True,
        "channelId": client.channel_id,
        "clientIp": connection.client_ip,
        "connectedAt": connection.connected_ms,
        "cleanSession": False,
        "offlineMessages": 0,
        "history": content["history"],
    }


@pytest.mark.parametrize("client_id", ODD_IDS)
async def test_any_client_id_can_be_asked_for(world: World, client_id: str) -> None:
    for online in (False, True):
        if online:
            world.host.connect(client_id)
        one = (await ask(world, f"/api/v1/sessions/{quote(client_id, safe='')}")).content
        assert (one["clientId"], one["online"]) == (client_id, online)
        (other,) = (await ask(world, f"/api/v1/sessions?clientId={quote(client_id, safe='')}")).content["sessions"]
        assert other == {name: value for name, value in one.items() if name != "history"}


async def test_up_to_ten_clients_at_once_in_the_order_asked_for(world: World) -> None:
    world.host.connect("b")
    query = "&".join(f"clientId={name}" for name in "cbabdefghi")
    sessions = (await ask(world, f"/api/v1/sessions?{query}")).content["sessions"]
    assert [session["clientId"] for session in sessions] == list("cbabdefghi")
    assert [session["online"] for session in sessions] == [name == "b" for name in "cbabdefghi"]
    answer = await ask(world, f"/api/v1/sessions?{query}&clientId=j")
    assert (answer.status, answer.error) == (400, "clientId: 11 of them, at most 10 can be asked for at once")


async def test_who_is_online_is_paged_in_the_order_of_ids(world: World) -> None:
    for name in ("d", "b", "a/x", "e", "c"):
        world.host.connect(name)
    world.host.disconnect("e")
    found: list[str] = []
    after = ""
    for _ in range(3):
        content = (await ask(world, f"/api/v1/sessions?limit=2{after}")).content
        found += [session["clientId"] for session in content["sessions"]]
        if content["next"] is None:
            break
        after = f"&after={quote(content['next'], safe='')}"
    assert found == ["a/x", "b", "c", "d"]
    assert content["next"] is None


async def test_while_the_broker_is_away_nobody_is_said_to_be_online_or_not(world: World) -> None:
    world.host.connect("a")
    world.host.go_away("Mosquitto does not answer")
    for path in ("/api/v1/sessions/a", "/api/v1/sessions", "/api/v1/sessions?clientId=a"):
        answer = await ask(world, path)
        assert (answer.status, answer.error) == (503, "who is connected is not known: Mosquitto does not answer")
    world.host.come_back()
    world.host.sees_clients = False  # as a plain MQTT client
    answer = await ask(world, "/api/v1/sessions/a")
    assert answer.status == 501
    assert "cannot see who is connected" in answer.error


async def test_before_the_host_has_said_who_is_connected_nobody_is_said_to_be(tmp_path: Path) -> None:
    world = World(tmp_path, OUT)
    await world.bridge.admin.start()
    answer = await ask(world, "/api/v1/sessions/a")
    assert (answer.status, answer.error) == (503, "who is connected is not known: the bridge is starting")
    await world.bridge.stop()


# -- parked messages --


def park(world: World, rule: str, frame: Frame, *keys: str) -> Path:
    store = ParkedStore(world.directory / rule, max_bytes=1 << 20)
    for key in keys:
        store.append(frame, key=key, reason="why")
    return world.directory / rule


async def test_parked_messages_are_counted_listed_and_shown(world: World) -> None:
    assert (await ask(world, "/api/v1/parked")).content == {"parked": []}
    park(world, "sensors-out", BEARER, "1", "2", "3")
    lane = park(world, "commands-in", ROCKET, "broker-a/0/7")
    (lane / "parked" / "x.parked").write_bytes(b"damaged")
    content = (await ask(world, "/api/v1/parked")).content
    assert content == {
        "parked": [{"rule": "commands-in", "messages": 2}, {"rule": "sensors-out", "messages": 3}],
    }
    page = (await ask(world, "/api/v1/parked/sensors-out?limit=2")).content
    assert ([message["key"] for message in page["messages"]], page["next"]) == (["1", "2"], "2")
    page = (await ask(world, "/api/v1/parked/sensors-out?limit=2&after=2")).content
    assert ([message["key"] for message in page["messages"]], page["next"]) == (["3"], None)
    good, damaged = (await ask(world, "/api/v1/parked/commands-in")).content["messages"]
    assert (damaged["key"], damaged["state"]) == ("x", "damaged")
    assert "damaged; restore it or move it away" in damaged["reason"]
    assert (good["kind"], good["topic"], good["state"]) == ("rocketmq", "mq_commands", "parked")

    whole = (await ask(world, "/api/v1/parked/sensors-out/2")).content
    assert whole.pop("parkedAt") > 1_600_000_000_000
    assert base64.b64decode(whole.pop("payloadBase64")) == BEARER.payload
    assert whole == {
        "key": "2",
        "state": "parked",
        "reason": "why",
        "kind": "mqtt",
        "topic": "sensors/a",
        "clientId": "dev",
        "acceptedAt": 5,
        "payloadBytes": 6,
        "qos": 1,
        "retain": False,
        "cleanSession": False,
        "will": False,
        "propertiesBase64": "",
    }
    whole = (await ask(world, "/api/v1/parked/commands-in/broker-a%2F0%2F7")).content
    assert whole["properties"] == {"mqttSecondTopic": "/a", "TAGS": "MQ2MQTT"}
    assert (await ask(world, "/api/v1/parked/commands-in/x")).status == 409


async def test_whatever_a_producer_said_is_shown(world: World) -> None:
    frame = ROCKET._replace(accepted_us=2**64 - 1, topic="t\udcc4", properties=b"mqttSecondTopic\x01/\xc4\x02")
    park(world, "commands-in", frame, "broker-a/0/7")
    (listed,) = (await ask(world, "/api/v1/parked/commands-in")).content["messages"]
    assert listed["acceptedAt"] == (2**64 - 1) // 1000
    whole = (await ask(world, "/api/v1/parked/commands-in/broker-a%2F0%2F7")).content
    assert whole["properties"] == {"mqttSecondTopic": "/\N{REPLACEMENT CHARACTER}"}


async def test_a_parked_receipt_is_shown_as_one(world: World) -> None:
    park(world, "commands-in.receipts", ROCKET._replace(topic="devices/a"), "5")
    (receipt,) = (await ask(world, "/api/v1/parked/commands-in.receipts")).content["messages"]
    assert (receipt["kind"], receipt["topic"]) == ("receipt", "devices/a")
    whole = (await ask(world, "/api/v1/parked/commands-in.receipts/5")).content
    assert (whole["kind"], whole["properties"]["TAGS"]) == ("receipt", "MQ2MQTT")


async def test_a_parked_message_is_replayed(world: World) -> None:
    device = world.host.connect("c1")
    device.subscriptions["devices/#"] = 1
    out, back = park(world, "sensors-out", BEARER, "1", "2"), park(world, "commands-in", ROCKET, "broker-a/0/7")
    for path, key in (("sensors-out/2", "2"), ("commands-in/broker-a%2F0%2F7", "broker-a/0/7")):
        answer = await ask(world, f"/api/v1/parked/{path}/replay", method="POST")
        assert answer.status == 202
        assert answer.content == {"rule": path.partition("/")[0], "key": key, "state": "replay"}
    await until(lambda: world.sent() == [BEARER.payload] and [m.payload for m in device.received] == [b"on"])
    await until(lambda: (keys_of(out), keys_of(back)) == (["1"], []))


async def test_a_parked_message_is_dropped(world: World) -> None:
    lane = park(world, "sensors-out", BEARER, "1", "2")
    answer = await ask(world, "/api/v1/parked/sensors-out/1", method="DELETE")
    assert (answer.status, answer.content["state"], keys_of(lane)) == (200, "dropped", ["2"])
    answer = await ask(world, "/api/v1/parked/sensors-out/1", method="DELETE")
    assert (answer.status, answer.error) == (404, "there is no parked message 1 of sensors-out")


async def test_a_replay_without_a_way_to_go_is_refused(world: World) -> None:
    park(world, "gone", BEARER, "1")
    park(world, "commands-in", BEARER, "1")
    damaged = park(world, "sensors-out", BEARER, "1") / "parked" / "1.parked"
    damaged.write_bytes(b"damaged")
    for rule, words in (
        ("gone", "no rule gone in the configuration"),
        ("commands-in", "parked by a rule of type outbound, and commands-in is of type inbound now"),
        ("sensors-out", "1.parked: damaged; restore it or move it away"),
    ):
        answer = await ask(world, f"/api/v1/parked/{rule}/1/replay", method="POST")
        assert answer.status == 409
        assert words in answer.error
        assert keys_of(world.directory / rule) == ["1"]


@pytest.mark.parametrize("rule", ["nope", "..", "%2e%2e", "..%2F..", ".", "x" * 300])
async def test_nothing_outside_the_lanes_is_reached(world: World, rule: str) -> None:
    outside = world.directory.parent / "parked"
    outside.mkdir()
    (outside / "1.parked").write_bytes(b"")
    for path, method in ((rule, "GET"), (f"{rule}/1", "GET"), (f"{rule}/1", "DELETE"), (f"{rule}/1/replay", "POST")):
        answer = await ask(world, f"/api/v1/parked/{path}", method=method)
        assert answer.status == 404
        assert answer.error
    assert (outside / "1.parked").exists()


@pytest.mark.parametrize("key", ["nope", "x" * 300, "..%2F..%2Fcursor", "%2e%2e", "..", "1.parked"])
async def test_an_unknown_key_is_404(world: World, key: str) -> None:
    park(world, "sensors-out", BEARER, "1")
    for path, method in ((key, "GET"), (key, "DELETE"), (f"{key}/replay", "POST")):
        answer = await ask(world, f"/api/v1/parked/sensors-out/{path}", method=method)
        assert answer.status == 404
        assert "there is no parked message" in answer.error


# -- requests that are wrong --


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/sessions?limit=0", "limit: '0' is no number from 1 to 1000"),
        ("/sessions?limit=1001", "limit: '1001'"),
        ("/sessions?limit=%D9%A3", "limit: '٣'"),
        (f"/sessions?limit={'9' * 5000}", "limit: "),
        ("/sessions?limit=1&limit=2", "limit: give it once"),
        ("/sessions?clientId=", "clientId: empty"),
        ("/sessions?clientId=a&limit=1", "clientId: use it alone"),
        ("/sessions?clientid=a", "unknown parameter 'clientid': use clientId, after, limit"),
        ("/sessions/a?x=1", "unknown parameter 'x': use none"),
        ("/sessions/%ff%fe", "the URL is no percent-encoded UTF-8"),
        ("/sessions/a%00b", "the URL is no percent-encoded UTF-8"),
        ("/sessions/100%", "the URL is no percent-encoded UTF-8"),
        ("/sessions?after=%ED%A0%80", "the URL is no percent-encoded UTF-8"),
        ("/parked/sensors-out?limit=x", "limit: 'x'"),
        ("/parked?limit=1", "unknown parameter 'limit'"),
    ],
)
async def test_bad_input_is_400_with_one_clear_text(world: World, path: str, words: str) -> None:
    answer = await ask(world, f"/api/v1{path}")
    assert answer.status == 400
    assert words in answer.error
    assert "\n" not in answer.error


async def test_paths_and_methods_that_do_nothing(world: World) -> None:
    for path in ("/api", "/api/", "/api/v2/sessions", "/api/v1/sessions/", "/api/v1/sessions/a/b", "/api/v1/parked/a/"):
        answer = await ask(world, path)
        assert (answer.status, answer.error) == (404, "there is nothing at this path: see docs/api.md")
    answer = await ask(world, "/api/v1/sessions/a", method="DELETE")
    assert (answer.status, answer.error) == (405, "DELETE does nothing here: use GET, HEAD")
    assert answer.headers["allow"] == "GET, HEAD"


async def test_what_is_no_http_is_400_and_leaves_no_traceback_in_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    for request in (
        b"garbage\r\n\r\n",
        b"GET /api/v1/sessions/\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ):
        assert (await ask_raw(world, request)).status == 400
    assert [record.name for record in caplog.records if record.levelname == "ERROR"] == []


# -- who may ask --


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9883", "LOCALHOST", "[::1]:9883", "127.8.8.8:1"])
async def test_this_machine_may_ask(world: World, host: str) -> None:
    answer = await ask(world, "/api/v1/sessions", Host=host)
    assert answer.status == 200
    assert answer.headers["cache-control"] == "no-store"
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:9883"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost.evil.example"},
        {"Host": "127.0.0.1@evil.example"},
        {"Host": "192.0.2.1"},
        {"Host": "[::1"},
        {"Host": "example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"X_Forwarded_For": "192.0.2.1"},
        {"Forwarded": "for=192.0.2.1"},
    ],
    ids=str,
)
async def test_nobody_else_may_ask(world: World, headers: dict[str, str]) -> None:
    lane = park(world, "sensors-out", BEARER, "1")
    for path, method in (
        ("/api/v1/sessions", "GET"),
        ("/api/nothing", "GET"),
        ("/api/v1/parked/sensors-out/1", "DELETE"),
        ("/api/v1/parked/sensors-out/1/replay", "POST"),
        ("/%61pi/v1/parked/sensors-out/1/replay", "POST"),
        ("/api/v1/sessions", "OPTIONS"),
    ):
        answer = await ask(world, path, method=method, **headers)
        assert (answer.status, "the API answers" in answer.error) == (403, True)
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert ParkedStore(lane, max_bytes=1).replays() == []
    assert keys_of(lane) == ["1"]
    # Whoever reaches the port may see whether the bridge works.
    for path in ("/metrics", "/healthz"):
        assert (await ask(world, path, **headers)).status in {200, 400}


async def test_a_request_without_a_host_or_with_two_is_refused(world: World) -> None:
    assert (await ask_raw(world, b"GET /api/v1/sessions HTTP/1.0\r\n\r\n")).status == 403
    twice = b"GET /api/v1/sessions HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\nConnection: close\r\n\r\n"
    assert (await ask_raw(world, twice)).status in {400, 403}


async def test_another_machine_is_refused_whatever_it_says(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in ("192.0.2.1", "10.0.0.1", "::ffff:192.0.2.1", "fe80::1", ""):
        monkeypatch.setattr(guard, "_peer", lambda _, peer=peer: peer)
        answer = await ask(world, "/api/v1/sessions")
        assert answer.status == 403
        assert "programs on this machine only, until tokens come" in answer.error
    for peer in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        monkeypatch.setattr(guard, "_peer", lambda _, peer=peer: peer)
        assert (await ask(world, "/api/v1/sessions")).status == 200


async def test_whatever_is_asked_gets_an_answer_and_harms_nothing(world: World) -> None:
    lane = park(world, "sensors-out", BEARER, "1")
    dice = random.Random(7)  # noqa: S311 - no secret
    parts = [
        "api",
        "v1",
        "sessions",
        "parked",
        "sensors-out",
        "1",
        "replay",
        "..",
        ".",
        "",
        "%2e%2e",
        "%2F",
        "%",
        "%00",
    ]
    parts += [
        "?",
        "limit=1",
        "&",
        "clientId=",
        "after",
        "=",
        "a" * 200,
        "%ff",
        "{key}",
        "*",
        "\\",
        ";",
        "~",
        "'",
        "%25",
    ]
    methods = ["GET", "POST", "PUT", "HEAD", "OPTIONS", "PATCH", "TRACE"]
    for _ in range(300):
        path = "/api/v1" * dice.randint(0, 1) + "".join(
            dice.choice(["/", "", "?"]) + dice.choice(parts) for _ in range(dice.randint(0, 7))
        )
        method = dice.choice(methods)
        answer = await ask(world, path if path.startswith("/") else f"/{path}", method=method)
        assert answer.status < 500, (method, path, answer)
        if path.startswith("/api/") and answer.status >= 400 and method != "HEAD":
            assert answer.error, (method, path)
    if keys_of(lane) != ["1"]:
        await until(lambda: world.sent() == [BEARER.payload])
    assert (await ask(world, "/api/v1/sessions")).status == 200
