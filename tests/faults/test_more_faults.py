"""The name server goes under a stream; the bridge is stopped and started while RocketMQ is away."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from mq2mqtt.quickstart.rocketmq import RocketMQ
from tests.bridge_process import BridgeProcess, wait_for
from tests.rocket_peer import RocketPeer
from tests.stream import Stream

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


def test_a_name_server_that_goes_and_a_restart_without_rocketmq(own_rocketmq: RocketMQ, tmp_path: Path) -> None:
    asyncio.run(own_rocketmq.create_topic("mq_stream"))
    rules: list[dict[str, Any]] = [{"id": "stream-out", "type": "outbound", "source": "stream", "target": "mq_stream"}]
    bridge = BridgeProcess(tmp_path / "bridge", namesrv=own_rocketmq.namesrv, rules=rules)
    bridge.start()
    stream = Stream(bridge.mqtt_port, "stream/x", rate=300)
    stream.start()
    try:
        wait_for(lambda: len(stream.acknowledged) > 300)
        own_rocketmq.kill_namesrv()
        before = bridge.metric("mq2mqtt_messages_total", rule="stream-out", outcome="sent")
        time.sleep(3.5)  # longer than a route is believed without asking
        # Brokers that are known still take messages.
        assert bridge.get("/readyz")[0] == 200
        assert bridge.metric("mq2mqtt_messages_total", rule="stream-out", outcome="sent") > before + 300
        asyncio.run(own_rocketmq.start_namesrv())
        own_rocketmq.kill_broker()
        wait_for(lambda: bridge.get("/readyz")[0] == 503)
        assert bridge.stop() == 0
        bridge.start(ready=False)
        acknowledged = len(stream.acknowledged)
        wait_for(lambda: len(stream.acknowledged) > acknowledged + 300)
        asyncio.run(own_rocketmq.start_broker())
        wait_for(lambda: bridge.get("/readyz")[0] == 200, seconds=60)
    finally:
        stream.stop()
    wait_for(lambda: bridge.metric("mq2mqtt_lane_messages", rule="stream-out") == 0)
    with RocketPeer(own_rocketmq.namesrv) as peer, peer.collect("mq_stream") as messages:
        wait_for(lambda: stream.acknowledged <= {message.body for message in messages})
    numbers = [int(body) for body in dict.fromkeys(message.body for message in messages)]
    assert numbers == sorted(numbers)
    assert bridge.stop() == 0
    assert "Traceback" not in bridge.log_file.read_text()
