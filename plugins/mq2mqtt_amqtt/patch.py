"""How the plugin gets between amqtt and a connection: it replaces methods of the `Broker` object that loads it.

amqtt's plugin events cannot do it: they are tasks that nobody waits for, and come after PUBACK.
"""

from typing import Any, Final

import amqtt
from amqtt.broker import Broker

from mq2mqtt.errors import ConfigError

__all__ = ["check_version", "replace"]

_SUPPORTED: Final = "0.12."
_MISSING = object()


def check_version() -> None:
    """Refuse an amqtt whose inside is not known here.

    Raises:
        ConfigError: it is not 0.12.
    """
    version: str = amqtt.__version__
    if not version.startswith(_SUPPORTED):
        raise ConfigError(f"amqtt {version} is not supported: install amqtt>=0.12.1,<0.13")


def replace(broker: Broker, name: str, value: Any) -> None:  # noqa: ANN401 - any attribute's type
    """Put `value` in place of the broker's attribute `name`, mostly a method, for this broker only.

    Raises:
        ConfigError: the broker has no such attribute: another amqtt than the supported one.
    """
    if getattr(broker, name, _MISSING) is _MISSING:
        raise ConfigError(f"amqtt {amqtt.__version__} is not supported: it has no Broker.{name}")
    setattr(broker, name, value)
