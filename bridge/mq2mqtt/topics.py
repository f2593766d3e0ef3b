"""MQTT topic names and filters, parent and second topics, P2P addresses. Pure.

Clauses such as MQTT-4.7.3-1 are of the MQTT 3.1.1 standard; MQTT 5 has the same rules.
"""

from collections.abc import Hashable
from itertools import zip_longest
from typing import Final, Generic, NamedTuple, TypeVar

__all__ = [
    "MAX_TOPIC_BYTES",
    "P2P_LEVEL",
    "P2PAddress",
    "TopicTrie",
    "filter_problem",
    "is_legacy_request",
    "is_text",
    "join",
    "match",
    "p2p_address",
    "p2p_topic",
    "parent_of",
    "shown_topic",
    "split",
    "topic_problem",
]

MAX_TOPIC_BYTES: Final = 65_535
"""Of UTF-8, in a name or a filter (MQTT-4.7.3-3)."""

P2P_LEVEL: Final = "p2p"
"""The second level of a P2P topic (spec 6)."""

_LEGACY_REQUESTS = frozenset(("$SYS/enableOrderMsg", "$SYS/getOfflineMsg"))
_P2P_LEVELS = 3
_BYTES_PER_CHAR = 4  # at most, in UTF-8

_Value = TypeVar("_Value", bound=Hashable)


def topic_problem(topic: str) -> str | None:
    """Say why `topic` is no legal topic name, in words that follow its name; `None` when it is legal."""
    # MQTT-3.3.2-2, MQTT-4.7.1-1: wildcards are for filters only.
    for wildcard in "+#":
        if wildcard in topic:
            return f"contains the wildcard {wildcard}"
    return _text_problem(topic)


def is_legacy_request(topic: str) -> bool:
    """Whether clients of ApsaraMQ publish there to ask for what is always on here (design section 9)."""
    return topic in _LEGACY_REQUESTS


def filter_problem(topic_filter: str) -> str | None:
    """Say why `topic_filter` is no legal topic filter, in words that follow its name; `None` when it is legal."""
    levels = topic_filter.split("/")
    for number, level in enumerate(levels, 1):
        # MQTT-4.7.1-2: `#` is a level of its own and the last one.
        if "#" in level and (level != "#" or number < len(levels)):
            return "has a # that is not the whole last level"
        # MQTT-4.7.1-3: `+` is a level of its own.
        if "+" in level and level != "+":
            return "has a + that is not a whole level"
    return _text_problem(topic_filter)


def _text_problem(text: str) -> str | None:
    """Check what holds for names and filters alike."""
    # MQTT-4.7.3-1
    if not text:
        return "is empty"
    # MQTT-4.7.3-2
    if "\0" in text:
        return "contains the character NUL"
    # The bytes are counted only where they may be too many, and where the text may not be encodable at all.
    if text.isascii() and len(text) <= MAX_TOPIC_BYTES:
        return None
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        # MQTT-1.5.3-1: no surrogates, which is also how undecodable bytes arrive here.
        return "is not valid UTF-8"
    # MQTT-4.7.3-3
    if size > MAX_TOPIC_BYTES:
        return f"is {size} bytes long, MQTT allows {MAX_TOPIC_BYTES}"
    return None


def match(topic_filter: str, topic: str) -> bool:
    """Whether a legal filter matches a legal topic name."""
    # MQTT-4.7.2-1: a filter that begins with a wildcard does not see `$` topics.
    if topic.startswith("$") and topic_filter.startswith(("+", "#")):
        return False
    for wanted, level in zip_longest(topic_filter.split("/"), topic.split("/")):
        # `#` also matches the level above it: `sport/#` matches `sport` (section 4.7.1.2).
        if wanted == "#":
            return True
        if level is None or wanted not in ("+", level):
            return False
    return True


class _Node(Generic[_Value]):
    __slots__ = ("children", "values")

    def __init__(self) -> None:
        self.children: dict[str, _Node[_Value]] = {}
        self.values: dict[_Value, None] = {}


class TopicTrie(Generic[_Value]):
    """Values under topic filters, found by topic name. Filters and names are taken to be legal.

    Nothing recurses: a legal topic can have 65 535 levels.
    """

    def __init__(self) -> None:
        self._root: _Node[_Value] = _Node()

    def add(self, topic_filter: str, value: _Value) -> None:
        """Put `value` under `topic_filter`; once, however often it is added."""
        node = self._root
        for level in topic_filter.split("/"):
            child = node.children.get(level)
            if child is None:
                child = node.children[level] = _Node()
            node = child
        node.values[value] = None

    def remove(self, topic_filter: str, value: _Value) -> None:
        """Take `value` from under `topic_filter`; does nothing when it is not there."""
        levels = topic_filter.split("/")
        path = [self._root]
        for level in levels:
            child = path[-1].children.get(level)
            if child is None:
                return
            path.append(child)
        path[-1].values.pop(value, None)
        for level in reversed(levels):
            node = path.pop()
            if node.children or node.values:
                return
            del path[-1].children[level]

    def match(self, topic: str) -> list[_Value]:
        """Return the values of all filters that match; a value appears once for each such filter."""
        found: list[_Value] = []
        nodes = [self._root]
        wildcards = not topic.startswith("$")  # MQTT-4.7.2-1, for the first level only
        for level in topic.split("/"):
            following: list[_Node[_Value]] = []
            for node in nodes:
                children = node.children
                if (child := children.get(level)) is not None:
                    following.append(child)
                if wildcards:
                    if (child := children.get("+")) is not None:
                        following.append(child)
                    if (child := children.get("#")) is not None:
                        found.extend(child.values)
            if not following:
                return found
            nodes = following
            wildcards = True
        for node in nodes:
            found.extend(node.values)
            # `sport/#` matches `sport` too (section 4.7.1.2).
            if (child := node.children.get("#")) is not None:
                found.extend(child.values)
        return found

    def __bool__(self) -> bool:
        return bool(self._root.children)


def parent_of(topic: str) -> str:
    """Return the first level."""
    return topic.partition("/")[0]


def split(topic: str) -> tuple[str, str]:
    """Return parent topic and second topic; the second begins with a slash, or is empty on a one-level topic."""
    parent, slash, rest = topic.partition("/")
    return parent, slash + rest


def join(parent: str, second: str) -> str:
    """Undo `split`. The second topic's leading slash may be missing; an empty one is the parent topic itself."""
    if not second or second.startswith("/"):
        return parent + second
    return f"{parent}/{second}"


class P2PAddress(NamedTuple):
    """The parent topic and the client that a P2P topic names."""

    parent: str
    client_id: str


def p2p_address(topic: str) -> P2PAddress | None:
    """Return whom `{parent}/p2p/{clientId}` addresses; `None` for any other topic.

    The client id is the third level and nothing follows it. A client id may hold slashes in MQTT, so in
    `{parent}/p2p/a/b` the target could be `a` as well as `a/b`; such a topic is an ordinary one rather than a
    private message for the wrong client.
    """
    levels = topic.split("/", _P2P_LEVELS)
    if len(levels) != _P2P_LEVELS or levels[1] != P2P_LEVEL or not levels[0] or not levels[2]:
        return None
    return P2PAddress(levels[0], levels[2])


def p2p_topic(parent: str, client_id: str) -> str:
    """Return the P2P topic of a client under `parent`."""
    return f"{parent}/{P2P_LEVEL}/{client_id}"


def shown_topic(parent: str, real_topic: str) -> str:
    """Return the topic that a receiver sees for property `mqttRealTopic` (design section 9).

    The whole property when it begins with the parent topic and a slash, else it is put under the parent topic.
    """
    if real_topic.startswith(f"{parent}/"):
        return real_topic
    return join(parent, real_topic)


def is_text(text: str) -> bool:
    """Whether MQTT can carry `text` as a UTF-8 encoded string (MQTT-1.5.3; section 1.5.4 of MQTT 5)."""
    if "\0" in text:
        return False
    try:
        return len(text.encode()) <= MAX_TOPIC_BYTES
    except UnicodeEncodeError:
        return False
