"""Parked messages on their way back: the cause is mended, the replay arrives once, whatever is killed meanwhile."""

import contextlib
import json
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.frame import Frame, FrameKind, decode_frames, encode_publish
from mq2mqtt.spool.parked import ParkedStore, ask_replay, keys_of
from tests.bridge_process import BridgeProcess
from tests.conftest import MakeTopic, SharedRocketMQ, StartRocketMQ
from tests.faults.random_moments import random_moments
from tests.mqtt_client import Client
from tests.new_bridge import new_bridge
from tests.rocket_peer import RocketPeer
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

OUT, IN = "sensors-out", "commands-in"


@pytest.fixture
def started() -> Iterator[list[BridgeProcess]]:
    """Bridges that end with the test."""
    bridges: list[BridgeProcess] = []
    yield bridges
    for bridge in bridges:
        bridge.kill()


def outbound(target: str) -> dict[str, Any]:
    return {"id": OUT, "type": "outbound", "source": "sensors", "target": target}


def inbound(source: str) -> dict[str, Any]:
    return {"id": IN, "type": "inbound", "source": source, "target": "devices", "from": "earliest"}


def api(bridge: BridgeProcess, path: str, *, method: str = "GET") -> tuple[int, Any]:
    request = urllib.request.Request(f"{bridge.admin_url}/api/v1/{path}", method=method)  # noqa: S310 - our own
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - our own
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def keys(bridge: BridgeProcess, rule: str) -> list[str]:
    return keys_of(bridge.directory / "spool" / rule)


def replay(bridge: BridgeProcess, rule: str, *which: str) -> None:
    done = bridge.command("parked", "replay", rule, *which)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def sums_hold(bridge: BridgeProcess) -> bool:
    def total(rule: str, *outcomes: str) -> float:
        return sum(bridge.metric("mq2mqtt_messages_total", rule=rule, outcome=outcome) for outcome in outcomes)

    lane = bridge.metric("mq2mqtt_lane_messages", rule=OUT)
    ends = ("delivered", "no_subscriber", "queued", "expired", "parked", "skipped", "dropped")
    return total(OUT, "accepted") == total(OUT, "sent", "parked") + lane and total(IN, "received") == total(IN, *ends)


async def test_what_rocketmq_refused_is_sent_once_when_it_takes_it(
    start_rocketmq: StartRocketMQ, tmp_path: Path, started: list[BridgeProcess]
) -> None:
    server = await start_rocketmq(broker_conf={"maxMessageSize": "4096"})
    bridge = new_bridge(tmp_path / "bridge", namesrv=server.namesrv, rules=[outbound("out")])
    started.append(bridge)
    bodies = {name: name * 5000 for name in (b"1", b"2", b"3")}
    await server.create_topic("out")
    with RocketPeer(server.namesrv) as peer, peer.collect("out") as messages:
        bridge.start()
        device = await Client.connect(bridge.mqtt_port, "dev")
        for body in bodies.values():
            await device.publish("sensors/t", body, qos=1)
        await device.publish("sensors/t", b"small", qos=1)
        await device.drop()
        await until(lambda: len(keys(bridge, OUT)) == 3 and [m.body for m in messages] == [b"small"])
        first, second, third = keys(bridge, OUT)

        # Nothing is mended yet: parked again, for the same reason.
        parked = bridge.metric("mq2mqtt_messages_total", rule=OUT, outcome="parked")
        replay(bridge, OUT, first)
        await until(lambda: bridge.metric("mq2mqtt_messages_total", rule=OUT, outcome="parked") == parked + 1)
        assert len(keys(bridge, OUT)) == 3
        await until(lambda: sums_hold(bridge))

        peer.configure_broker("maxMessageSize=65536", broker_address=server.broker_address)
        replay(bridge, OUT, first)
        await until(lambda: [m.body for m in messages] == [b"small", bodies[b"1"]])
        assert messages[-1].properties["KEYS"] == f"test:{OUT}:{first}"
        assert messages[-1].properties["clientId"] == "dev"
        status, content = api(bridge, f"parked/{OUT}/{second}/replay", method="POST")
        assert (status, content["state"]) == (202, "replay")
        await until(lambda: keys(bridge, OUT) == [third])
        await until(lambda: sums_hold(bridge))
        assert api(bridge, f"parked/{OUT}/{third}", method="DELETE")[0] == 200
        assert api(bridge, "parked") == (200, {"parked": []})
        assert bridge.metric("mq2mqtt_parked_messages", rule=OUT) == 0
        await until(lambda: len(messages) >= 3)
        assert [message.body for message in messages] == [b"small", bodies[b"1"], bodies[b"2"]]
    assert bridge.stop() == 0


async def test_what_was_over_a_limit_or_illegal_for_devices(
    make_topic: MakeTopic, peer: RocketPeer, rocketmq: SharedRocketMQ, tmp_path: Path, started: list[BridgeProcess]
) -> None:
    source = await make_topic(queues=1)
    bridge = new_bridge(tmp_path / "bridge", namesrv=rocketmq.namesrv, rules=[inbound(source)])
    started.append(bridge)
    bridge.config["limits"] = {"payload_bytes": 100}
    bridge.start()
    for body in (b"a", b"b"):
        peer.send(source, body * 200, mqttSecondTopic="/big")
    peer.send(source, b"illegal", mqttSecondTopic="/x/#")
    peer.send(source, b"dropped", mqttSecondTopic="/+")
    await until(lambda: len(keys(bridge, IN)) == 4)
    big, other, illegal, unwanted = (message["key"] for message in api(bridge, f"parked/{IN}")[1]["messages"])
    assert bridge.command("parked", "drop", IN, unwanted).returncode == 0
    bridge.stop()

    del bridge.config["limits"]
    bridge.start()
    device = await Client.connect(bridge.mqtt_port, "dev")
    await device.subscribe(("devices/#", 1))
    replay(bridge, IN, big, illegal)
    await until(lambda: [message.payload for message in device.messages] == [b"a" * 200])
    assert device.messages[0].topic == "devices/big"
    # Its topic is still illegal.
    await until(lambda: bridge.metric("mq2mqtt_messages_total", rule=IN, outcome="parked") == 1)
    assert api(bridge, f"parked/{IN}/{quote(other, safe='')}/replay", method="POST")[0] == 202
    await until(lambda: keys(bridge, IN) == [illegal])
    await device.wait_messages(2)
    assert [message.payload for message in device.messages] == [b"a" * 200, b"b" * 200]
    await until(lambda: sums_hold(bridge))
    assert bridge.command("parked", "drop", IN, "--all").returncode == 0
    assert bridge.metric("mq2mqtt_parked_messages", rule=IN) == 0
    await device.drop()
    assert bridge.stop() == 0


async def test_kill_9_in_a_replay_loses_nothing(
    make_topic: MakeTopic,
    peer: RocketPeer,
    rocketmq: SharedRocketMQ,
    tmp_path: Path,
    started: list[BridgeProcess],
) -> None:
    dice = random_moments("replay")
    target = await make_topic()
    bridge = new_bridge(tmp_path / "bridge", namesrv=rocketmq.namesrv, rules=[outbound(target)])
    started.append(bridge)
    lane = bridge.directory / "spool" / OUT
    store = ParkedStore(lane, max_bytes=1 << 30)
    wanted = [b"%d" % number for number in range(500)]
    for number, body in enumerate(wanted):
        publish = encode_publish(MqttMessage("sensors/t", body, 1, client_id="dev"), accepted_us=1)
        store.append(decode_frames(publish, 0, max_frames=1)[0][0], key=f"{1000 + number}", reason="why")
        assert ask_replay(lane, f"{1000 + number}")
    with peer.collect(target) as messages:
        bridge.start(ready=False)
        enough = dice.randrange(1, 400)
        await until(lambda: len(messages) >= enough, seconds=120)
        bridge.kill()
        bridge.start()
        await until(lambda: not keys(bridge, OUT), seconds=120)
        await until(lambda: len({message.body for message in messages}) == len(wanted))
        # The one that was on its way may come twice, under the same key.
        assert len(messages) <= len(wanted) + 1
        assert len({message.properties["KEYS"] for message in messages}) == len(wanted)
    await until(lambda: sums_hold(bridge))
    assert bridge.stop() == 0


async def test_kill_9_in_a_replay_to_devices_loses_nothing(
    rocketmq: SharedRocketMQ, make_topic: MakeTopic, tmp_path: Path, started: list[BridgeProcess]
) -> None:
    dice = random_moments("replay to devices")
    bridge = new_bridge(tmp_path / "bridge", namesrv=rocketmq.namesrv, rules=[inbound(await make_topic())])
    started.append(bridge)
    bridge.config["store"] = {"url": "sqlite+aiosqlite:///kept.db"}
    lane = bridge.directory / "spool" / IN
    store = ParkedStore(lane, max_bytes=1 << 30)
    properties = {"TAGS": "MQ2MQTT", "mqttSecondTopic": "/p2p/GID_dev@@@away", "cleansessionflag": "false"}
    text = "".join(f"{name}\x01{value}\x02" for name, value in properties.items()).encode()
    wanted = {b"%d" % number for number in range(500)}
    for body in wanted:
        message = Frame(FrameKind.ROCKETMQ, 0, time.time_ns() // 1000, "", "commands", text, body)
        store.append(message, key=f"broker-a/0/{int(body)}", reason="why")
        assert ask_replay(lane, f"broker-a/0/{int(body)}")
    bridge.start(ready=False)
    enough = dice.randrange(1, 400)
    await until(lambda: len(keys(bridge, IN)) <= len(wanted) - enough, seconds=120)
    bridge.kill()
    bridge.start()
    await until(lambda: not keys(bridge, IN), seconds=120)
    await until(lambda: sums_hold(bridge))
    with contextlib.closing(sqlite3.connect(bridge.directory / "kept.db")) as database:
        kept = [bytes(payload) for (payload,) in database.execute("SELECT payload FROM offline")]
    assert set(kept) == wanted
    # Those that were on their way may be there twice.
    assert len(kept) <= len(wanted) + 100
    assert bridge.stop() == 0
