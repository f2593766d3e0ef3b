"""A RocketMQ that lets in only who may: ACL 1.0 (4.9.7) and ACL 2.0 (5.3.3), with the rights that the docs ask for."""

import asyncio
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
import yaml

from mq2mqtt.quickstart.cluster import Access, ask
from mq2mqtt.quickstart.rocketmq import RocketMQ
from mq2mqtt.rocketmq import Client, NoPermission
from tests.bridge_process import BridgeProcess, wait_for
from tests.conftest import run_on_jvm
from tests.device import Device
from tests.rocket_peer import RocketPeer, wait_for_messages
from tests.waiting import PATIENCE

pytestmark = pytest.mark.e2e

_TOLD_SECONDS = 5.0 * PATIENCE
_DOCS = (Path(__file__).parents[2] / "docs" / "rocketmq.md").read_text()
_SECRET = "s3cret-of-the-bridge"  # noqa: S105 - for this test's own RocketMQ
_GET_BROKER_CONFIG = 26  # needs a valid key and no right
_OPERATOR = Access("operator", "secret-of-the-operator")
_KEYS: dict[str, Any] = {"access_key": _OPERATOR.access_key, "secret_key": _OPERATOR.secret_key}
_RULES: list[dict[str, Any]] = [
    {"id": "telemetry-out", "type": "outbound", "source": "sensors", "target": "mq_sensors"},
    {"id": "commands-in", "type": "inbound", "source": "mq_commands", "target": "devices"},
]
# What the docs do not grant: the right to its group is given here, the one to its topic never.
_FORBIDDEN = {"id": "others-in", "type": "inbound", "source": "mq_others", "target": "others"}
_FORBIDDEN_GROUP = "GID_mq2mqtt_others-in_default"


class _Message(NamedTuple):
    body: bytes
    properties: dict[str, str]


def _documented(language: str, word: str) -> str:
    """Return the code block of the docs that has `word`, with the bridge's secret in it."""
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", _DOCS, re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    return block.replace("SECRET", _SECRET)


class Guard(Protocol):
    """Who has access. The user `mq2mqtt` is the bridge's."""

    server: RocketMQ

    def let_in(self, secret: str) -> None:
        """Know the user by `secret`, without any right; takes from it what it has."""

    def grant(self) -> None:
        """Give it `_SECRET` and the rights that the docs ask for."""


class Acl1:
    """ACL 1.0: a file, which the broker reads again when it changes."""

    def __init__(self, server: RocketMQ) -> None:
        self.server = server
        self._file = server.directory / "conf" / "plain_acl.yml"

    @staticmethod
    async def start(directory: Path, say: Callable[[str], None]) -> "Acl1":
        (directory / "conf").mkdir(parents=True)
        (directory / "conf" / "plain_acl.yml").write_text(yaml.safe_dump({"accounts": [Acl1._operator()]}))
        conf = {"aclEnable": "true"}
        return Acl1(await run_on_jvm(directory, say=say, version="4.9.7", broker_conf=conf, access=_OPERATOR))

    @staticmethod
    def _operator() -> dict[str, Any]:
        return {"accessKey": _OPERATOR.access_key, "secretKey": _OPERATOR.secret_key, "admin": True}

    def let_in(self, secret: str) -> None:
        self._know({"accessKey": "mq2mqtt", "secretKey": secret, "admin": False})

    def grant(self) -> None:
        (account,) = yaml.safe_load(_documented("yaml", "topicPerms"))["accounts"]
        account["groupPerms"].append(f"{_FORBIDDEN_GROUP}=SUB")
        self._know(account)

    def _know(self, account: dict[str, Any]) -> None:
        self._file.write_text(yaml.safe_dump({"accounts": [self._operator(), account]}))
        access = Access(account["accessKey"], account["secretKey"])

        def known() -> bool:
            return asyncio.run(ask(self.server.broker_address, _GET_BROKER_CONFIG, access=access)).code == 0

        wait_for(known, seconds=30, what="the broker has not read plain_acl.yml again")


class Acl2:
    """ACL 2.0: users and policies, made with `mqadmin`; here by the requests that it sends."""

    def __init__(self, server: RocketMQ) -> None:
        self.server = server

    @staticmethod
    async def start(directory: Path, say: Callable[[str], None]) -> "Acl2":
        conf = dict(line.split("=", 1) for line in _documented("properties", "authorizationEnabled").splitlines())
        conf |= {
            "initAuthenticationUser": json.dumps({"username": "operator", "password": _OPERATOR.secret_key}),
            "innerClientAuthenticationCredentials": json.dumps(
                {"accessKey": "operator", "secretKey": _OPERATOR.secret_key}
            ),
        }
        return Acl2(await run_on_jvm(directory, say=say, version="5.3.3", broker_conf=conf, access=_OPERATOR))

    def let_in(self, secret: str) -> None:
        self._ask((3003, {"username": "mq2mqtt"}, {}), self._create_user(secret))

    def grant(self) -> None:
        commands = _documented("sh", "createAcl").splitlines()
        commands.append(f"mqadmin createAcl -s User:mq2mqtt -r Group:{_FORBIDDEN_GROUP} -a Sub,Get -d Allow")
        for line in commands:
            command = shlex.split(line)
            option = dict(zip(command[2::2], command[3::2], strict=True))
            if command[1] == "createUser":
                self._ask((3003, {"username": option["-u"]}, {}), self._create_user(option["-p"]))
            else:
                entry = {
                    "resource": option["-r"],
                    "actions": option["-a"].split(","),
                    "sourceIps": [],
                    "decision": option["-d"],
                }
                policy = {"policyType": "Custom", "entries": [entry]}
                self._ask((3006, {"subject": option["-s"]}, {"subject": option["-s"], "policies": [policy]}))

    @staticmethod
    def _create_user(secret: str) -> tuple[int, dict[str, str], dict[str, Any]]:
        return 3001, {"username": "mq2mqtt"}, {"username": "mq2mqtt", "password": secret, "userType": "Normal"}

    def _ask(self, *requests: tuple[int, dict[str, str], dict[str, Any]]) -> None:
        asyncio.run(self._ask_all(requests))

    async def _ask_all(self, requests: tuple[tuple[int, dict[str, str], dict[str, Any]], ...]) -> None:
        async with Client(namesrv=self.server.namesrv, client_id="operator", **_KEYS) as client:
            for code, fields, body in requests:
                answer = await client.call(self.server.broker_address, code, fields, json.dumps(body).encode())
                assert answer.code == 0, answer.remark


@pytest.fixture(scope="module", params=[Acl1, Acl2], ids=["ACL 1.0 on 4.9.7", "ACL 2.0 on 5.3.3"])
def guard(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, say: Callable[[str], None]
) -> Iterator[Guard]:
    guard: Guard = asyncio.run(request.param.start(tmp_path_factory.mktemp("guarded") / "rocketmq", say))
    for topic in ("mq_sensors", "mq_commands", "mq_others"):
        asyncio.run(guard.server.create_topic(topic))
    yield guard
    guard.server.kill()


@pytest.fixture
def bridge(guard: Guard, tmp_path: Path) -> Iterator[BridgeProcess]:
    # What RocketMQ asks for does not depend on the MQTT broker: one kind is enough.
    bridge = BridgeProcess(tmp_path / "bridge", namesrv=guard.server.namesrv, rules=_RULES)
    bridge.config["node"] = "default"
    bridge.config["rocketmq"] |= {"access_key": "mq2mqtt", "secret_key": "file://secret"}
    (bridge.directory / "secret").write_text(f"{_SECRET}\n")
    yield bridge
    bridge.kill()
    log = bridge.log_file.read_text() if bridge.log_file.exists() else ""
    for secret in (_SECRET, _OPERATOR.secret_key or ""):
        assert secret not in log


def _down(bridge: BridgeProcess, rule: str, words: str) -> bool:
    state = bridge.readiness()[rule]
    return state["state"] == "down" and words in str(state["reason"])


def _expect_down(bridge: BridgeProcess, words: str) -> None:
    """Wait until both rules are down, in time, and for a reason that has `words`."""
    for rule in bridge.readiness():
        wait_for(lambda: _down(bridge, rule, words), seconds=_TOLD_SECONDS, what=lambda: f"{bridge.readiness()}")  # noqa: B023


def _problems(bridge: BridgeProcess) -> list[str]:
    """What `mq2mqtt check` finds; its exit code says whether it does."""
    checked = bridge.command("check")
    assert (checked.stderr, _SECRET in checked.stdout) == ("", False)
    problems = [line for line in checked.stdout.splitlines() if line.startswith("PROBLEM")]
    assert checked.returncode == (1 if problems else 0), checked.stdout
    return problems


def _flows_both_ways(bridge: BridgeProcess, peer: RocketPeer, *bodies: bytes) -> None:
    """Messages go out and come in; `bodies` are on their way out already."""
    with peer.collect("mq_sensors") as messages, Device(bridge.mqtt_port, "dev") as device:
        device.publish("sensors/x", b"out", qos=1)
        device.subscribe("devices/#", qos=1)
        peer.send("mq_commands", b"in")
        wait_for_messages(device.received, 1)
        wait_for(lambda: {*bodies, b"out"} <= {message.body for message in messages})


def test_the_documented_rights_are_enough_and_what_is_missing_is_named(guard: Guard, bridge: BridgeProcess) -> None:
    guard.let_in(_SECRET)
    bridge.start(ready=False)
    with Device(bridge.mqtt_port, "dev") as device:
        device.publish("sensors/x", b"kept", qos=1)
    _expect_down(bridge, "code")
    reasons = {rule: state["reason"] for rule, state in bridge.readiness().items()}
    out, into = _problems(bridge)
    assert "telemetry-out: RocketMQ topic mq_sensors: " in out
    assert "commands-in: RocketMQ topic mq_commands: " in into
    for text in (reasons["telemetry-out"], out):
        assert "mq_sensors" in text
    assert "permission" in "".join((*reasons.values(), out, into))

    guard.grant()
    wait_for(lambda: bridge.get("/readyz")[0] == 200, seconds=30, what=bridge.describe)
    assert _problems(bridge) == []
    with RocketPeer(guard.server.namesrv, **_KEYS) as peer:
        _flows_both_ways(bridge, peer, b"kept")
        wait_for(lambda: bridge.metric("mq2mqtt_consumer_lag", rule="commands-in") == 0)
    assert bridge.stop() == 0
    log = bridge.log_file.read_text()
    assert "not committed" not in log
    assert "Traceback" not in log


def test_a_wrong_secret_shows_and_the_rules_recover_when_it_is_the_right_one(
    guard: Guard, bridge: BridgeProcess
) -> None:
    guard.let_in("another-secret")
    bridge.start(ready=False)
    _expect_down(bridge, "ignature")
    assert ["ignature" in problem for problem in _problems(bridge)] == [True, True]
    guard.grant()
    wait_for(lambda: bridge.get("/readyz")[0] == 200, seconds=30, what=bridge.describe)
    assert bridge.stop() == 0


def test_a_rule_without_a_right_holds_up_no_other(guard: Guard, bridge: BridgeProcess) -> None:
    guard.grant()
    bridge.config["rules"] = [*_RULES, _FORBIDDEN]
    bridge.start(ready=False)
    wait_for(
        lambda: _down(bridge, "others-in", "mq_others"), seconds=_TOLD_SECONDS, what=lambda: f"{bridge.readiness()}"
    )
    (problem,) = _problems(bridge)
    assert "others-in: RocketMQ topic mq_others: " in problem
    with RocketPeer(guard.server.namesrv, **_KEYS) as peer:
        _flows_both_ways(bridge, peer)
    assert _down(bridge, "others-in", "mq_others")
    assert bridge.stop() == 0


def test_without_a_key_or_with_an_unknown_one_check_says_so(guard: Guard, bridge: BridgeProcess) -> None:
    guard.grant()
    unknown = {"access_key": "nobody", "secret_key": _SECRET}
    for keys in ({}, unknown):
        bridge.config["rocketmq"] = {"namesrv": guard.server.namesrv, **keys}
        bridge.write_config()
        problems = _problems(bridge)
        assert ["answered code" in problem for problem in problems] == [True, True]
    bridge.config["rocketmq"] = {"namesrv": guard.server.namesrv, "access_key": "nobody"}
    bridge.write_config()
    checked = bridge.command("check")
    assert (checked.returncode, checked.stdout) == (2, "")
    assert "access_key and secret_key go together" in checked.stderr


async def test_the_client_signs_what_it_sends_and_never_shows_the_secret(
    guard: Guard, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    await asyncio.to_thread(guard.grant)

    async def send(topic: str, *bodies: str, secret: str = _SECRET) -> None:
        keys: dict[str, Any] = {"access_key": "mq2mqtt", "secret_key": secret}
        async with Client(namesrv=guard.server.namesrv, client_id="signing", **keys) as client:
            queue = (await client.queues(topic))[0]
            messages = [_Message(body.encode(), {"clé": body}) for body in bodies]
            await client.send(topic, queue.broker, queue.queue_id, messages)

    await send("mq_sensors", "é")
    await send("mq_sensors", "é", "ü")
    with pytest.raises(NoPermission) as caught:
        await send("mq_others", "é")
    assert "mq_others" in str(caught.value)
    if guard.server.version.startswith("4."):
        # As the docs warn: ACL 1.0 does not look at the topic of a batch.
        await send("mq_others", "é", "ü")
    else:
        with pytest.raises(NoPermission):
            await send("mq_others", "é", "ü")
    with pytest.raises(NoPermission) as caught:
        await send("mq_sensors", "é", secret="wrong-secret")  # noqa: S106 - for this test
    assert "secret" not in f"{caught.value}{caplog.text}"
