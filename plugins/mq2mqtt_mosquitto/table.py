"""The lane table: what the hook needs to know of the rules."""

from pathlib import Path

from mq2mqtt.rules import OutboundRule, RuleSet
from mq2mqtt.settings import Settings

__all__ = ["lane_table", "told_parents"]

_FILE_NAME = "lanes.table"
_VERSION = 1


def lane_table(settings: Settings, rules: RuleSet) -> bytes:
    """Return the table for `rules` (`docs/mosquitto-protocol.md`); the same for rules that mean the same to the hook.

    A parent topic is told for every rule, also a disabled one: P2P under it is private.
    """
    limits = settings.limits
    first = ("mq2mqtt-table", _VERSION, settings.spool.max_bytes, settings.spool.durability)
    lines = [(*first, _or_none(limits.topic_chars), _or_none(limits.payload_bytes))]
    lanes = [(rule.id, rule.source) for rule in rules if isinstance(rule, OutboundRule) and rule.enabled]
    text = ["\t".join(map(str, line)) for line in lines]
    text += [f"lane\t{rule_id}\t{parent}" for rule_id, parent in sorted(lanes)]
    text += [f"parent\t{parent}" for parent in sorted(rules.parents)]
    return "".join(f"{line}\n" for line in text).encode()


def told_parents(spool: Path) -> set[str]:
    """Return the parent topics with a lane in the table that the hook keeps; none where it cannot be read."""
    try:
        lines = (spool / _FILE_NAME).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return set()
    return {line.rpartition("\t")[2] for line in lines if line.startswith("lane\t")}


def _or_none(limit: int | None) -> str:
    return "-" if limit is None else str(limit)
