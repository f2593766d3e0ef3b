"""A client of a real Mosquitto without the hook: what it fetches, acknowledges and publishes, and what goes wrong."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from mq2mqtt.host import Delivery
from mq2mqtt.message import MqttMessage, MqttProperties
from mq2mqtt.rules import InboundRule, OutboundRule, Rule, RuleSet
from mq2mqtt.settings import Settings
from mq2mqtt.telemetry import Direction, RuleTelemetry, Telemetry
from mq2mqtt_mosquitto.client import Login, MqttClient
from mq2mqtt_mqtt.feed import UNACKNOWLEDGED
from mq2mqtt_mqtt.host import SESSIONS_FILE, ClientHost
from tests.mqtt_client import Client
from tests.plain_mosquitto import PlainMosquitto
from tests.unit.amqtt.world import ListIntake, until

DYNAMIC_SECURITY = next(Path("/usr/lib").glob("*/mosquitto_dynamic_security.so"), None)


def out(parent: str, *, rule_id: str | None = None, enabled: bool = True) -> OutboundRule:
    return OutboundRule(id=rule_id or parent, type="outbound", source=parent, target="mq", enabled=enabled)


def into(parent: str) -> InboundRule:
    return InboundRule(id=f"{parent}-in", type="inbound", source="mq", target=parent)


class World:
    """A host, and lanes that are lists: `lane-a` is the lane of what comes under `lane-a`."""

    def __init__(self, broker: PlainMosquitto, directory: Path, **host: Any) -> None:  # noqa: ANN401 - settings
        self.broker = broker
        self.telemetry = Telemetry()
        settings: dict[str, Any] = {
            "host": {"type": "mqtt", "url": broker.url, **host},
            "spool": {"path": directory / "spool"},
        }
        self.host = ClientHost(Settings(**settings))
        self.intake = ListIntake()
        self.host.intake, self.host.telemetry = self.intake, self.telemetry
        self.deliveries = list[Delivery]()

    async def start(self, *rules: Rule) -> None:
        self.host.go_by(RuleSet(rules))
        self.host.start()
        await self.working(*rules)

    async def working(self, *rules: Rule) -> None:
        self.host.go_by(RuleSet(rules))
        await until(lambda: not any(self.problems(*rules)))

    def problems(self, *rules: Rule) -> list[str | None]:
        return [self.host.problem, *(self.host.problem_of(rule.id) for rule in rules)]

    def payloads(self, lane: str) -> list[bytes]:
        return [message.payload for message in self.intake.lane(lane)]

    def publish(self, topic: str, payload: bytes, *, qos: int = 1) -> None:
        self.host.publish(MqttMessage(topic, payload, qos), self.deliveries.append, handed=lambda: None)

    async def settled(self, count: int) -> list[tuple[str, str | None]]:
        await until(lambda: len(self.deliveries) == count)
        return [(delivery.outcome.value, delivery.reason and delivery.reason.value) for delivery in self.deliveries]


@contextlib.asynccontextmanager
async def world(broker: PlainMosquitto, directory: Path, *rules: Rule, **host: Any) -> AsyncIterator[World]:  # noqa: ANN401
    made = World(broker, directory, **host)
    try:
        await made.start(*rules)
        yield made
    finally:
        await made.host.stop()


@contextlib.asynccontextmanager
async def device(broker: PlainMosquitto, client_id: str = "device") -> AsyncIterator[Client]:
    client = await Client.connect(broker.port, client_id)
    try:
        yield client
    finally:
        await client.drop()


@contextlib.contextmanager
def started(directory: Path, *options: str) -> Iterator[PlainMosquitto]:
    broker = PlainMosquitto(directory / "broker", options=options)
    broker.start()
    try:
        yield broker
    finally:
        broker.kill()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[PlainMosquitto]:
    with started(tmp_path) as running:
        yield running


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged."""
    written: list[str] = []
    handler = logger.add(lambda message: written.append(message.record["message"]), level="INFO")
    yield written
    logger.remove(handler)


async def test_what_devices_publish_comes_with_what_a_client_is_told(broker: PlainMosquitto, tmp_path: Path) -> None:
    properties = MqttProperties("text/plain", None, (("a", "1"), ("a", "\ufeff2")))
    async with device(broker) as early:
        await early.publish("lane-a/x", b"before the first subscription", qos=1, retain=True)
    async with world(broker, tmp_path, out("lane-a")) as here, device(broker) as writer:
        for qos in (0, 1, 2):
            await writer.publish("lane-a/x", b"%d" % qos, qos=qos, retain=qos == 1)
        await writer.publish("lane-a", b"the parent itself", qos=1)
        await writer.publish("lane-b/x", b"nobody's", qos=1)
        login = Login(broker.url, "five", clean_start=True, session_expiry=0)
        five = await MqttClient.connect(login, received=print, room=print)
        five.publish("lane-a/5", b"five", qos=1, properties=properties)
        await until(lambda: len(here.intake.lane("lane-a")) == 5)
        five.close()
        assert here.intake.lane("lane-a") == [
            MqttMessage("lane-a/x", b"0", 0),
            MqttMessage("lane-a/x", b"1", 1, retain=True),
            MqttMessage("lane-a/x", b"2", 1),
            MqttMessage("lane-a", b"the parent itself", 1),
            MqttMessage("lane-a/5", b"five", 1, properties=properties),
        ]
        # A device that sends to another one needs nobody in between.
        await writer.publish("lane-a/p2p/other", b"private", qos=1, retain=True)
        await until(lambda: here.payloads("lane-a")[-1] == b"private")
        assert not here.intake.lane("lane-a")[-1].retain
        assert here.intake.private == []


async def test_its_own_messages_do_not_come_back(broker: PlainMosquitto, tmp_path: Path) -> None:
    async with world(broker, tmp_path, out("lane-a"), into("lane-a"), into("lane-b")) as here, device(broker) as reader:
        await reader.subscribe(("#", 2))
        for number in range(3):
            here.publish("lane-a/x", b"%d" % number, qos=number)
        here.publish("lane-b/x", b"elsewhere")
        here.host.deliver("d1", MqttMessage("lane-a/shown", b"p2p", 1), here.deliveries.append, handed=lambda: None)
        assert await here.settled(5) == [("delivered", None)] * 5
        await reader.wait_messages(5)
        assert sorted((m.topic, m.payload, m.qos) for m in reader.messages) == [
            ("lane-a/p2p/d1", b"p2p", 1),
            ("lane-a/x", b"0", 0),
            ("lane-a/x", b"1", 1),
            ("lane-a/x", b"2", 2),
            ("lane-b/x", b"elsewhere", 1),
        ]
        await reader.publish("lane-a/x", b"marker", qos=1)
        await until(lambda: here.payloads("lane-a") == [b"marker"])


@pytest.mark.parametrize(("seconds", "kept"), [(1, [b"long"]), (600, [b"short", b"long"])])
async def test_a_message_is_kept_for_a_session_no_longer_than_its_expiry(
    broker: PlainMosquitto, tmp_path: Path, seconds: int, kept: list[bytes]
) -> None:
    async with world(broker, tmp_path, into("lane-a")) as here:
        away = await Client.connect(broker.port, "away", clean=False)
        await away.subscribe(("lane-a/#", 1))
        await away.drop()
        short = MqttMessage("lane-a/x", b"short", 1, properties=MqttProperties(expiry_seconds=seconds))
        here.host.publish(short, here.deliveries.append, handed=lambda: None)
        here.publish("lane-a/x", b"long")
        await here.settled(2)
        await asyncio.sleep(2.5)
        back = await Client.connect(broker.port, "away", clean=False)
        assert [message.payload for message in await back.wait_messages(len(kept))] == kept
        await back.drop()


async def test_what_waits_when_an_outbound_rule_is_added_does_not_come_back(tmp_path: Path) -> None:
    # One after the other, so that they are still at it when the rule's subscription begins.
    with started(tmp_path, "max_inflight_messages 1") as broker:
        async with world(broker, tmp_path) as here:
            for number in range(500):
                here.publish("lane-a/x", b"%d" % number)
            here.publish("lane-b/x", b"another's")
            await here.working(out("lane-a"))
            await here.settled(501)
            async with device(broker) as writer:
                await writer.publish("lane-a/x", b"a device's", qos=1)
            await until(lambda: here.payloads("lane-a") == [b"a device's"])


async def test_a_full_lane_holds_up_no_other_rule_and_loses_nothing(broker: PlainMosquitto, tmp_path: Path) -> None:
    many = 2 * UNACKNOWLEDGED
    async with world(broker, tmp_path, out("lane-a"), out("lane-b")) as here, device(broker) as writer:
        here.intake.full.add("lane-a")
        for number in range(many):
            await writer.publish("lane-a/x", b"%d" % number, qos=1)
        await until(lambda: len(here.intake.waiting) == UNACKNOWLEDGED)
        await writer.publish("lane-b/x", b"goes on", qos=1)
        await until(lambda: here.payloads("lane-b") == [b"goes on"])
        assert len(here.intake.waiting) == UNACKNOWLEDGED
    # Nothing was acknowledged, so the broker has it all.
    assert all(future.cancelled() for _, future in here.intake.waiting)
    async with world(broker, tmp_path, out("lane-a"), out("lane-b")) as here:
        await until(lambda: len(here.payloads("lane-a")) == many)
        here.intake.full.add("lane-a")
        async with device(broker) as writer:
            for number in range(many, 2 * many):
                await writer.publish("lane-a/x", b"%d" % number, qos=1)
        # In a session that was taken up again, Mosquitto 2.0.11 sends some more than it should.
        await until(lambda: len(here.intake.waiting) >= UNACKNOWLEDGED)
        here.intake.make_space()
        await until(lambda: len(here.payloads("lane-a")) == 2 * many)
        assert here.payloads("lane-a") == [b"%d" % number for number in range(2 * many)]
        assert here.payloads("lane-b") == []


async def test_a_broker_that_goes_and_comes_back(broker: PlainMosquitto, tmp_path: Path, lines: list[str]) -> None:
    rules = (out("lane-a"), into("lane-b"))
    async with world(broker, tmp_path, *rules) as here:
        broker.kill()
        await until(lambda: all(here.problems(*rules)))
        assert "cannot be used" in (here.host.problem or "")
        here.publish("lane-b/x", b"waits")
        assert here.deliveries == []
        broker.start()
        assert await here.settled(1) == [("no_subscriber", None)]
        await here.working(*rules)
        assert any("the broker has lost its session" in line for line in lines)
        async with device(broker) as writer:
            await writer.publish("lane-a/x", b"again", qos=1)
        await until(lambda: here.payloads("lane-a") == [b"again"])


async def test_the_session_of_a_rule_that_has_gone_is_ended(broker: PlainMosquitto, tmp_path: Path) -> None:
    async def had_session(parent: str) -> bool:
        login = Login(broker.url, f"mq2mqtt-sidecar-{parent}", session_expiry=0)
        client = await MqttClient.connect(login, received=print, room=print)
        client.close()
        return client.session_present

    noted = tmp_path / "spool" / SESSIONS_FILE
    async with world(broker, tmp_path, out("lane-a"), out("lane-b"), out("lane-c")) as here:
        await here.working(out("lane-b"), out("lane-c"), out("lane-a", enabled=False))
        await until(lambda: set(json.loads(noted.read_bytes())) == {f"mq2mqtt-sidecar-lane-{n}" for n in "bc"})
        assert not await had_session("lane-a")
        # Under its parent topic it publishes on.
        here.publish("lane-a/x", b"nobody")
        assert await here.settled(1) == [("no_subscriber", None)]
    async with world(broker, tmp_path, out("lane-c")):
        await until(lambda: set(json.loads(noted.read_bytes())) == {"mq2mqtt-sidecar-lane-c"})
    assert not await had_session("lane-b")
    assert await had_session("lane-c")


async def test_a_rule_that_comes_back_while_its_session_is_ended_keeps_the_new_one(
    broker: PlainMosquitto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, go_on = asyncio.Event(), asyncio.Event()
    end_session = ClientHost._end_session  # noqa: SLF001 - to be held up

    async def slowly(host: ClientHost, client_id: str) -> None:
        ending.set()
        await go_on.wait()
        await end_session(host, client_id)

    monkeypatch.setattr(ClientHost, "_end_session", slowly)
    rules = out("lane-a"), into("other")
    async with world(broker, tmp_path, *rules) as here, device(broker) as theirs:
        here.host.go_by(RuleSet([into("other")]))
        await ending.wait()
        here.host.go_by(RuleSet(rules))
        assert here.host.problem_of("lane-a") == "not connected yet"
        go_on.set()
        await here.working(*rules)
        await theirs.publish("lane-a/x", b"kept", qos=1)
        await until(lambda: here.payloads("lane-a") == [b"kept"])


async def test_a_rule_with_another_source_lets_go_of_the_first(broker: PlainMosquitto, tmp_path: Path) -> None:
    async with world(broker, tmp_path, out("lane-a", rule_id="lane-b")):
        pass
    async with device(broker) as writer:
        await writer.publish("lane-a/x", b"of the old source", qos=1)
    async with world(broker, tmp_path, out("lane-b")) as here, device(broker) as writer:
        await writer.publish("lane-a/x", b"nobody's", qos=1)
        await writer.publish("lane-b/x", b"1", qos=1)
        await until(lambda: here.payloads("lane-b") == [b"1"])
        assert here.payloads("lane-a") == []


async def test_another_rule_with_the_same_source_takes_over_without_a_gap(
    broker: PlainMosquitto, tmp_path: Path
) -> None:
    async with device(broker) as writer:
        async with world(broker, tmp_path, out("lane-a")) as here:
            for number in range(20):
                here.host.go_by(RuleSet([out("lane-a", rule_id=f"rule-{number}")]))
                await writer.publish("lane-a/x", b"%d" % number, qos=1)
            await until(lambda: here.payloads("lane-a") == [b"%d" % number for number in range(20)])
        await writer.publish("lane-a/x", b"while it is away", qos=1)
        async with world(broker, tmp_path, out("lane-a", rule_id="rule-b")) as here:
            await until(lambda: here.payloads("lane-a") == [b"while it is away"])


async def test_a_subscription_that_is_denied_holds_down_its_rule_alone(tmp_path: Path, lines: list[str]) -> None:
    access = tmp_path / "access.json"
    allowed = ["lane-b/#"]

    def write() -> None:
        acls = [{"acltype": "subscribePattern", "topic": name, "allow": True} for name in allowed]
        defaults = {"publishClientSend": True, "publishClientReceive": True, "subscribe": False, "unsubscribe": True}
        access.write_text(
            json.dumps(
                {
                    "defaultACLAccess": defaults,
                    "anonymousGroup": "all",
                    "groups": [{"groupname": "all", "roles": [{"rolename": "all"}]}],
                    "roles": [{"rolename": "all", "acls": acls}],
                    "clients": [],
                }
            )
        )

    write()
    if DYNAMIC_SECURITY is None:
        pytest.skip("Mosquitto is installed without its dynamic-security plugin")
    with started(tmp_path, f"plugin {DYNAMIC_SECURITY}", f"plugin_opt_config_file {access}") as broker:
        async with world(broker, tmp_path, out("lane-b")) as here:
            await here.working(into("lane-a"), out("lane-b"))
            here.host.go_by(RuleSet([out("lane-a"), into("lane-a"), out("lane-b")]))
            await until(lambda: "lane-a/#: Not authorized" in (here.host.problem_of("lane-a") or ""))
            assert here.problems(into("lane-a"), out("lane-b")) == [None, None, None]
            here.publish("lane-a/x", b"x")
            assert await here.settled(1) == [("no_subscriber", None)]
            assert len([line for line in lines if "Not authorized" in line]) == 1
            broker.kill()
            allowed.append("lane-a/#")
            write()
            broker.start()
            await here.working(out("lane-a"), into("lane-a"), out("lane-b"))


@pytest.mark.parametrize(
    ("options", "host", "words"),
    [
        (("max_qos 0",), {}, "the broker grants only QoS 0 for lane-a/#"),
        (("allow_anonymous false", "password_file {passwords}"), {"username": "u", "password": "p"}, "Not authorized"),
    ],
)
async def test_a_broker_that_is_of_no_use_is_named_in_one_line(
    options: tuple[str, ...], host: dict[str, str], words: str, tmp_path: Path, lines: list[str]
) -> None:
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    with started(tmp_path, *(option.format(passwords=passwords) for option in options)) as broker:
        here = World(broker, tmp_path, **host)
        here.host.go_by(RuleSet([out("lane-a")]))
        here.host.start()
        try:
            await until(lambda: any(words in (problem or "") for problem in here.problems(out("lane-a"))))
        finally:
            await here.host.stop()
    assert len([line for line in lines if words in line]) in {1, 2}  # each connection once
    assert not any("\n" in line for line in lines)


async def test_what_the_broker_does_not_take_is_dropped_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("topic read #\ntopic write lane-b/#\n")
    with started(tmp_path, "max_packet_size 1000", f"acl_file {tmp_path / 'acl'}") as broker:
        async with world(broker, tmp_path, into("lane-b")) as here, device(broker) as reader:
            await reader.subscribe(("#", 2))
            here.publish("lane-b/x", bytes(2000))
            here.publish("lane-c/x", b"forbidden")
            here.publish("lane-b/+", b"no topic")
            here.publish("lane-b/x", bytes(900))
            assert sorted(await here.settled(4), key=str) == [
                ("delivered", None),
                ("dropped", "host_refused"),
                ("dropped", "not_authorized"),
                ("dropped", "too_large"),
            ]
            assert [message.payload for message in await reader.wait_messages(1)] == [bytes(900)]


async def test_what_a_limit_forbids_is_dropped_and_counted(broker: PlainMosquitto, tmp_path: Path) -> None:
    async with world(broker, tmp_path, out("lane-a")) as here, device(broker) as writer:
        rule = here.telemetry.add(RuleTelemetry("lane-a", direction=Direction.UPLINK))
        here.intake.max_payload = 3
        await writer.publish("lane-a/x", b"long", qos=1)
        await writer.publish("lane-a/x", b"ok", qos=1)
        await until(lambda: here.payloads("lane-a") == [b"ok"])
        assert rule.drops["too_large"] == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"mq2mqtt-sidecar-lane-a": 7}'])
async def test_a_damaged_list_of_sessions_stops_nobody(text: str, broker: PlainMosquitto, tmp_path: Path) -> None:
    noted = tmp_path / "spool" / SESSIONS_FILE
    noted.parent.mkdir()
    noted.write_text(text)
    async with world(broker, tmp_path, out("lane-a")):
        await until(lambda: json.loads(noted.read_bytes() or b"0") == {"mq2mqtt-sidecar-lane-a": "lane-a/#"})


async def test_the_settings_in_the_docs_keep_what_the_sidecar_has_not_fetched(tmp_path: Path) -> None:
    document = Path(__file__).parents[3] / "docs" / "mqtt.md"
    block = document.read_text().partition("For Mosquitto:\n\n```\n")[2].partition("```")[0]
    given = {line.split()[0]: line.partition("#")[0].rstrip() for line in block.splitlines()}
    assert "max_queued_messages" in given
    given["persistence_location"] = f"persistence_location {tmp_path}/"
    with started(tmp_path, *given.values()) as broker:
        async with world(broker, tmp_path, out("lane-a")):
            pass
        # More than Mosquitto keeps by itself.
        async with device(broker) as writer:
            for number in range(1500):
                await writer.publish("lane-a/x", b"%d" % number, qos=1)
        assert broker.stop() == 0
        broker.start()
        async with world(broker, tmp_path, out("lane-a")) as here:
            await until(lambda: len(here.payloads("lane-a")) == 1500)
            assert here.payloads("lane-a") == [b"%d" % number for number in range(1500)]


async def test_a_will_is_a_publish_like_another(broker: PlainMosquitto, tmp_path: Path) -> None:
    async with world(broker, tmp_path, out("lane-a")) as here:
        mortal = await Client.connect(broker.port, "mortal", will=("lane-a/will", b"last words", 1, False))
        mortal.abort()
        await until(lambda: here.intake.lane("lane-a") == [MqttMessage("lane-a/will", b"last words", 1)])
