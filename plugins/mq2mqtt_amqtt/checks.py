"""`mq2mqtt check` with a configuration for `mq2mqtt run`: will its broker keep persistent sessions?"""

from collections.abc import Mapping
from typing import Final

import typer

from mq2mqtt.settings import Settings

__all__ = ["check_plugins"]

_OK, _PROBLEMS = 0, 1
_ANONYMOUS: Final = "AnonymousAuthPlugin"


def check_plugins(settings: Settings) -> int:
    """Print one line per finding; return the exit code."""
    plugins = settings.mqtt.amqtt.get("plugins")
    for path, options in plugins.items() if isinstance(plugins, Mapping) else ():
        if not str(path).endswith(f".{_ANONYMOUS}"):
            continue
        if not isinstance(options, Mapping) or options.get("allow_anonymous", True):
            typer.echo(
                f"PROBLEM  mqtt.amqtt.plugins: {path} marks every session as anonymous, and amqtt forgets those "
                "when they disconnect, also with cleanSession=false: set mqtt.allow_anonymous to true instead"
            )
            return _PROBLEMS
    return _OK
