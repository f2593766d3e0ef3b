"""The driver for installations that have Apache's rocketmq-client-cpp: librocketmq by way of rocketmq-client-python."""

from importlib.metadata import version

from mq2mqtt.link import RocketLink
from mq2mqtt.link.librocketmq.clients import Credentials, load
from mq2mqtt.link.librocketmq.link import LibrocketmqLink
from mq2mqtt.settings import RocketMQSettings

__all__ = ["library", "make_link"]


def make_link(settings: RocketMQSettings, *, client_id: str) -> RocketLink:
    """Return a link that is not started.

    Raises:
        ConfigError: the native library is missing, or is not one that this driver can use.
    """
    credentials = None
    if settings.access_key is not None and settings.secret_key is not None:
        credentials = Credentials(settings.access_key, settings.secret_key.get_secret_value())
    return LibrocketmqLink(load(), namesrv=settings.namesrv, client_id=client_id, credentials=credentials)


def library() -> str:
    """Return what is installed: the package, the native library's own words, and where it is.

    Raises:
        ConfigError: as `make_link`.
    """
    native = load()
    return f"rocketmq-client-python {version('rocketmq-client-python')}, {native.version}, {native.path}"
