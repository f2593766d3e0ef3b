"""What an operator may do with parked messages, the same from the command line and over HTTP. Takes no locks."""

from pathlib import Path
from typing import Final

from mq2mqtt.errors import ConfigError
from mq2mqtt.receipts import RECEIPTS_SUFFIX
from mq2mqtt.rules import InboundRule, Rule, RuleSet
from mq2mqtt.spool.frame import FrameKind
from mq2mqtt.spool.inspect import lane_directories
from mq2mqtt.spool.parked import ParkedMessage, ask_replay, keys_of, read_parked

__all__ = ["find_lane", "lanes_with_parked", "obstacle", "owner", "replay"]

_TYPES: Final[dict[int, str]] = {
    FrameKind.PUBLISH: "outbound",
    FrameKind.EVENT: "status",
    FrameKind.ROCKETMQ: "inbound",
}
"""Which type of rule parks which kind of frame."""


def find_lane(spool: Path, lane: str) -> Path:
    """Return the directory of `lane`.

    Raises:
        ConfigError: there is none.
        LaneError: the spool cannot be read.
    """
    lanes = {path.name: path for path in lane_directories(spool)}
    if lane not in lanes:
        known = ", ".join(lanes) or "none yet"
        raise ConfigError(f"there is no lane {lane} in {spool} (lanes: {known})")
    return lanes[lane]


def lanes_with_parked(spool: Path) -> dict[str, list[str]]:
    """Return the keys of what is parked, by lane, of those lanes that have anything.

    Raises:
        LaneError: a directory cannot be read.
    """
    found = {path.name: keys_of(path) for path in lane_directories(spool)}
    return {name: keys for name, keys in found.items() if keys}


def owner(rules: RuleSet, lane: str) -> Rule:
    """Return the rule whose way a replay of `lane` goes.

    Raises:
        ConfigError: it is gone.
    """
    rule = rules.get(lane.removesuffix(RECEIPTS_SUFFIX))
    if rule is None:
        raise ConfigError(
            f"no rule {lane.removesuffix(RECEIPTS_SUFFIX)} in the configuration: a replay goes the way of its rule;"
            " add it again under the same id, or drop what it has parked"
        )
    return rule


def obstacle(rule: Rule, lane: str, message: ParkedMessage) -> str | None:
    """Say why `message` cannot go the way of `rule`, which has its lane's name now; `None` when it can."""
    if lane.endswith(RECEIPTS_SUFFIX):
        has_receipts = isinstance(rule, InboundRule) and rule.receipts is not None
        return None if has_receipts else f"a receipt, and {rule.id} has no `receipts` now"
    needed = _TYPES.get(message.frame.kind, "unknown")
    return (
        None if rule.type == needed else f"parked by a rule of type {needed}, and {rule.id} is of type {rule.type} now"
    )


def replay(rules: RuleSet, lane: Path, key: str) -> str | None:
    """Ask for the replay of one message; return why not, or `None`.

    Raises:
        ConfigError: its rule is gone.
        LaneCorruptError: it is damaged.
        LaneError: it cannot be read, or not renamed.
    """
    rule = owner(rules, lane.name)
    message = read_parked(lane, key)
    if message is None:
        return f"there is no parked message {key} of {lane.name}"
    problem = obstacle(rule, lane.name, message)
    if problem is None and not ask_replay(lane, key):
        problem = f"there is no parked message {key} of {lane.name} any more"
    return problem
