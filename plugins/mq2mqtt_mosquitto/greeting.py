"""How the sidecar logs in, and what it makes of the hook's answer to its greeting."""

from pathlib import Path
from typing import Final

from mq2mqtt.settings import Settings
from mq2mqtt_mosquitto.client import Login
from mq2mqtt_mosquitto.control import Welcome

__all__ = ["login_of", "objection"]

_HOOK: Final = (0, 2)
"""The first version of the hook that does all that this sidecar needs; from then on its minor version may rise."""

_USERNAME = "mq2mqtt"


def login_of(settings: Settings) -> Login:
    """Return the sidecar's login.

    Raises:
        ConfigError: a file of `host.tls` is no use.
    """
    host = settings.host
    token = host.token or host.password
    return Login(
        url=host.url,
        client_id=host.client_id,
        username=host.username or (_USERNAME if token else None),
        password=token.get_secret_value() if token else None,
        tls=host.tls_context(),
    )


def objection(welcome: Welcome, spool: Path) -> str | None:
    """Return why a sidecar with this spool cannot work with the hook."""
    if welcome.version[0] != _HOOK[0] or welcome.version < _HOOK:
        found, needed = (".".join(map(str, version)) for version in (welcome.version, _HOOK))
        return f"the hook is of version {found}, this sidecar needs {needed}: install both of one release, restart both"
    if not _same_directory(Path(welcome.spool_path), spool):
        return f"the hook writes to {welcome.spool_path}, but spool.path is {spool}"
    return None


def _same_directory(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one == other.absolute()
