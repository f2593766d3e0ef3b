"""Tag expressions: `*`, `a`, `a || b`. No I/O."""

from typing import Any, Final

from mq2mqtt.rocketmq.allocation import java_string_hash

__all__ = ["ALL_TAGS", "TagFilter"]

ALL_TAGS: Final = "*"
_TAGS: Final = "TAGS"
_JAVA_BLANKS: Final = "".join(map(chr, range(ord(" ") + 1)))  # what String.trim() takes away


class TagFilter:
    """A parsed tag expression.

    Brokers filter by the hash of the tag alone, so what they let through is checked again here.

    Attributes:
        expression: as brokers are told.
        tags: empty for all messages, with or without a tag.
    """

    def __init__(self, expression: str) -> None:
        """Parse as Java's `FilterAPI`: parts are trimmed, empty ones are left out.

        Raises:
            ValueError: no tag is left of it.
        """
        self.expression = expression.strip(_JAVA_BLANKS) or ALL_TAGS
        parts = () if self.expression == ALL_TAGS else self.expression.split("||")
        self.tags = frozenset(filter(None, (part.strip(_JAVA_BLANKS) for part in parts)))
        if parts and not self.tags:
            raise ValueError(f"tag expression {expression!r} names no tag")

    def matches(self, properties: dict[str, str]) -> bool:
        """Whether a message with these properties was asked for."""
        return not self.tags or properties.get(_TAGS) in self.tags

    def subscription(self, topic: str, version: int) -> dict[str, Any]:
        """Return the `SubscriptionData` of a heartbeat; a broker takes it for news when `version` has grown."""
        return {
            "classFilterMode": False,
            "topic": topic,
            "subString": self.expression,
            "tagsSet": sorted(self.tags),
            "codeSet": sorted({java_string_hash(tag) for tag in self.tags}),
            "subVersion": version,
            "expressionType": "TAG",
        }
