"""The bridge's connections to RocketMQ are cut, and become half-open."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mq2mqtt.quickstart.rocketmq import RocketMQ
from tests.faults.report import FaultTable
from tests.faults.scene import Downlink, Scene, Traffic, Uplink
from tests.rocket_peer import RocketPeer
from tests.tcp_proxy import TcpProxy

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

_OUTAGE_SECONDS = 10.0

Break = Callable[[TcpProxy], None]


@pytest.mark.parametrize(
    ("fault", "break_them"),
    [("cut", TcpProxy.cut), ("half-open: they stay, and nothing gets through either way", TcpProxy.swallow)],
    ids=["cut", "half-open"],
)
def test_all_connections(  # noqa: PLR0913, PLR0917 - fixtures
    own: RocketMQ, peer: RocketPeer, tmp_path: Path, fault_table: FaultTable, fault: str, break_them: Break
) -> None:
    up, down = Uplink("events-out", qos=1, rate=200), Downlink("commands-in", rate=20)
    idle: list[Traffic] = [Uplink("idle-out", qos=1, rate=1), Downlink("idle-in", rate=1)]
    with TcpProxy() as proxy:
        namesrv, broker = proxy.listen(own.namesrv), proxy.listen(own.broker_address)
        options = {"address_map": {own.broker_address: broker}}
        with Scene(tmp_path, namesrv=namesrv, peer=peer, traffic=[up, down], idle=idle, rocketmq=options) as scene:
            scene.start()
            break_them(proxy)
            broken = time.monotonic()
            told = scene.wait_told(*(one.rule_id for one in (up, down, *idle)), since=broken)
            time.sleep(max(0.0, broken + _OUTAGE_SECONDS - time.monotonic()))
            proxy.mend()
            scene.finish(fault_table, f"connections to RocketMQ {fault}, for {_OUTAGE_SECONDS:g} s", told=told)
