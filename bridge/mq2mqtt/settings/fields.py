"""Types of settings' fields: what an operator may write, and the words when it is something else."""

import re
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, WithJsonSchema

__all__ = [
    "AddressMap",
    "Driver",
    "HostUrl",
    "Listen",
    "NameServers",
    "Node",
    "Secret",
    "Section",
    "Size",
    "StoreUrl",
    "Text",
    "address",
    "read_secret",
    "split_address",
]

_MAX_PORT: Final = 65_535
_UNITS: Final = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_NODE = re.compile(r"[A-Za-z0-9_-]{1,32}")
# The host in brackets is an IPv6 address.
_ADDRESS = re.compile(r"(\[[^\s\[\]]+\]|[^\s:/@\[\]]+):([0-9]{1,5})")
_SIZE = re.compile(r"([0-9]+) ?([A-Za-z]*)")
# A database in memory would keep nothing.
_STORE_URL = re.compile(r"sqlite\+aiosqlite:///(?!:memory:).+|postgresql\+asyncpg://.+")
_HOST_URL = re.compile(r"(?:mqtts?://[^/@]+|unix:///.+)")


class Section(BaseModel):
    """A mapping of fields; unknown ones are an error."""

    # Validators' errors never carry the input: it may be a secret.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)


def split_address(address: str) -> tuple[str, int]:
    """Split a valid `host:port`; brackets of an IPv6 address are taken off."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def address(value: str) -> str:
    """Return a valid `host:port` as it is; raises `ValueError` with words for an operator."""
    matched = _ADDRESS.fullmatch(value)
    if matched is None or int(matched[2]) > _MAX_PORT:
        raise ValueError(f"{value!r} is no host:port: write for example 127.0.0.1:9876, or [::1]:9876 for IPv6")
    return value


def _server_address(value: str) -> str:
    if split_address(address(value))[1] == 0:
        raise ValueError(f"{value!r} has port 0, which nobody can connect to")
    return value


def _name_servers(value: str) -> str:
    return ";".join(_server_address(server.strip()) for server in value.split(";"))


def _address_map(value: dict[str, str]) -> dict[str, str]:
    return {_server_address(announced): _server_address(reached) for announced, reached in value.items()}


def _node(value: str) -> str:
    if not _NODE.fullmatch(value):
        raise ValueError(f"{value!r} is no node name: use 1 to 32 letters, digits, '-' and '_'")
    return value


def _size(value: object) -> object:
    if not isinstance(value, str):
        return value
    matched = _SIZE.fullmatch(value)
    if matched is None or matched[2] not in _UNITS:
        raise ValueError(
            f"{value!r} is no size: write bytes as a number, or with B, KiB, MiB, GiB or TiB, as in 512MiB"
        )
    return int(matched[1]) * _UNITS[matched[2]]


def _store_url(value: str) -> str:
    # The value is never shown: it may hold a password.
    if not _STORE_URL.fullmatch(value):
        raise ValueError(
            "is no database URL: write for example sqlite+aiosqlite:///var/mq2mqtt.db, or "
            "postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE"
        )
    return value


def _host_url(value: str) -> str:
    # As above.
    if not _HOST_URL.fullmatch(value) or not _leads_somewhere(value):
        raise ValueError(
            "is no broker URL: write mqtt://HOST:PORT, mqtts://HOST:PORT or unix:///PATH; user and password go into "
            "host.username and host.password"
        )
    return value


def _leads_somewhere(url: str) -> bool:
    """Whether there is a host or a path, and no port that nobody can connect to."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname or parts.path) and parts.port != 0
    except ValueError:
        return False


def read_secret(file: Path) -> SecretStr:
    """Return what `file` holds; raises `ValueError` with words that follow its name."""
    try:
        text = file.read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        # Its text would show a part of the secret.
        raise ValueError("is not UTF-8") from None
    if not text:
        raise ValueError("is empty")
    return SecretStr(text)


def _text(format_name: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "format": format_name})


Listen = Annotated[str, AfterValidator(address), _text("host:port")]
Size = Annotated[
    int,
    BeforeValidator(_size),
    WithJsonSchema({"type": ["integer", "string"], "format": "size", "pattern": f"^{_SIZE.pattern}$"}),
]
Text = Annotated[str, Field(min_length=1)]
Secret = Annotated[SecretStr, Field(min_length=1)]
NameServers = Annotated[str, AfterValidator(_name_servers), _text("host:port")]
AddressMap = Annotated[dict[str, str], AfterValidator(_address_map)]
Node = Annotated[str, AfterValidator(_node)]
Driver = Literal["native", "librocketmq", "grpc"]
StoreUrl = Annotated[str, AfterValidator(_store_url), _text("URL")]
HostUrl = Annotated[str, AfterValidator(_host_url), _text("URL")]
