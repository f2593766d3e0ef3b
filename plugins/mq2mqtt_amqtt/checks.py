"""`mq2mqtt check` with a configuration for `mq2mqtt run`: are its broker's settings right, will it keep sessions?"""

from collections.abc import Mapping
from typing import Final

import typer

from mq2mqtt.settings import Settings
from mq2mqtt_amqtt.sections import sections

__all__ = ["check_plugins"]

_OK, _PROBLEMS = 0, 1
_ANONYMOUS: Final = "AnonymousAuthPlugin"


def check_plugins(settings: Settings) -> int:
    """Print one line per finding; return the exit code.

    Raises:
        ConfigError: see `sections`.
    """
    for path, options in sections(settings).get("plugins", {}).items():
        if not str(path).endswith(f".{_ANONYMOUS}"):
            continue
        if not isinstance(options, Mapping) or options.get("allow_anonymous", True):
            typer.echo(
                f"PROBLEM  mqtt.amqtt.plugins: {path} marks every session as anonymous, and amqtt forgets those "
                "when they disconnect, also with cleanSession=false: set mqtt.allow_anonymous to true instead"
            )
            return _PROBLEMS
    return _OK
