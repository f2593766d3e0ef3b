import pytest

from mq2mqtt.rocketmq import errors
from mq2mqtt.rocketmq.errors import AnswerError, RocketMQError, for_code


def test_every_error_is_listed_and_below_the_base() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert {one.__name__ for one in classes} == set(errors.__all__) - {"for_code"}
    assert all(issubclass(one, RocketMQError) for one in classes)


@pytest.mark.parametrize(
    ("code", "name", "retriable"),
    [
        (1, "AnswerError", True),
        (2, "SystemBusy", True),
        (13, "MessageIllegal", False),
        (14, "ServiceNotAvailable", True),
        (16, "NoPermission", True),
        (17, "TopicNotFound", True),
        (26, "GroupNotFound", True),
        (4711, "AnswerError", True),
    ],
)
def test_codes(code: int, name: str, *, retriable: bool) -> None:
    error = for_code(code, "first line\nhttps://faq", address="h:1")
    assert isinstance(error, AnswerError)
    assert (type(error).__name__, error.retriable, error.code) == (name, retriable, code)
    assert str(error) == f"h:1 answered code {code}: first line"


@pytest.mark.parametrize(
    ("remark", "name"),
    [
        ("java.lang.RuntimeException: message size exceeded, org.apache.Rocket", "MessageIllegal"),
        ("java.lang.RuntimeException: message body size exceeded, org.apache.Rocket", "MessageIllegal"),
        ("org.apache.rocketmq.acl.common.AclException: Check signature failed", "NoPermission"),
        ("java.lang.RuntimeException: disk size exceeded", "AnswerError"),
    ],
)
def test_exceptions_that_brokers_let_through(remark: str, name: str) -> None:
    assert type(for_code(1, remark)).__name__ == name
    assert type(for_code(2, remark)).__name__ == "SystemBusy"
