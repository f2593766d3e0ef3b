"""A RocketMQ that takes TLS alone, or lets in only who has the key, and how a driver is told to reach it."""

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import yaml

from mq2mqtt.errors import LinkError
from mq2mqtt.link.drivers import open_link
from mq2mqtt.quickstart.cluster import OPEN, Access, create_ordered_group, create_topic
from mq2mqtt.quickstart.proxy import Proxy
from mq2mqtt.quickstart.rocketmq import RocketMQ
from mq2mqtt.settings import RocketMQSettings, TlsSettings, tls_context
from tests.certificates import Authority
from tests.conftest import run_on_jvm

__all__ = ["GROUP", "TOPIC", "SettingsIn", "start"]

SettingsIn = Callable[[str], Awaitable[RocketMQSettings]]
"""`await settings_in("tls")` or `("keys")`: how the driver reaches such a RocketMQ, which tests share."""

TOPIC = "guarded"
GROUP = "GID_guarded"
_WARM_SECONDS = 60.0
_OPERATOR = Access("operator", "secret-of-the-operator")


class Killable(Protocol):
    """What was started."""

    def kill(self) -> None:
        """End it."""


async def start(
    kind: str, driver: str, directory: Path, say: Callable[[str], None]
) -> tuple[Killable, RocketMQSettings]:
    """Start what `SettingsIn` says, for `driver`."""
    if driver == "grpc":
        server, settings = await (_proxy_over_tls if kind == "tls" else _proxy_close_to_strangers)(directory, say)
        await _warm(settings)
        return server, settings
    return await (_over_tls if kind == "tls" else _close_to_strangers)(directory, say)


async def _over_tls(directory: Path, say: Callable[[str], None]) -> tuple[RocketMQ, RocketMQSettings]:
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


async def _close_to_strangers(directory: Path, say: Callable[[str], None]) -> tuple[RocketMQ, RocketMQSettings]:
    """Start one with access control (1.0), and one user who may do all."""
    accounts = [{"accessKey": _OPERATOR.access_key, "secretKey": _OPERATOR.secret_key, "admin": True}]
    (directory / "rocketmq" / "conf").mkdir(parents=True)
    (directory / "rocketmq" / "conf" / "plain_acl.yml").write_text(yaml.safe_dump({"accounts": accounts}))
    server = await _start(directory, say, _OPERATOR, version="4.9.7", broker_conf={"aclEnable": "true"})
    keys = {"access_key": _OPERATOR.access_key, "secret_key": _OPERATOR.secret_key}
    return server, RocketMQSettings.model_validate({"namesrv": server.namesrv, **keys})


async def _warm(settings: RocketMQSettings) -> None:
    """Wait until the proxy has answered in time: its first answers take seconds where other programs run."""
    link = open_link(settings, client_id="warming")
    await link.start()
    try:
        async with asyncio.timeout(_WARM_SECONDS):
            while True:
                try:
                    await link.require_reading(TOPIC, GROUP)
                except LinkError:
                    await asyncio.sleep(0.2)
                else:
                    return
    finally:
        await link.close()


class _BehindProxy:
    """A RocketMQ and the proxy that guards it."""

    def __init__(self, server: RocketMQ, proxy: Proxy) -> None:
        self._server = server
        self._proxy = proxy

    def kill(self) -> None:
        """End both."""
        self._proxy.kill()
        self._server.kill()


async def _proxy_over_tls(directory: Path, say: Callable[[str], None]) -> tuple[_BehindProxy, RocketMQSettings]:
    """Start one whose proxy takes TLS alone."""
    authority = Authority(directory / "authority")
    theirs = authority.issue("rocketmq")
    # Such a proxy speaks TLS to the broker too.
    server = await _start(directory, say, OPEN, message_type="FIFO", java_properties={"tls.server.mode": "permissive"})
    proxy = await _proxy(
        directory,
        server,
        {"tlsTestModeEnable": False, "tlsKeyPath": str(theirs.key), "tlsCertPath": str(theirs.certificate)},
        properties={"tls.server.mode": "enforcing"},
    )
    settings = RocketMQSettings(
        driver="grpc", namesrv=server.namesrv, proxy=proxy.address, tls=TlsSettings(ca_file=authority.ca)
    )
    return _BehindProxy(server, proxy), settings


async def _proxy_close_to_strangers(
    directory: Path, say: Callable[[str], None]
) -> tuple[_BehindProxy, RocketMQSettings]:
    """Start one with access control (2.0), and one user who may do all."""
    key, secret = _OPERATOR.access_key, _OPERATOR.secret_key
    provider = "org.apache.rocketmq.auth.{0}.provider.Default{1}Provider".format
    authentication = {
        "innerClientAuthenticationCredentials": json.dumps({"accessKey": key, "secretKey": secret}),
        "authenticationEnabled": "true",
        "authenticationProvider": provider("authentication", "Authentication"),
    }
    # Where a broker of 5.3.3 authorizes, it gives nobody messages who comes by way of a proxy.
    local = "org.apache.rocketmq.auth.{0}.provider.Local{1}MetadataProvider".format
    broker_conf = authentication | {
        "initAuthenticationUser": json.dumps({"username": key, "password": secret}),
        "authenticationMetadataProvider": local("authentication", "Authentication"),
        # It keeps the rights that the proxy asks for.
        "authorizationMetadataProvider": local("authorization", "Authorization"),
    }
    server = await _start(directory, say, _OPERATOR, broker_conf=broker_conf, message_type="FIFO")
    theirs = "org.apache.rocketmq.proxy.auth.Proxy{0}MetadataProvider".format
    conf = authentication | {
        "enableAclRpcHookForClusterMode": True,
        "authenticationMetadataProvider": theirs("Authentication"),
        "authorizationEnabled": "true",
        "authorizationProvider": provider("authorization", "Authorization"),
        "authorizationMetadataProvider": theirs("Authorization"),
        # What it heard of rights it believes for 20 s by default.
        "aclCacheRefreshSeconds": 1,
        "userCacheRefreshSeconds": 1,
    }
    proxy = await _proxy(directory, server, conf, access=_OPERATOR)
    keys = {"access_key": key, "secret_key": secret}
    return _BehindProxy(server, proxy), RocketMQSettings.model_validate(
        {"driver": "grpc", "namesrv": server.namesrv, "proxy": proxy.address, **keys}
    )


async def _proxy(
    directory: Path,
    server: RocketMQ,
    conf: dict[str, Any],
    *,
    properties: dict[str, str] | None = None,
    access: Access = OPEN,
) -> Proxy:
    return await Proxy.on_jvm(
        directory / "proxy",
        namesrv=server.namesrv,
        jars=server.jars,
        conf=conf,
        java_properties=properties,
        access=access,
    )


async def _start(
    directory: Path,
    say: Callable[[str], None],
    access: Access,
    *,
    version: str = "5.3.3",
    message_type: str | None = None,
    **options: Any,  # noqa: ANN401 - as `RocketMQ.on_jvm`
) -> RocketMQ:
    server = await run_on_jvm(directory / "rocketmq", say=say, version=version, access=access, **options)
    await create_topic(server.namesrv, TOPIC, queues=1, message_type=message_type, access=access)
    if message_type is not None:
        await create_ordered_group(server.namesrv, GROUP, access=access)
    return server
