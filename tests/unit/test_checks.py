"""`mq2mqtt check` on the topics that rules name."""

import pytest

from mq2mqtt.checks import _check_rules
from mq2mqtt.link.memory import MemoryCluster, MemoryLink
from mq2mqtt.settings import Settings


async def test_the_topic_of_receipts_is_looked_at_and_made_too(capsys: pytest.CaptureFixture[str]) -> None:
    rule = {"id": "commands-in", "type": "inbound", "source": "mq_in", "target": "devices", "receipts": "mq_receipts"}
    settings = Settings.model_validate({"rules": [rule]})
    cluster = MemoryCluster()
    cluster.create_topic("mq_in", 1)
    link = MemoryLink(cluster=cluster, client_id="check")
    for create, code in ((False, 1), (True, 0), (False, 0)):
        assert await _check_rules(settings, link, create=create) == code
    said = capsys.readouterr().out.splitlines()
    group = "GID_mq2mqtt_commands-in_default"
    read = f"ok       rule commands-in: RocketMQ topic mq_in exists, and may be read in group {group}"
    topic = "rule commands-in: RocketMQ topic mq_receipts"
    missing = f"PROBLEM  {topic} does not exist: create it, or run check --create"
    assert said == [read, missing, read, f"created  {topic}", read, f"ok       {topic} exists, and may be written"]
