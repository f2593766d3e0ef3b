"""A RocketMQ that takes TLS alone, or lets in only who has the key, and how a driver is told to reach it."""

import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import yaml

from mq2mqtt.quickstart.cluster import Access, create_topic
from mq2mqtt.quickstart.rocketmq import RocketMQ
from mq2mqtt.settings import RocketMQSettings, TlsSettings, tls_context
from tests.certificates import Authority
from tests.conftest import run_on_jvm

__all__ = ["GROUP", "TOPIC", "SettingsIn", "close_to_strangers", "over_tls"]

SettingsIn = Callable[[str], Awaitable[RocketMQSettings]]
"""`await settings_in("tls")` or `("keys")`: starts such a RocketMQ, and returns how the driver reaches it."""

TOPIC = "guarded"
GROUP = "GID_guarded"
_OPERATOR = Access("operator", "secret-of-the-operator")


async def over_tls(directory: Path, say: Callable[[str], None]) -> tuple[RocketMQ, RocketMQSettings]:
    """Start one that takes TLS alone."""
    authority = Authority(directory / "authority")
    theirs = authority.issue("rocketmq")
    properties = {
        "tls.server.mode": "enforcing",
        "tls.test.mode.enable": "false",
        "tls.server.certPath": theirs.certificate,
        "tls.server.keyPath": theirs.key,
        # The broker is the name server's client.
        "tls.enable": "true",
        "tls.client.authServer": "true",
        "tls.client.trustCertPath": authority.ca,
    }
    tls = TlsSettings(ca_file=authority.ca)
    context = tls_context(tls)
    assert isinstance(context, ssl.SSLContext)
    server = await _start(
        directory,
        say,
        Access(tls=context),
        java_properties={name: str(value) for name, value in properties.items()},
    )
    return server, RocketMQSettings(namesrv=server.namesrv, tls=tls)


async def close_to_strangers(directory: Path, say: Callable[[str], None]) -> tuple[RocketMQ, RocketMQSettings]:
    """Start one with access control (1.0), and one user who may do all."""
    accounts = [{"accessKey": _OPERATOR.access_key, "secretKey": _OPERATOR.secret_key, "admin": True}]
    (directory / "rocketmq" / "conf").mkdir(parents=True)
    (directory / "rocketmq" / "conf" / "plain_acl.yml").write_text(yaml.safe_dump({"accounts": accounts}))
    server = await _start(directory, say, _OPERATOR, version="4.9.7", broker_conf={"aclEnable": "true"})
    keys = {"access_key": _OPERATOR.access_key, "secret_key": _OPERATOR.secret_key}
    return server, RocketMQSettings.model_validate({"namesrv": server.namesrv, **keys})


async def _start(
    directory: Path,
    say: Callable[[str], None],
    access: Access,
    *,
    version: str = "5.3.3",
    **options: Any,  # noqa: ANN401 - as `RocketMQ.on_jvm`
) -> RocketMQ:
    server = await run_on_jvm(directory / "rocketmq", say=say, version=version, access=access, **options)
    await create_topic(server.namesrv, TOPIC, queues=1, access=access)
    return server
