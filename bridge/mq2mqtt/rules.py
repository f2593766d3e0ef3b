"""Rules: what goes from where to where, and an immutable set of them with its lookups. Pure."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mq2mqtt import topics
from mq2mqtt.errors import ConfigError
from mq2mqtt.mapping import INBOUND_TAG

__all__ = [
    "GROUP_ID_PATTERN",
    "InboundRule",
    "OutboundRule",
    "Rule",
    "RuleDiff",
    "RuleSet",
    "StatusRule",
    "conflicts",
    "group_of",
    "rule_location",
]

# Spec 2.1: 3 to 64 letters, digits, `-` and `_`, at least one of them a letter or digit.
_RULE_ID = re.compile(r"(?=.*[A-Za-z0-9])[A-Za-z0-9_-]{3,64}")
# What RocketMQ's own client and broker check: `Validators` and `TopicValidator` of 4.9 and 5.x.
_ROCKETMQ_NAME = re.compile(r"[%|A-Za-z0-9_-]+")
_TOPIC_CHARS: Final = 127
_GROUP_CHARS: Final = 255
_PARENT_CHARS: Final = 255
# Rules that a diff names of each kind, for a readable line.
_NAMED: Final = 20
# Spec 1.1.
GROUP_ID_PATTERN: Final = re.compile(r"GID[_-][A-Za-z0-9_-]{3,60}")


def group_of(client_id: str) -> str:
    """Return the GroupID of a client id `<GroupID>@@@<DeviceID>`; empty for any other client id (spec 1.1)."""
    group, separator, _ = client_id.partition("@@@")
    return group if separator else ""


def _rule_id(value: str) -> str:
    if not _RULE_ID.fullmatch(value):
        raise ValueError(
            f"{value!r} is no rule id: use 3 to 64 letters, digits, '-' and '_', at least one a letter or digit"
        )
    return value


def _parent_topic(value: str) -> str:
    """Take any one MQTT level that a publish can name.

    ApsaraMQ takes only letters, digits, `-` and `_`; a broker that runs already may use more, and MQTT itself
    gives no reason to refuse it. `$` topics are the broker's own (MQTT-4.7.2-1) and reach no rule. Control
    characters, which MQTT advises against (MQTT-1.5.3-2), would only ever be a slip in a configuration.
    """
    problem = topics.topic_problem(value)
    if problem is None and "/" in value:
        problem = f"has more than one level: use the first one, {topics.parent_of(value)!r}; it covers all below it"
    if problem is None and value.startswith("$"):
        problem = "begins with $: such topics belong to the broker"
    if problem is None and not value.isprintable():
        problem = "contains a control or other unprintable character"
    if problem is None and len(value) > _PARENT_CHARS:
        problem = f"is longer than {_PARENT_CHARS} characters"
    if problem is not None:
        raise ValueError(f"MQTT parent topic {value!r} {problem}")
    return value


def _rocketmq_name(value: str, *, kind: str, max_chars: int) -> str:
    if not _ROCKETMQ_NAME.fullmatch(value) or len(value) > max_chars:
        raise ValueError(
            f"{value!r} is no RocketMQ {kind}: use 1 to {max_chars} letters, digits and the characters % | - _"
        )
    return value


def _rocketmq_topic(value: str) -> str:
    return _rocketmq_name(value, kind="topic", max_chars=_TOPIC_CHARS)


def _consumer_group(value: str) -> str:
    return _rocketmq_name(value, kind="consumer group", max_chars=_GROUP_CHARS)


def _group_id(value: str) -> str:
    if not GROUP_ID_PATTERN.fullmatch(value):
        raise ValueError(f"{value!r} is no GroupID: use GID_ or GID- and then 3 to 60 letters, digits, '-' and '_'")
    return value


def _tags(value: str) -> str:
    """Check a tag expression and write it the one way RocketMQ documents: `a || b`."""
    tags = [tag.strip() for tag in value.split("||")]
    if tags == ["*"]:
        return "*"
    for tag in tags:
        # A tag with one of these could not be told from two tags, or from all.
        if not tag or tag == "*" or any(char.isspace() or char == "|" or not char.isprintable() for char in tag):
            raise ValueError(f"{value!r} is no tag expression: use one tag, several as 'a || b', or '*' for all")
    return " || ".join(tags)


_ParentTopic = Annotated[str, AfterValidator(_parent_topic)]
_RocketTopic = Annotated[str, AfterValidator(_rocketmq_topic)]


class _RuleBase(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, AfterValidator(_rule_id)] = Field(
        description="Name of the rule: 3 to 64 letters, digits, `-` and `_`. Fixed: the lane and the consumer group on "
        "disk and in RocketMQ go by it.",
        examples=["telemetry-out"],
    )
    # The kinds of rules say what these three are; they stand here for the order of the fields.
    type: str
    source: str
    target: str
    description: str = Field(default="", description="Free text.")
    enabled: bool = Field(
        default=True,
        description="`false` pauses the rule: outbound takes no messages but sends what waits, inbound keeps its "
        "place. It counts for uniqueness all the same.",
    )


class OutboundRule(_RuleBase):
    """An MQTT parent topic into a RocketMQ topic."""

    type: Literal["outbound"] = Field(description="MQTT to RocketMQ.")
    source: _ParentTopic = Field(
        description="MQTT parent topic (first level). Every topic under it goes along.", examples=["sensors"]
    )
    target: _RocketTopic = Field(description="RocketMQ topic. It must exist.", examples=["mq_sensors"])

    @property
    def rocketmq_topic(self) -> str:
        """The RocketMQ topic at its end."""
        return self.target


class InboundRule(_RuleBase):
    """A RocketMQ topic into an MQTT parent topic."""

    type: Literal["inbound"] = Field(description="RocketMQ to MQTT.")
    source: _RocketTopic = Field(description="RocketMQ topic. It must exist.", examples=["mq_commands"])
    target: _ParentTopic = Field(
        description="MQTT parent topic; the message's property `mqttSecondTopic` is put under it.",
        examples=["devices"],
    )
    tags: Annotated[str, AfterValidator(_tags)] = Field(
        default=INBOUND_TAG, description="Tags to take: one, several as `a || b`, or `*` for all."
    )
    group: Annotated[str, AfterValidator(_consumer_group)] | None = Field(
        default=None,
        description="Consumer group. Default: `GID_mq2mqtt_<id>_<node>`, so that every bridge gets every message, for "
        "its own devices. Bridges that share an explicit group share the messages out between them: only for brokers "
        "that are clustered themselves.",
    )
    start: Literal["latest", "earliest"] = Field(
        default="latest", alias="from", description="Where a consumer group that is new begins to read."
    )

    receipts: _RocketTopic | None = Field(
        default=None,
        description="RocketMQ topic for receipts: what became of each message with the property `receipt=true`. It "
        "must exist.",
        examples=["mq_receipts"],
    )

    @property
    def rocketmq_topic(self) -> str:
        """The RocketMQ topic at its end."""
        return self.source

    def consumer_group(self, node: str) -> str:
        """Return the consumer group of the bridge named `node`."""
        return self.group or f"GID_mq2mqtt_{self.id}_{node}"

    def takes(self, tag: str | None) -> bool:
        """Whether this rule is for messages with `tag`; `None` is a message without one."""
        return self.tags == "*" or tag in self.tags.split(" || ")


class StatusRule(_RuleBase):
    """The comings and goings of a GroupID's clients into a RocketMQ topic."""

    type: Literal["status"] = Field(description="Client status to RocketMQ.")
    source: Annotated[str, AfterValidator(_group_id)] = Field(
        description="GroupID: clients named `<GroupID>@@@<DeviceID>`.", examples=["GID_dev"]
    )
    target: _RocketTopic = Field(description="RocketMQ topic. It must exist.", examples=["mq_status"])

    @property
    def rocketmq_topic(self) -> str:
        """The RocketMQ topic at its end."""
        return self.target


Rule: TypeAlias = Annotated[OutboundRule | InboundRule | StatusRule, Field(discriminator="type")]


def rule_location(index: int, rule_id: object) -> str:
    """Return how messages name a rule of the list: `rules[2] (telemetry-out)`."""
    return f"rules[{index}] ({rule_id})" if isinstance(rule_id, str) and rule_id else f"rules[{index}]"


def conflicts(rules: Sequence[Rule]) -> list[tuple[int, str, str]]:
    """Return what two rules may not share: (index, field, message) for each second comer.

    Per spec 2.1 there is one outbound rule per MQTT topic, one inbound rule per MQTT topic and one status rule per
    GroupID; disabled rules count. Ids name directories, and some file systems do not tell upper from lower case.
    Two inbound rules in one consumer group would take each other's messages away.
    """
    found: list[tuple[int, str, str]] = []
    owners: dict[tuple[str, str], str] = {}
    for index, rule in enumerate(rules):
        for field, claim, value in _claims(rule):
            owner = owners.setdefault((claim, value), rule_location(index, rule.id))
            if owner != rule_location(index, rule.id):
                found.append((index, field, f"{getattr(rule, field)!r} {claim} {owner}; {_REMEDIES[claim]}"))
    return found


_ID_CLAIM: Final = "is taken by"
_OUTBOUND_CLAIM: Final = "is already the source of"
_INBOUND_CLAIM: Final = "is already the target of"
_STATUS_CLAIM: Final = "already has its status rule,"
_GROUP_CLAIM: Final = "is already the consumer group of"
_REMEDIES: Final = {
    _ID_CLAIM: "give each rule its own id, different by more than upper and lower case",
    _OUTBOUND_CLAIM: "an MQTT topic has one outbound rule, disabled ones count",
    _INBOUND_CLAIM: "an MQTT topic has one inbound rule, disabled ones count",
    _STATUS_CLAIM: "a GroupID has one status rule, disabled ones count",
    _GROUP_CLAIM: "give each rule its own group, they would take each other's messages away",
}


def _claims(rule: Rule) -> Iterator[tuple[str, str, str]]:
    """Yield what `rule` must have alone: field, kind of claim, value."""
    yield "id", _ID_CLAIM, rule.id.lower()
    if isinstance(rule, OutboundRule):
        yield "source", _OUTBOUND_CLAIM, rule.source
    elif isinstance(rule, InboundRule):
        yield "target", _INBOUND_CLAIM, rule.target
        if rule.group is not None:
            yield "group", _GROUP_CLAIM, rule.group
    else:
        yield "source", _STATUS_CLAIM, rule.source


@dataclass(frozen=True, slots=True)
class RuleDiff:
    """What changed from one rule set to another; a rule is the same by its id."""

    added: tuple[Rule, ...] = ()
    removed: tuple[Rule, ...] = ()
    changed: tuple[tuple[Rule, Rule], ...] = ()
    """Pairs (before, after)."""

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        """Say it in one line: `added a, b; changed c`."""
        kinds = {"added": self.added, "removed": self.removed, "changed": [now for _, now in self.changed]}
        return "; ".join(f"{kind} {_named(rules)}" for kind, rules in kinds.items() if rules) or "no rule changed"


def _named(rules: Sequence[Rule]) -> str:
    more = f" and {len(rules) - _NAMED} more" if len(rules) > _NAMED else ""
    return ", ".join(rule.id for rule in rules[:_NAMED]) + more


class RuleSet:
    """Rules that fit together. Immutable; a reload makes a new one.

    Iterates in the order of the configuration. The lookups by topic, target and group find enabled rules only;
    MQTT topics are case-sensitive.

    Raises:
        ConfigError: two rules claim the same, see `conflicts`; one line for each.
    """

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._rules = tuple(rules)
        if problems := conflicts(self._rules):
            raise ConfigError(
                "\n".join(
                    f"{rule_location(index, self._rules[index].id)}: {field}: {message}"
                    for index, field, message in problems
                )
            )
        self._by_id = {rule.id: rule for rule in self._rules}
        enabled = [rule for rule in self._rules if rule.enabled]
        self._outbound = {rule.source: rule for rule in enabled if isinstance(rule, OutboundRule)}
        self._inbound = {rule.target: rule for rule in enabled if isinstance(rule, InboundRule)}
        self._status = {rule.source: rule for rule in enabled if isinstance(rule, StatusRule)}
        # An outbound rule comes first: a P2P publish is its message in any case.
        self._by_parent: dict[str, OutboundRule | InboundRule] = {
            **{rule.target: rule for rule in self._rules if isinstance(rule, InboundRule)},
            **{rule.source: rule for rule in self._rules if isinstance(rule, OutboundRule)},
        }

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def get(self, rule_id: str) -> Rule | None:
        """Return the rule with this id, enabled or not."""
        return self._by_id.get(rule_id)

    def outbound(self, topic: str) -> OutboundRule | None:
        """Return the rule that exports publishes to `topic`: its source is the topic's first level."""
        return self._outbound.get(topics.parent_of(topic))

    def inbound(self, target: str) -> InboundRule | None:
        """Return the rule that brings messages to the MQTT parent topic `target`."""
        return self._inbound.get(target)

    def status(self, group_id: str) -> StatusRule | None:
        """Return the rule that exports the comings and goings of this GroupID's clients."""
        return self._status.get(group_id)

    @property
    def parents(self) -> frozenset[str]:
        """The MQTT parent topics of all rules, disabled ones too.

        Under these, P2P topics are private. Disabling a rule must not turn private messages into ones that the
        subscribers of `parent/#` see.
        """
        return frozenset(self._by_parent)

    def parent_rule(self, parent: str) -> OutboundRule | InboundRule | None:
        """Return the rule that makes `parent` one of `parents`, enabled or not; the outbound one of two."""
        return self._by_parent.get(parent)

    def diff(self, after: "RuleSet") -> RuleDiff:
        """Return what changes when `after` takes this set's place; the order of rules means nothing."""
        return RuleDiff(
            added=tuple(rule for rule in after if rule.id not in self._by_id),
            removed=tuple(rule for rule in self if after.get(rule.id) is None),
            changed=tuple((before, now) for now in after if (before := self.get(now.id)) is not None and before != now),
        )
