"""The bridge with PostgreSQL as its store: kept over the end of either, down with the reason while it is away."""

import asyncio
import uuid
from pathlib import Path

import pytest

from tests.conftest import SharedRocketMQ
from tests.faults.report import assert_invariants
from tests.mqtt_client import Client
from tests.new_bridge import new_bridge
from tests.postgresql import PostgreSQL
from tests.rocket_peer import RocketPeer
from tests.waiting import until

pytestmark = pytest.mark.e2e

_RULE = "devices-in"
_NAME = "GID_kept@@@postgresql"


async def test_messages_are_kept_over_the_end_of_postgresql_and_of_the_bridge(
    rocketmq: SharedRocketMQ, postgresql: PostgreSQL, peer: RocketPeer, tmp_path: Path
) -> None:
    into = f"in_{uuid.uuid4().hex[:12]}"
    peer.create_topic(into, queues=1)
    rule = {"id": _RULE, "type": "inbound", "source": into, "target": "devices"}
    bridge = new_bridge(tmp_path, namesrv=rocketmq.namesrv, rules=[rule])
    bridge.config["store"] = {"url": await postgresql.new_database()}

    def send(first: int, last: int) -> None:
        bodies = [b"%d" % number for number in range(first, last)]
        address = {"mqttSecondTopic": f"/p2p/{_NAME}", "qoslevel": "1", "cleansessionflag": "false"}
        peer.send_many(into, bodies, **address)

    def outcome(name: str) -> float:
        return bridge.metric("mq2mqtt_messages_total", rule=_RULE, outcome=name)

    bridge.start()
    try:
        send(0, 10)
        await until(lambda: outcome("queued") == 10)
        postgresql.stop()
        try:
            send(10, 20)
            await until(lambda: bridge.get("/readyz")[0] == 503 and "store" in bridge.get("/readyz")[1])
            await until(lambda: outcome("received") == 20)
            assert outcome("queued") == 10
        finally:
            await asyncio.to_thread(postgresql.start)
        await until(lambda: outcome("queued") == 20)
        await until(lambda: bridge.get("/readyz")[0] == 200)
        bridge.kill()
        bridge.start()
        # RocketMQ may not have been told of the last ones; it brings them again.
        assert bridge.metric("mq2mqtt_offline_messages") >= 20

        device = await Client.connect(bridge.mqtt_port, _NAME)
        await device.wait(lambda: len(device.messages) >= 20, "kept messages")
        await until(lambda: bridge.metric("mq2mqtt_offline_messages") == 0)
        assert list(dict.fromkeys(int(message.payload) for message in device.messages)) == list(range(20))
        await device.drop()
        assert_invariants(bridge)
        log = bridge.log_file.read_text()
        assert log.count("; trying again until it works") == 1
        assert log.count("store: writes again, after ") == 1
        assert "Traceback" not in log
        assert bridge.stop() == 0
    finally:
        bridge.kill()
