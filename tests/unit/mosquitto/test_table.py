from typing import Any

from mq2mqtt.settings import Settings
from mq2mqtt_mosquitto.table import lane_table


def table(*rules: dict[str, Any], **sections: Any) -> list[str]:  # noqa: ANN401 - those of the settings
    settings = Settings.model_validate({"rules": rules, **sections})
    return lane_table(settings, settings.rule_set).decode().splitlines()


def test_lanes_are_those_of_enabled_outbound_rules_and_parents_all() -> None:
    rules = (
        {"id": "z-out", "type": "outbound", "source": "sensors", "target": "mq_a"},
        {"id": "a-out", "type": "outbound", "source": "meters", "target": "mq_b", "enabled": False},
        {"id": "b-out", "type": "outbound", "source": "日本", "target": "mq_b"},
        {"id": "commands-in", "type": "inbound", "source": "mq_c", "target": "devices"},
    )
    expected = [
        "lane\tb-out\t日本",
        "lane\tz-out\tsensors",
        "parent\tdevices",
        "parent\tmeters",
        "parent\tsensors",
        "parent\t日本",
    ]
    first, *lines = table(*rules)
    assert first == "mq2mqtt-table\t1\t1073741824\tprocess\t-\t-"
    assert lines == expected
    # The order of the configuration means nothing to the hook.
    assert table(*reversed(rules)) == [first, *lines]


def test_limits_and_durability() -> None:
    spool = {"max_bytes": "64KiB", "durability": "power"}
    limits = {"topic_chars": 64, "payload_bytes": "64KiB"}
    assert table(spool=spool, limits=limits) == ["mq2mqtt-table\t1\t65536\tpower\t64\t65536"]
