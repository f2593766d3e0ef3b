from mq2mqtt.rocketmq.acl import Credentials, signature
from tests.unit.rocketmq.golden import golden_text

FIELDS = {"topic": "T_é", "queueId": "3"}
SECRET = "s3cret"  # noqa: S105 - made up


def test_signs_as_java_does() -> None:
    signed = Credentials("ak", SECRET, security_token="tok").sign(FIELDS, b"body\0")  # noqa: S106 - made up
    assert signed == {**FIELDS, "AccessKey": "ak", "SecurityToken": "tok", "Signature": golden_text("signature")}


def test_signs_without_token_and_body_as_java_does() -> None:
    assert Credentials("ak", SECRET).sign(FIELDS, b"")["Signature"] == golden_text("signature_no_body")


def test_an_old_signature_is_not_signed_again() -> None:
    assert signature(SECRET, {**FIELDS, "AccessKey": "ak", "Signature": "old"}, b"") == golden_text("signature_no_body")


def test_the_secret_is_never_shown() -> None:
    credentials = Credentials("ak", SECRET, security_token="tok")  # noqa: S106 - made up
    assert SECRET not in f"{credentials!r}{credentials}"
    assert "tok" not in f"{credentials!r}"
