"""What becomes of the hook's client events when somebody deletes their lane under Mosquitto and the sidecar."""

import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SharedRocketMQ
from tests.faults.flapping import status_events
from tests.mosquitto_bridge import MosquittoBridge
from tests.mqtt_client import Client
from tests.rocket_peer import RocketPeer
from tests.waiting import until

pytestmark = pytest.mark.e2e


async def test_client_events_that_are_deleted_under_both_are_told_again(
    rocketmq: SharedRocketMQ, peer: RocketPeer, tmp_path: Path
) -> None:
    topic = f"t_{uuid.uuid4().hex[:12]}"
    peer.create_topic(topic)
    rules: list[dict[str, Any]] = [{"id": "presence", "type": "status", "source": "GID_away", "target": topic}]
    bridge = MosquittoBridge(tmp_path, namesrv=rocketmq.namesrv, rules=rules)
    bridge.config["node"] = uuid.uuid4().hex[:12]
    bridge.start()

    def told(*clients: str) -> bool:
        return {(event.type, event.connection[0]) for event in status_events(messages)} >= {
            ("connect", client) for client in clients
        }

    try:
        with peer.collect(topic) as messages:
            first = await Client.connect(bridge.mqtt_port, "GID_away@@@1")
            await until(lambda: told("GID_away@@@1"))
            shutil.rmtree(bridge.spool / ".clients")
            await until(lambda: bridge.readiness()["presence"]["state"] == "down")
            second = await Client.connect(bridge.mqtt_port, "GID_away@@@2")
            # Its connect is in the list that is asked for when there are events again.
            await until(lambda: bridge.readiness()["presence"]["state"] == "up")
            third = await Client.connect(bridge.mqtt_port, "GID_away@@@3")
            await until(lambda: told("GID_away@@@2", "GID_away@@@3"))
            assert not [event for event in status_events(messages) if event.type == "tcpclean"]
            for client in (first, second, third):
                await client.drop()
        assert bridge.stop() == 0
    finally:
        bridge.kill()
