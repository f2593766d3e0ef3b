"""`mqtt.amqtt` of the settings: amqtt's own, of which nothing but the shape is known here."""

from collections.abc import Mapping
from typing import Any, Final

from mq2mqtt.errors import ConfigError
from mq2mqtt.settings import Settings

__all__ = ["sections"]

_MAPPINGS: Final = {"listeners": "listener name to its settings", "plugins": "plugin class to its settings"}


def sections(settings: Settings) -> dict[str, Any]:
    """Return what is set of amqtt's own; a section or a listener that is empty is left out, as in the rest of the file.

    Raises:
        ConfigError: listeners or plugins are no mappings.
    """
    found = {name: value for name, value in settings.mqtt.amqtt.items() if value is not None}
    for name, what in _MAPPINGS.items():
        if not isinstance(found.get(name, {}), Mapping):
            raise ConfigError(f"mqtt.amqtt.{name}: write a mapping of {what}")
    listeners = {name: fields for name, fields in found.get("listeners", {}).items() if fields is not None}
    for name, fields in listeners.items():
        if not isinstance(fields, Mapping):
            raise ConfigError(
                f"mqtt.amqtt.listeners.{name}: write a mapping of its settings, as in {{type: ws, bind: HOST:PORT}}"
            )
    return {**found, "listeners": listeners}
