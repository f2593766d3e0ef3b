"""The driver over `rocketmq-python-client`, Apache's gRPC client: needs a RocketMQ 5 with its proxy.

What it needs of RocketMQ beside that, for messages to stay in order:

- Topics that are written are of type FIFO. The proxy chooses the queue; only messages with a message group
  keep to one, so each queue of the link is one group (groups.py).
- Consumer groups are ordered (`mqadmin updateSubGroup -o true`). A queue then gives its next messages once all of the
  last are acknowledged, 32 at most, and gives again from the first that was not.

This package can be imported where `rocketmq` is not installed; client.py can't.
"""

import importlib
import importlib.metadata
import ipaddress
import logging
import os
import ssl
import sys
from types import ModuleType

from mq2mqtt.errors import ConfigError
from mq2mqtt.link import RocketLink
from mq2mqtt.settings import RocketMQSettings, tls_context
from mq2mqtt.settings.tls import Tls, TlsSettings

__all__ = ["library", "make_link", "not_of_the_package"]

_PACKAGE = "rocketmq-python-client"
_LOG_MODULE = "rocketmq.v5.log.log_config"


def make_link(settings: RocketMQSettings, *, client_id: str) -> RocketLink:
    """Return a link that is not started (drivers.py); `client_id` is of no use, the package makes one for each client.

    Raises:
        ConfigError: a setting is wrong or can't be kept, or the package can't be loaded.
    """
    proxy = settings.proxy or ""
    _require_addresses(proxy)
    if settings.tls:
        _trust(settings.tls)
    _load()
    link = importlib.import_module("mq2mqtt.link.grpc.link")
    made: RocketLink = link.GrpcLink(
        proxy=proxy,
        name=client_id,
        access_key=settings.access_key,
        secret_key=settings.secret_key.get_secret_value() if settings.secret_key else None,
        tls=bool(settings.tls),
    )
    return made


def library() -> str:
    """Return the client library in words (drivers.py)."""
    _load()
    return f"{_PACKAGE} {importlib.metadata.version(_PACKAGE)}, grpcio {importlib.metadata.version('grpcio')}"


def _require_addresses(proxy: str) -> None:
    addresses = proxy.split(";")
    if any(address.count(":") > 1 for address in addresses):
        raise ConfigError("rocketmq.proxy: the gRPC client takes no IPv6 address; name the proxy's host instead")
    if len(addresses) > 1 and not all(_is_ipv4(address.partition(":")[0]) for address in addresses):
        raise ConfigError("rocketmq.proxy: the gRPC client takes one host name, or several IPv4 addresses")


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def _trust(tls: Tls) -> None:
    """Have gRPC verify against the authorities that `rocketmq.tls` names.

    The client passes no certificates on: gRPC takes the file of this variable, once for the process.
    """
    tls_context(tls)  # says what is wrong with the files
    file = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
    if isinstance(tls, TlsSettings):
        if not tls.check_hostname:
            raise ConfigError("rocketmq.tls.check_hostname: driver grpc always checks the name; leave it true")
        if tls.cert_file is not None:
            raise ConfigError("rocketmq.tls.cert_file: driver grpc shows no certificate of its own; use driver native")
        file = str(tls.ca_file) if tls.ca_file else file
    if file is not None:
        os.environ["GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"] = file


def _load() -> None:
    """Import the package without what it does to a process: a log file in the home directory, words about forks.

    Raises:
        ConfigError: something that it needs is missing or broken.
    """
    if _LOG_MODULE not in sys.modules:
        module = ModuleType(_LOG_MODULE)
        log = logging.getLogger(_PACKAGE)
        # It writes each error that it also raises, and the link tells of those.
        log.setLevel(logging.CRITICAL)
        module.logger = log  # type: ignore[attr-defined]
        sys.modules[_LOG_MODULE] = module
        logging.getLogger("concurrent.futures").addFilter(not_of_the_package)
    # Programs that the process starts are none of gRPC's business.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        importlib.import_module("mq2mqtt.link.grpc.client")
    except ImportError as error:
        raise ConfigError(
            f"rocketmq.driver grpc: {_PACKAGE} can't be loaded ({error}); in mq2mqtt's sources: pip install '.[grpc]'"
        ) from error


def not_of_the_package(record: logging.LogRecord) -> bool:
    """Whether this is no error of a callback in the package, such as each heartbeat while the proxy is away."""
    trace = record.exc_info[2] if record.exc_info else None
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith("rocketmq."):
            return False
        trace = trace.tb_next
    return True
