"""Topic names, filters, parent and second topics, P2P addresses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt import topics
from mq2mqtt.topics import TopicTrie

LEVELS = st.sampled_from(["a", "b", "", "sport", "$SYS", "é"])
NAMES = st.lists(LEVELS, min_size=1, max_size=5).map("/".join).filter(bool)
FILTERS = st.tuples(st.lists(st.one_of(LEVELS, st.just("+")), min_size=1, max_size=5), st.sampled_from(["", "/#"])).map(
    lambda parts: "/".join(parts[0]) + parts[1]
)
ANY_FILTER = st.one_of(FILTERS, st.just("#")).filter(bool)
LEGAL_TEXT = st.text(st.characters(exclude_characters="+#\0", exclude_categories=["Cs"]), min_size=1, max_size=60)


@pytest.mark.parametrize(
    "topic", ["a", "/", "a/b", "/a", "a/", "a//b", "$SYS/x", " ", "Ä/ö", "a" * 65_535, "é" * 32_767]
)
def test_legal_topic_names(topic: str) -> None:
    assert topics.topic_problem(topic) is None


@pytest.mark.parametrize(
    ("topic", "problem"),
    [
        ("", "is empty"),
        ("a/+", "contains the wildcard +"),
        ("a#", "contains the wildcard #"),
        ("a\0b", "contains the character NUL"),
        ("a" * 65_536, "is 65536 bytes long, MQTT allows 65535"),
        ("é" * 32_768, "is 65536 bytes long, MQTT allows 65535"),
        ("a/\udcff", "is not valid UTF-8"),
    ],
)
def test_illegal_topic_names(topic: str, problem: str) -> None:
    assert topics.topic_problem(topic) == problem


@pytest.mark.parametrize("topic_filter", ["#", "+", "a/#", "+/+", "/+", "a/+/b", "+/#", "a", "$SYS/#", "/"])
def test_legal_filters(topic_filter: str) -> None:
    assert topics.filter_problem(topic_filter) is None


@pytest.mark.parametrize(
    ("topic_filter", "problem"),
    [
        ("", "is empty"),
        ("a#", "has a # that is not the whole last level"),
        ("#/a", "has a # that is not the whole last level"),
        ("a+/b", "has a + that is not a whole level"),
        ("a/b+", "has a + that is not a whole level"),
        ("a/\0/#", "contains the character NUL"),
    ],
)
def test_illegal_filters(topic_filter: str, problem: str) -> None:
    assert topics.filter_problem(topic_filter) == problem


# The examples of MQTT 3.1.1 section 4.7, and the corners between them.
MATCHES = [
    ("sport/tennis/player1/#", "sport/tennis/player1"),
    ("sport/tennis/player1/#", "sport/tennis/player1/ranking"),
    ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon"),
    ("sport/#", "sport"),
    ("#", "sport/tennis"),
    ("#", "/"),
    ("sport/tennis/+", "sport/tennis/player1"),
    ("sport/+", "sport/"),
    ("+/+", "/finance"),
    ("/+", "/finance"),
    ("+/tennis/#", "sport/tennis"),
    ("$SYS/#", "$SYS/monitor"),
    ("$SYS/#", "$SYS"),
    ("$SYS/monitor/+", "$SYS/monitor/Clients"),
    ("a/+/c", "a//c"),
    ("a/$b", "a/$b"),
    ("a/+", "a/$b"),
    ("a/#", "a/$b"),
]
NO_MATCHES = [
    ("sport/tennis/+", "sport/tennis/player1/ranking"),
    ("sport/+", "sport"),
    ("+", "/finance"),
    ("#", "$SYS/monitor"),
    ("+/monitor/Clients", "$SYS/monitor/Clients"),
    ("+", "$SYS"),
    ("ACCOUNTS", "Accounts"),
    ("/finance", "finance"),
    ("a", "a/b"),
    ("a/b", "a"),
    ("a/+/#", "a"),
    ("sport/#", "sports"),
]


@pytest.mark.parametrize(("topic_filter", "topic"), MATCHES)
def test_match(topic_filter: str, topic: str) -> None:
    trie: TopicTrie[int] = TopicTrie()
    trie.add(topic_filter, 1)

    assert topics.match(topic_filter, topic)
    assert trie.match(topic) == [1]


@pytest.mark.parametrize(("topic_filter", "topic"), NO_MATCHES)
def test_no_match(topic_filter: str, topic: str) -> None:
    trie: TopicTrie[int] = TopicTrie()
    trie.add(topic_filter, 1)

    assert not topics.match(topic_filter, topic)
    assert trie.match(topic) == []


@given(st.lists(st.tuples(ANY_FILTER, st.integers(0, 3)), max_size=12), st.lists(st.integers(0, 11)), NAMES)
def test_trie_agrees_with_match(entries: list[tuple[str, int]], removed: list[int], topic: str) -> None:
    trie: TopicTrie[int] = TopicTrie()
    left = set(entries)
    for topic_filter, value in entries:
        trie.add(topic_filter, value)
    for index in removed:
        if index < len(entries):
            trie.remove(*entries[index])
            left.discard(entries[index])

    expected = sorted(value for topic_filter, value in left if topics.match(topic_filter, topic))
    assert sorted(trie.match(topic)) == expected
    assert bool(trie) == bool(left)


def test_trie_forgets_what_is_removed() -> None:
    trie: TopicTrie[str] = TopicTrie()
    trie.add("a/b", "x")
    trie.add("a/b", "x")
    trie.add("a/b/c", "y")

    trie.remove("a/b", "absent")
    trie.remove("a/b/c/d", "y")
    trie.remove("z", "y")
    assert trie.match("a/b") == ["x"]

    trie.remove("a/b", "x")
    assert trie.match("a/b") == []
    assert trie.match("a/b/c") == ["y"]

    trie.remove("a/b/c", "y")
    assert not trie


def test_a_topic_of_the_deepest_legal_nesting() -> None:
    deepest = "/" * 65_535
    trie: TopicTrie[int] = TopicTrie()
    trie.add(deepest, 1)
    trie.add("#", 2)

    assert sorted(trie.match(deepest)) == [1, 2]
    trie.remove(deepest, 1)
    assert trie.match(deepest) == [2]


@pytest.mark.parametrize(
    ("topic", "parent", "second"),
    [
        ("a", "a", ""),
        ("a/", "a", "/"),
        ("a/b", "a", "/b"),
        ("a/b/", "a", "/b/"),
        ("a//b", "a", "//b"),
        ("/b", "", "/b"),
    ],
)
def test_split_and_join(topic: str, parent: str, second: str) -> None:
    assert topics.split(topic) == (parent, second)
    assert topics.join(parent, second) == topic
    assert topics.parent_of(topic) == parent


@given(LEGAL_TEXT)
def test_join_undoes_split(topic: str) -> None:
    assert topics.join(*topics.split(topic)) == topic


@pytest.mark.parametrize(
    ("second", "topic"), [("b", "a/b"), ("b/", "a/b/"), ("b/c", "a/b/c"), ("", "a"), ("/b", "a/b")]
)
def test_join_accepts_a_missing_slash(second: str, topic: str) -> None:
    assert topics.join("a", second) == topic


@pytest.mark.parametrize(
    ("topic", "address"),
    [
        ("a/p2p/GID_x@@@dev", ("a", "GID_x@@@dev")),
        ("a/p2p/c", ("a", "c")),
        ("a/p2p/c/x", None),
        ("a/p2p/c/", None),
        ("a/p2p/", None),
        ("a/p2p", None),
        ("a/P2P/c", None),
        ("a/x/p2p/c", None),
        ("/p2p/c", None),
        ("p2p/c", None),
    ],
)
def test_p2p_address(topic: str, address: tuple[str, str] | None) -> None:
    assert topics.p2p_address(topic) == address
    if address is not None:
        assert topics.p2p_topic(*address) == topic


@pytest.mark.parametrize(
    ("real_topic", "shown"),
    [
        ("devices/x", "devices/x"),
        ("devices/", "devices/"),
        ("x/y", "devices/x/y"),
        ("/x", "devices/x"),
        ("devices", "devices/devices"),
        ("devices2/x", "devices/devices2/x"),
    ],
)
def test_shown_topic(real_topic: str, shown: str) -> None:
    assert topics.shown_topic("devices", real_topic) == shown
