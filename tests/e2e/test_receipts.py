"""Receipts on a real RocketMQ: what became of a message comes back, over a `kill -9` and later deliveries."""

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from mq2mqtt.message import ReceivedMessage
from tests.bridge_process import wait_for
from tests.conftest import SharedRocketMQ
from tests.mqtt_client import Client
from tests.new_bridge import new_bridge
from tests.rocket_peer import RocketPeer

pytestmark = pytest.mark.e2e

_PAIR = 2


def _told(receipts: list[ReceivedMessage]) -> set[tuple[str, str, str | None]]:
    """Tag, keys and client id: `kill -9` may have one told twice."""
    return {(of.properties["TAGS"], of.properties["KEYS"], of.properties.get("clientId")) for of in receipts}


@pytest.fixture
def topics(peer: RocketPeer) -> tuple[str, str]:
    source, target = (f"{name}_{uuid.uuid4().hex[:12]}" for name in ("in", "receipts"))
    for topic in (source, target):
        peer.create_topic(topic, queues=1)
    return source, target


async def test_a_sender_learns_what_became_of_its_messages(
    rocketmq: SharedRocketMQ, peer: RocketPeer, tmp_path: Path, topics: tuple[str, str]
) -> None:
    source, target = topics
    rule: dict[str, Any] = {"id": "orders-in", "type": "inbound", "source": source, "target": "devices"}
    bridge = new_bridge(tmp_path, namesrv=rocketmq.namesrv, rules=[{**rule, "receipts": target}])
    with peer.collect(target) as receipts:
        bridge.start()

        def send(client: str, keys: str, **more: str) -> None:
            options = {"mqttSecondTopic": f"/p2p/{client}", "cleansessionflag": "false", "receipt": "true", **more}
            peer.send(source, keys.encode(), KEYS=keys, **options)

        send("away", "kept")
        send("never", "short", ttlSeconds="15")
        send("nobody", "unkept", cleansessionflag="false", qoslevel="0")
        send("away", "unasked", receipt="false")
        wait_for(lambda: bridge.metric("mq2mqtt_messages_total", rule="orders-in", outcome="queued") == _PAIR + 1)
        bridge.kill()
        bridge.start()
        device = await Client.connect(bridge.mqtt_port, "away")
        await device.wait_messages(_PAIR)
        # What was not committed comes again.
        assert {message.payload for message in device.messages} == {b"kept", b"unasked"}
        expected = {
            ("queued", "kept", "away"),
            ("delivered", "kept", "away"),
            ("queued", "short", "never"),
            ("expired", "short", "never"),
        }
        wait_for(lambda: len(_told(receipts)) >= len(expected), seconds=90)
        assert _told(receipts) == expected
        first = receipts[0]
        assert json.loads(first.body) == {
            "outcome": first.properties["TAGS"],
            "keys": first.properties["KEYS"],
            "clientId": first.properties["clientId"],
            "mqttTopic": f"devices/p2p/{first.properties['clientId']}",
            "origMsgId": first.properties["origMsgId"],
        }
        wait_for(lambda: bridge.readiness()["orders-in.receipts"]["state"] == "up")
        await device.drop()
    assert bridge.stop() == 0
