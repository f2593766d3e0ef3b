"""No acknowledged message is lost while RocketMQ or the bridge is killed under a QoS 1 stream."""

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

_OUTAGE_SECONDS = 10.0


def _report(what: str, stream: Stream, bodies: list[bytes]) -> None:
    """Print the counts; fail when an acknowledged message is missing or a client's order is broken."""
    first_seen = list(dict.fromkeys(bodies))
    missing = stream.acknowledged - set(bodies)
    disorder = sum(a > b for a, b in zip(map(int, first_seen), map(int, first_seen[1:]), strict=False))
    print(  # noqa: T201 - the counts are the result
        f"{what}: acknowledged {len(stream.acknowledged)}, arrived {len(first_seen)}, missing {len(missing)}, "
        f"duplicated {len(bodies) - len(first_seen)}, out of order {disorder}, "
        f"longest stall of the publisher {stream.longest_stall:.2f} s"
    )
    assert not missing
    assert disorder == 0


def _bridge(directory: Path, server: RocketMQ, topic: str) -> BridgeProcess:
    rules: list[dict[str, Any]] = [{"id": "stream-out", "type": "outbound", "source": "stream", "target": topic}]
    bridge = BridgeProcess(directory, namesrv=server.namesrv, rules=rules)
    bridge.start()
    return bridge


def _create(server: RocketMQ) -> str:
    asyncio.run(server.create_topic("mq_stream"))
    return "mq_stream"


def test_rocketmq_killed_for_ten_seconds(own_rocketmq: RocketMQ, tmp_path: Path) -> None:
    topic = _create(own_rocketmq)
    bridge = _bridge(tmp_path / "bridge", own_rocketmq, topic)
    stream = Stream(bridge.mqtt_port, "stream/x", rate=500)
    stream.start()
    try:
        wait_for(lambda: len(stream.acknowledged) > 500)
        own_rocketmq.kill_broker()
        killed = time.monotonic()
        wait_for(lambda: bridge.readiness()["stream-out"]["state"] == "down", seconds=5, what="/readyz stays ready")
        assert bridge.readiness()["stream-out"]["reason"]
        time.sleep(max(0.0, _OUTAGE_SECONDS - (time.monotonic() - killed)))
        assert bridge.metric("mq2mqtt_lane_messages", rule="stream-out") > 1000
        asyncio.run(own_rocketmq.start_broker())
        wait_for(lambda: bridge.readiness()["stream-out"]["state"] == "up", seconds=60)
        time.sleep(1.0)
    finally:
        stream.stop()
    wait_for(lambda: bridge.metric("mq2mqtt_lane_messages", rule="stream-out") == 0, seconds=60)
    accepted = bridge.metric("mq2mqtt_messages_total", rule="stream-out", outcome="accepted")
    assert accepted == bridge.metric("mq2mqtt_messages_total", rule="stream-out", outcome="sent")
    with RocketPeer(own_rocketmq.namesrv) as peer, peer.collect(topic) as messages:
        wait_for(lambda: stream.acknowledged <= {message.body for message in messages}, seconds=60)
        _report("RocketMQ killed for 10 s", stream, [message.body for message in messages])
    # RocketMQ's absence is not the publisher's business.
    assert stream.longest_stall < 1.0
    assert bridge.stop() == 0


def test_bridge_killed_in_mid_stream(own_rocketmq: RocketMQ, tmp_path: Path) -> None:
    topic = _create(own_rocketmq)
    bridge = _bridge(tmp_path / "bridge", own_rocketmq, topic)
    stream = Stream(bridge.mqtt_port, "stream/x", rate=500)
    stream.start()
    try:
        for _ in range(3):
            acknowledged = len(stream.acknowledged)
            wait_for(lambda: len(stream.acknowledged) > acknowledged + 300)  # noqa: B023 - evaluated in this turn
            bridge.kill()
            bridge.start(ready=False)
        wait_for(lambda: bridge.readiness()["stream-out"]["state"] == "up", seconds=30)
    finally:
        stream.stop()
    with RocketPeer(own_rocketmq.namesrv) as peer, peer.collect(topic) as messages:
        wait_for(lambda: stream.acknowledged <= {message.body for message in messages}, seconds=60)
        _report("bridge killed 3 times", stream, [message.body for message in messages])
    assert bridge.stop() == 0
