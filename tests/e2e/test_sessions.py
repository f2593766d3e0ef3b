"""Who is connected, as a program on the machine asks over HTTP, through everything that ends a connection."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.bridge_process import BridgeProcess
from tests.conftest import MakeTopic, SharedRocketMQ
from tests.mqtt_client import Client
from tests.new_bridge import new_bridge
from tests.rocket_peer import RocketPeer
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

NAME = "GID_dev@@@ä %1"


@pytest.fixture
def bridge(rocketmq: SharedRocketMQ, tmp_path: Path) -> Iterator[BridgeProcess]:
    bridge = new_bridge(tmp_path / "bridge", namesrv=rocketmq.namesrv, rules=[])
    yield bridge
    bridge.kill()


def session(bridge: BridgeProcess, client_id: str = NAME) -> Any:  # noqa: ANN401 - JSON
    url = f"{bridge.admin_url}/api/v1/sessions/{quote(client_id, safe='')}"
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own
        return json.load(answer)


def reasons(bridge: BridgeProcess) -> list[str]:
    return [entry["reason"] for entry in session(bridge)["history"]]


async def test_a_device_through_everything_that_ends_its_connection(
    bridge: BridgeProcess, peer: RocketPeer, make_topic: MakeTopic
) -> None:
    source = await make_topic(queues=1)
    bridge.config["rules"] = [
        {"id": "commands-in", "type": "inbound", "source": source, "target": "devices", "from": "earliest"}
    ]
    bridge.start()
    assert session(bridge) == {"clientId": NAME, "online": False, "offlineMessages": 0, "history": []}

    first = await Client.connect(bridge.mqtt_port, NAME, clean=False)
    await until(lambda: session(bridge)["online"] and len(session(bridge)["history"]) == 1)
    was = session(bridge)
    assert was["clientIp"].startswith("127.0.0.1")
    assert was["cleanSession"] is False
    assert {name: was["history"][0][name] for name in ("channelId", "clientIp", "connectedAt", "endedAt")} == {
        "channelId": was["channelId"],
        "clientIp": was["clientIp"],
        "connectedAt": was["connectedAt"],
        "endedAt": None,
    }
    second = await Client.connect(bridge.mqtt_port, NAME, clean=False)
    await until(lambda: reasons(bridge) == ["", "clientId conflict"])
    now = session(bridge)
    assert now["online"] is True
    assert now["channelId"] != was["channelId"]
    await first.drop()
    await second.disconnect()
    await until(lambda: reasons(bridge) == ["disconnected by client", "clientId conflict"])
    assert session(bridge)["online"] is False
    ended = session(bridge)["history"][0]
    assert ended["connectedAt"] == now["connectedAt"] <= ended["endedAt"]

    peer.send(source, b"on", mqttSecondTopic=f"/p2p/{NAME}", qoslevel="1", cleansessionflag="false")
    await until(lambda: session(bridge)["offlineMessages"] == 1)
    third = await Client.connect(bridge.mqtt_port, NAME, clean=False)
    await third.wait_messages(1)
    await until(lambda: session(bridge)["offlineMessages"] == 0)
    await third.drop()
    await until(lambda: reasons(bridge)[0] == "closed by client")

    last = await Client.connect(bridge.mqtt_port, NAME, clean=False)
    await until(lambda: session(bridge)["online"] and len(reasons(bridge)) == 4)
    bridge.kill()
    bridge.start()
    await until(lambda: reasons(bridge)[0] == "broker restarted")
    assert session(bridge)["online"] is False
    await last.drop()
    assert bridge.stop() == 0
