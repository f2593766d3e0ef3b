"""Every experiment runs and says what it should; how fast it was is for a quiet machine to say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SharedRocketMQ

ROOT = Path(__file__).parents[2]

EXPERIMENTS = {
    "uplink-amqtt-qos1-1pub": {"published": "msg/s", "CPU of the server": "us/msg"},
    "uplink-amqtt-qos1-20pub": {"published": "msg/s", "CPU of the server": "us/msg"},
    "uplink-amqtt-qos0-1pub": {"published": "msg/s", "CPU of the server": "us/msg"},
    "uplink-amqtt-qos1-1pub-1sub": {"delivered": "msg/s", "CPU of the server": "us/msg"},
    "uplink-mosquitto-qos1-1pub": {"published": "msg/s", "CPU of the sidecar": "us/msg"},
    "uplink-mosquitto-qos1-20pub": {"published": "msg/s", "published, sidecar stands still": "msg/s"},
    "uplink-mosquitto-qos0-1pub": {"published": "msg/s", "CPU of the broker": "us/msg"},
    "uplink-mosquitto-qos1-1pub-1sub": {"delivered": "msg/s"},
    "drain": {"drained": "msg/s", "CPU of the server": "us/msg"},
    "drain-mosquitto": {"drained": "msg/s", "CPU of the sidecar": "us/msg"},
    "downlink-amqtt-1sub": {"delivered, QoS 0": "msg/s", "delivered, QoS 1": "msg/s"},
    "downlink-amqtt-1000sub": {"delivered, QoS 0": "msg/s"},
    "downlink-mosquitto-1sub": {"delivered, QoS 0": "msg/s", "delivered, QoS 1": "msg/s"},
    "downlink-mosquitto-1000sub": {"delivered, QoS 0": "msg/s", "delivered, QoS 1": "msg/s"},
    "downlink-mosquitto-1000p2p": {"delivered, QoS 0": "msg/s"},
    "latency-uplink": {"device to RocketMQ's store, p50": "ms", "device to RocketMQ's store, p99": "ms"},
    "latency-downlink": {"RocketMQ producer to device, p50": "ms", "RocketMQ producer to device, p99": "ms"},
    "latency-round-trip": {"device to RocketMQ application to device, p50": "ms"},
    "latency-mosquitto-uplink": {"device to PUBACK, p50": "ms", "device to RocketMQ's store, p99": "ms"},
    "latency-mosquitto-downlink": {"RocketMQ producer to device, p50": "ms"},
    "latency-mosquitto-round-trip": {"device to RocketMQ application to device, p50": "ms"},
    "client-send": {"sent": "msg/s"},
    "client-batch": {"sent": "msg/s"},
    "client-receive": {"received": "msg/s"},
    "spool-append": {"appended": "frames/s"},
    "spool-read": {"read": "frames/s", "read and settled": "frames/s"},
    "spool-commit": {"committed": "frames/s"},
    "offline-store": {"stored": "msg/s"},
    "offline-replay": {"read and removed": "msg/s"},
    "offline-amqtt": {"kept": "msg/s", "replayed": "msg/s"},
    "offline-mosquitto": {"kept": "msg/s", "CPU of the sidecar, replayed": "us/msg"},
    "status-amqtt": {"visits": "visits/s", "told in RocketMQ": "events/s"},
    "status-mosquitto": {"visits": "visits/s", "CPU of the sidecar, each visit": "us/msg"},
    "soak-mosquitto": {"resident memory of the broker, end": "MiB", "resident memory of the sidecar, end": "MiB"},
    "growth-rules": {"idle CPU, rules: 1": "%", "published, rules: 20": "msg/s"},
    "growth-subscriptions": {"delivered, subscriptions: 10": "msg/s", "delivered, subscriptions: 2,000": "msg/s"},
    "growth-backlog": {"published, waiting: 0": "msg/s", "start until it listens, waiting: 100,000": "s"},
    "growth-connections": {"memory of each, connections: 20": "KiB"},
}
"""Some of the metrics of each, with their units."""


@pytest.mark.e2e
@pytest.mark.timeout(1800)
def test_a_quick_run_measures_everything(rocketmq: SharedRocketMQ, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [
        sys.executable,
        "-m",
        "tests.bench.run",
        "--quick",
        "--rocketmq",
        rocketmq.namesrv,
        "--json",
        str(figures),
    ]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

    rows = json.loads(figures.read_text())
    for row in rows:
        assert list(row) == ["experiment", "metric", "value", "unit", "baseline", "ratio", "runs"]
        assert row["runs"] == [row["value"]]
        assert row["metric"] in done.stdout
    found = {(row["experiment"], row["metric"]): row for row in rows}
    assert {experiment for experiment, _ in found} == set(EXPERIMENTS)
    for experiment, metrics in EXPERIMENTS.items():
        for metric, unit in metrics.items():
            row = found[experiment, metric]
            assert row["unit"] == unit
            # The clock of a process ticks every 10 ms, and its memory does not grow with each connection.
            assert row["value"] > 0 or unit in {"%", "us/msg", "KiB"}
    for experiment in ("uplink-amqtt-qos1-1pub", "uplink-amqtt-qos1-20pub", "uplink-amqtt-qos0-1pub"):
        row = found[experiment, "published"]
        assert row["ratio"] == pytest.approx(row["value"] / row["baseline"])


@pytest.mark.e2e
def test_one_that_fails_costs_the_figures_of_no_other(rocketmq: SharedRocketMQ, tmp_path: Path) -> None:
    command = [str(ROOT / "scripts" / "bench"), "uplink-mosquitto-qos0-1pub", "spool-append", "--quick"]
    command += ["--rocketmq", rocketmq.namesrv, "--json", "figures.json"]
    broken = os.environ | {"MOSQUITTO": "/bin/false"}
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, env=broken)
    assert done.returncode == 1, done.stderr[-4000:]
    assert "uplink-mosquitto-qos0-1pub: failed: " in done.stderr
    assert {row["experiment"] for row in json.loads((tmp_path / "figures.json").read_text())} == {"spool-append"}
    assert "spool-append" in done.stdout


def test_a_rocketmq_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.run", "spool-append", "--quick"]
    # Nothing listens there.
    command += ["--rocketmq", "127.0.0.1:1", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "127.0.0.1:1" in done.stderr
