import pytest

from mq2mqtt.rocketmq.tags import TagFilter


@pytest.mark.parametrize(
    ("expression", "tags"),
    [("*", set()), ("", set()), (" * ", set()), ("a", {"a"}), ("a || b", {"a", "b"}), ("a||||b ||", {"a", "b"})],
)
def test_an_expression_is_read_as_java_reads_it(expression: str, tags: set[str]) -> None:
    assert TagFilter(expression).tags == tags


def test_an_expression_without_a_tag_is_refused() -> None:
    with pytest.raises(ValueError, match="names no tag"):
        TagFilter("||")


def test_all_includes_messages_without_a_tag() -> None:
    assert TagFilter("*").matches({})
    assert not TagFilter("a").matches({})


def test_a_tag_of_the_same_hash_does_not_match() -> None:
    assert TagFilter("Aa").matches({"TAGS": "Aa"})
    assert not TagFilter("Aa").matches({"TAGS": "BB"})


def test_a_subscription_is_javas() -> None:
    assert TagFilter("b || Aa").subscription("t", 7) == {
        "classFilterMode": False,
        "topic": "t",
        "subString": "b || Aa",
        "tagsSet": ["Aa", "b"],
        "codeSet": [98, 2112],
        "subVersion": 7,
        "expressionType": "TAG",
    }
