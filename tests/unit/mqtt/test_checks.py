"""`mq2mqtt check` on the broker of `host.type: mqtt`, a real Mosquitto without the hook."""

from pathlib import Path
from typing import Any

import pytest

from mq2mqtt.quickstart.ports import free_port
from mq2mqtt.settings import Settings
from mq2mqtt_mqtt.checks import check_broker
from tests.plain_mosquitto import PlainMosquitto

OUT = {"id": "sensors-out", "type": "outbound", "source": "sensors", "target": "mq_sensors"}
STATUS = {"id": "presence", "type": "status", "source": "GID_dev", "target": "mq_status"}


def settings(url: str, *rules: dict[str, Any]) -> Settings:
    return Settings.model_validate({"host": {"type": "mqtt", "url": url}, "rules": list(rules)})


@pytest.mark.parametrize(
    ("options", "code", "lines"),
    [
        (
            ("max_packet_size 2000",),
            0,
            [
                "ok       host.url URL: the broker lets the sidecar in",
                "ok       host.url URL: it takes packets up to 2000 bytes, longer ones are dropped",
                "ok       rule sensors-out: the broker takes the subscription to sensors/#",
                "ok       how much it keeps for the sidecar no broker tells: see docs/mqtt.md and --mosquitto-conf",
            ],
        ),
        (
            ("max_qos 0",),
            1,
            ["PROBLEM  rule sensors-out: the broker grants only QoS 0 for sensors/#: it would keep nothing"],
        ),
    ],
)
async def test_what_the_broker_says(
    options: tuple[str, ...], code: int, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = PlainMosquitto(tmp_path, options=options)
    broker.start()
    try:
        assert await check_broker(settings(broker.url, OUT)) == code
        assert await check_broker(settings(broker.url, {**STATUS, "enabled": False})) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.replace("URL", broker.url) not in printed] == []
        assert await check_broker(settings(broker.url, STATUS)) == 1
        assert "PROBLEM  rule presence: a plain MQTT client cannot see who is connected" in capsys.readouterr().out
        conf = broker.directory / "mosquitto.conf"
        assert await check_broker(settings(broker.url, {**STATUS, "enabled": False}), conf) == 1
        assert f"PROBLEM  {conf}: persistence is false: " in capsys.readouterr().out
    finally:
        broker.kill()


async def test_no_broker_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"mqtt://127.0.0.1:{free_port()}"
    assert await check_broker(settings(url)) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"PROBLEM  host.url {url}: ")
    assert "refused" in line
