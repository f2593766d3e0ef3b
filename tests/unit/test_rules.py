"""Rules, what they accept, and the lookups of a set of them."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from mq2mqtt.errors import ConfigError
from mq2mqtt.rules import InboundRule, OutboundRule, Rule, RuleSet, StatusRule

RULE: TypeAdapter[Rule] = TypeAdapter(Rule)
OUT = {"id": "telemetry-out", "type": "outbound", "source": "sensors", "target": "mq_sensors"}
IN = {"id": "commands-in", "type": "inbound", "source": "mq_commands", "target": "devices"}
STATUS = {"id": "presence", "type": "status", "source": "GID_dev", "target": "mq_status"}


def rule(base: dict[str, str], **changes: Any) -> Rule:  # noqa: ANN401 - any field's value
    return RULE.validate_python({**base, **changes})


def rules(*items: dict[str, Any]) -> RuleSet:
    return RuleSet(RULE.validate_python(item) for item in items)


def problem(base: dict[str, str], **changes: Any) -> str:  # noqa: ANN401
    with pytest.raises(ValidationError) as caught:
        rule(base, **changes)
    (error,) = caught.value.errors()
    return str(error["msg"])


def test_the_types() -> None:
    assert isinstance(rule(OUT), OutboundRule)
    assert isinstance(rule(IN), InboundRule)
    assert isinstance(rule(STATUS), StatusRule)


def test_defaults() -> None:
    inbound = rule(IN)

    assert isinstance(inbound, InboundRule)
    assert (inbound.enabled, inbound.description) == (True, "")
    assert (inbound.tags, inbound.group, inbound.start) == ("MQ2MQTT", None, "latest")
    assert inbound.consumer_group("n1") == "GID_mq2mqtt_commands-in_n1"


def test_inbound_fields() -> None:
    inbound = rule(IN, tags="a||b", group="GID_own", **{"from": "earliest"})

    assert isinstance(inbound, InboundRule)
    assert (inbound.tags, inbound.start, inbound.consumer_group("n1")) == ("a || b", "earliest", "GID_own")


def test_the_rocketmq_topic_of_each_type() -> None:
    assert [rule(base).rocketmq_topic for base in (OUT, IN, STATUS)] == ["mq_sensors", "mq_commands", "mq_status"]


def test_rules_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        rule(OUT).enabled = False


@pytest.mark.parametrize("changes", [{"tags": "x"}, {"group": "x"}, {"from": "latest"}, {"sources": "x"}])
def test_fields_of_another_type_or_none(changes: dict[str, str]) -> None:
    assert problem(OUT, **changes) == "Extra inputs are not permitted"


@pytest.mark.parametrize("rule_id", ["abc", "a--", "_0_", "111111", "A-b_9", "x" * 64])
def test_legal_ids(rule_id: str) -> None:
    assert rule(OUT, id=rule_id).id == rule_id


@pytest.mark.parametrize("rule_id", ["", "ab", "---", "_-_", "x" * 65, "a b", "a/b", "äöü", "abc\n", "a.b"])
def test_illegal_ids(rule_id: str) -> None:
    assert "is no rule id" in problem(OUT, id=rule_id)


@pytest.mark.parametrize("topic", ["sensors", "s", "GID_x", "a.b", "a:b,c", "Geräte", "my sensors", "a$b", "x" * 255])
@pytest.mark.parametrize("base_field", [(OUT, "source"), (IN, "target")])
def test_legal_parent_topics(topic: str, base_field: tuple[dict[str, str], str]) -> None:
    base, field = base_field
    assert getattr(rule(base, **{field: topic}), field) == topic


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("", "is empty"),
        ("a/b", "has more than one level: use the first one, 'a'"),
        ("a/", "has more than one level"),
        ("/a", "has more than one level"),
        ("a+", "contains the wildcard +"),
        ("#", "contains the wildcard #"),
        ("a\0", "contains the character NUL"),
        ("$SYS", "begins with $"),
        ("a\x01", "unprintable"),
        ("a\n", "unprintable"),
        ("x" * 256, "is longer than 255 characters"),
    ],
)
@pytest.mark.parametrize("base_field", [(OUT, "source"), (IN, "target")])
def test_illegal_parent_topics(topic: str, words: str, base_field: tuple[dict[str, str], str]) -> None:
    base, field = base_field
    assert words in problem(base, **{field: topic})


@pytest.mark.parametrize("topic", ["t", "T-1_x", "%RETRY%g", "a|b", "x" * 127])
def test_legal_rocketmq_topics(topic: str) -> None:
    assert rule(OUT, target=topic).rocketmq_topic == topic
    assert rule(IN, source=topic).rocketmq_topic == topic
    assert rule(STATUS, target=topic).rocketmq_topic == topic


@pytest.mark.parametrize("topic", ["", "a b", "a/b", "a.b", "tä", "x" * 128, "a\n"])
def test_illegal_rocketmq_topics(topic: str) -> None:
    words = "is no RocketMQ topic: use 1 to 127 letters"
    assert words in problem(OUT, target=topic)
    assert words in problem(IN, source=topic)
    assert words in problem(STATUS, target=topic)


@pytest.mark.parametrize(
    ("group", "legal"), [("g", True), ("x" * 255, True), ("x" * 256, False), ("a.b", False), ("", False)]
)
def test_consumer_groups(group: str, legal: bool) -> None:  # noqa: FBT001 - a table's column
    if legal:
        inbound = rule(IN, group=group)
        assert isinstance(inbound, InboundRule)
        assert inbound.consumer_group("n") == group
    else:
        assert "is no RocketMQ consumer group: use 1 to 255" in problem(IN, group=group)


def test_the_longest_default_group_leaves_room_for_its_retry_topic() -> None:
    inbound = rule(IN, id="x" * 64)
    assert isinstance(inbound, InboundRule)

    rule(IN, source=f"%RETRY%{inbound.consumer_group('n' * 32)}")


@pytest.mark.parametrize("group_id", ["GID_dev", "GID-dev", "GID_" + "x" * 60, "GID__-_"])
def test_legal_group_ids(group_id: str) -> None:
    assert rule(STATUS, source=group_id).source == group_id


@pytest.mark.parametrize("group_id", ["", "dev", "GID_ab", "GID_" + "x" * 61, "gid_dev", "GIDxdev", "GID_a@@@b"])
def test_illegal_group_ids(group_id: str) -> None:
    assert "is no GroupID" in problem(STATUS, source=group_id)


@pytest.mark.parametrize(
    ("tags", "canonical"), [("*", "*"), (" * ", "*"), ("a", "a"), ("a||b", "a || b"), (" a ||b|| c ", "a || b || c")]
)
def test_legal_tags(tags: str, canonical: str) -> None:
    inbound = rule(IN, tags=tags)
    assert isinstance(inbound, InboundRule)
    assert inbound.tags == canonical


@pytest.mark.parametrize("tags", ["", "||", "a||", "a | b", "a b", "a || *", "a\x01", "*||*"])
def test_illegal_tags(tags: str) -> None:
    assert "is no tag expression" in problem(IN, tags=tags)


def test_from_takes_no_other_word() -> None:
    assert "'latest' or 'earliest'" in problem(IN, **{"from": "now"})


def test_lookups() -> None:
    found = rules(OUT, IN, STATUS)

    assert [item.id for item in found] == ["telemetry-out", "commands-in", "presence"]
    assert len(found) == 3
    assert found.get("presence") == rule(STATUS)
    assert found.get("Presence") is None
    assert found.inbound("devices") == rule(IN)
    assert found.inbound("sensors") is None
    assert found.status("GID_dev") == rule(STATUS)
    assert found.status("GID_other") is None


@pytest.mark.parametrize("topic", ["sensors", "sensors/", "sensors/a", "sensors/p2p/c", "sensors//"])
def test_outbound_owns_everything_below_its_source(topic: str) -> None:
    assert rules(OUT, IN).outbound(topic) == rule(OUT)


@pytest.mark.parametrize(
    "topic", ["sensors2/x", "sensor/x", "Sensors/x", "/sensors", "x/sensors", "devices/x", "$SYS/x", ""]
)
def test_outbound_owns_nothing_else(topic: str) -> None:
    assert rules(OUT, IN).outbound(topic) is None


def test_disabled_rules_are_in_the_set_but_not_found() -> None:
    disabled = rules(*({**base, "enabled": False} for base in (OUT, IN, STATUS)))

    assert len(disabled) == 3
    assert disabled.get("presence") == rule(STATUS, enabled=False)
    assert disabled.outbound("sensors/a") is None
    assert disabled.inbound("devices") is None
    assert disabled.status("GID_dev") is None


def test_parents_are_of_all_rules() -> None:
    found = rules({**OUT, "enabled": False}, IN, STATUS, {**IN, "id": "in2", "target": "sensors", "source": "other"})

    assert found.parents == {"sensors", "devices"}
    assert found.parent_rule("devices") == rule(IN)
    assert found.parent_rule("sensors") == rule(OUT, enabled=False)
    assert found.parent_rule("GID_dev") is None


def test_what_may_be_shared() -> None:
    """Both ways on one MQTT topic; one RocketMQ topic for several rules."""
    rules(
        OUT,
        {**OUT, "id": "out2", "source": "sensors2"},
        {**OUT, "id": "out3", "source": "Sensors"},
        {**IN, "target": "sensors"},
        {**IN, "id": "in2", "target": "devices2", "group": "g"},
        {**STATUS, "target": "mq_sensors"},
    )


@pytest.mark.parametrize(
    ("first", "second", "line"),
    [
        (
            OUT,
            {**OUT, "id": "out2"},
            (
                "rules[1] (out2): source: 'sensors' is already the source of rules[0] (telemetry-out); "
                "an MQTT topic has one outbound rule, disabled ones count"
            ),
        ),
        (
            {**IN, "enabled": False},
            {**IN, "id": "in2", "source": "other"},
            (
                "rules[1] (in2): target: 'devices' is already the target of rules[0] (commands-in); "
                "an MQTT topic has one inbound rule, disabled ones count"
            ),
        ),
        (
            STATUS,
            {**STATUS, "id": "status2", "enabled": False},
            (
                "rules[1] (status2): source: 'GID_dev' already has its status rule, rules[0] (presence); "
                "a GroupID has one status rule, disabled ones count"
            ),
        ),
        (
            {**IN, "group": "GID_own"},
            {**IN, "id": "in2", "target": "devices2", "group": "GID_own"},
            (
                "rules[1] (in2): group: 'GID_own' is already the consumer group of rules[0] (commands-in); "
                "give each rule its own group, they would take each other's messages away"
            ),
        ),
        (
            OUT,
            {**IN, "id": "Telemetry-OUT"},
            (
                "rules[1] (Telemetry-OUT): id: 'Telemetry-OUT' is taken by rules[0] (telemetry-out); "
                "give each rule its own id, different by more than upper and lower case"
            ),
        ),
    ],
)
def test_conflicts(first: dict[str, Any], second: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rules(first, second)
    assert str(caught.value) == line


def test_each_conflict_is_a_line_of_its_own() -> None:
    with pytest.raises(ConfigError) as caught:
        rules(OUT, OUT, {**OUT, "id": "out3"})
    assert [line.split(":")[:2] for line in str(caught.value).splitlines()] == [
        ["rules[1] (telemetry-out)", " id"],
        ["rules[1] (telemetry-out)", " source"],
        ["rules[2] (out3)", " source"],
    ]


def test_diff() -> None:
    before = rules(OUT, IN, STATUS)
    after = rules(
        {**STATUS, "target": "elsewhere"}, OUT, {"id": "new", "type": "outbound", "source": "x", "target": "y"}
    )
    diff = before.diff(after)

    assert [item.id for item in diff.added] == ["new"]
    assert [item.id for item in diff.removed] == ["commands-in"]
    assert [(old.target, new.target) for old, new in diff.changed] == [("mq_status", "elsewhere")]
    assert diff


def test_no_diff() -> None:
    assert not rules(OUT, IN).diff(rules(IN, OUT))
