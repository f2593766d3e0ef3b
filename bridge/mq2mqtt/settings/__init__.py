"""The settings: a YAML file and, above it, `MQ2MQTT_` environment variables. Makes `docs/configuration.md` too."""

import os
import re
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from mq2mqtt.errors import ConfigError
from mq2mqtt.rules import InboundRule, OutboundRule, Rule, RuleSet, StatusRule, conflicts, rule_location
from mq2mqtt.settings import docgen
from mq2mqtt.settings.fields import (
    AddressMap,
    Driver,
    HostUrl,
    Listen,
    NameServers,
    Node,
    Secret,
    Section,
    Size,
    StoreUrl,
    Text,
    read_secret,
    split_address,
)
from mq2mqtt.settings.problems import describe, unknown_field
from mq2mqtt.settings.tls import Tls, TlsSettings, client_context, tls_context
from mq2mqtt.settings.yamlfile import Location, YamlFile, read_yaml

__all__ = [
    "AdminSettings",
    "HostSettings",
    "Limits",
    "MqttSettings",
    "OfflineSettings",
    "RocketMQSettings",
    "Settings",
    "SpoolSettings",
    "StoreSettings",
    "TlsSettings",
    "example",
    "load",
    "markdown",
    "schema",
    "split_address",
    "tls_context",
]

_ENV_PREFIX: Final = "MQ2MQTT_"
_ENV_DELIMITER: Final = "__"
_ENVIRONMENT: Final = "environment"
_FILE_SCHEME: Final = "file://"
_RELATIVE_SQLITE = re.compile(r"(sqlite\+aiosqlite:///)(?!/)(.+)")
_Model = TypeVar("_Model", bound=BaseModel)


class RocketMQSettings(Section):
    """How to reach RocketMQ."""

    namesrv: NameServers = Field(default="127.0.0.1:9876", description="Name server, or several with `;` between them.")
    access_key: Text | None = Field(default=None, description="Access key of RocketMQ's ACL; with `secret_key`.")
    secret_key: Secret | None = Field(
        default=None, description="Secret key of RocketMQ's ACL, or `file://PATH` of a file that holds it."
    )
    driver: Driver = Field(
        default="native",
        description="Client library: `native` is the bridge's own; `librocketmq` and `grpc` are for installations that "
        "use Apache's. What they can't do: docs/drivers.md.",
    )
    proxy: NameServers | None = Field(
        default=None,
        description="With driver `grpc`: RocketMQ 5's proxy, or several with `;` between them. That driver asks no "
        "name server, the others no proxy.",
    )
    tls: Tls = Field(
        default=False,
        description="Whether name servers and brokers are reached over TLS, verified against the system's certificate "
        "authorities (`SSL_CERT_FILE` names others); or a mapping that says more, as `{ca_file: ca.pem}`.",
    )
    address_map: AddressMap = Field(
        default={},
        description="Broker address as RocketMQ announces it -> as this machine reaches it: for a RocketMQ behind NAT "
        "or in containers.",
    )

    @model_validator(mode="after")
    def _keys_together(self) -> "RocketMQSettings":
        if (self.access_key is None) != (self.secret_key is None):
            missing = "access_key" if self.access_key is None else "secret_key"
            raise ValueError(f"access_key and secret_key go together, {missing} is missing; set both or neither")
        return self

    @model_validator(mode="after")
    def _proxy_where_it_is_used(self) -> "RocketMQSettings":
        if self.driver == "grpc" and self.proxy is None:
            raise ValueError("driver grpc needs proxy: name RocketMQ 5's proxy, as in 127.0.0.1:8081")
        if self.driver != "grpc" and self.proxy is not None:
            raise ValueError(f"proxy is for driver grpc, and driver is {self.driver}; change one of them")
        return self


class SpoolSettings(Section):
    """The lanes on disk."""

    path: Path = Field(default=Path("var/spool"), description="Directory of the lanes.")
    durability: Literal["process", "power"] = Field(
        default="process",
        description="What an acknowledged message survives: `process` the end of the bridge, `kill -9` too; `power` "
        "also the loss of power (each acknowledgement waits for the disk).",
    )
    max_bytes: Size = Field(
        default=1 << 30,
        ge=64 * 1024,
        json_schema_extra={"default": "1GiB"},
        description="Size of each lane, 64KiB or more. When it is full, QoS 1 and 2 publishes of its rule are not "
        "acknowledged and QoS 0 ones are dropped.",
    )


class StoreSettings(Section):
    """The SQL database."""

    url: StoreUrl = Field(
        default="sqlite+aiosqlite:///var/mq2mqtt.db",
        description="SQLAlchemy URL of the database: `sqlite+aiosqlite:///PATH`, whose directory is made, or "
        "`postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE` with the extra `mq2mqtt[postgresql]`.",
    )


class OfflineSettings(Section):
    """What is kept for clients that are away."""

    retention: int = Field(
        default=259_200, ge=1, le=10 * 365 * 86_400, description="Seconds that a message is kept; 259200 is 3 days."
    )
    per_client: int = Field(
        default=10_000, ge=1, description="Messages kept for one client. Beyond, its oldest go, and are counted."
    )
    total: int = Field(
        default=1_000_000, ge=1, description="Messages kept for all clients. Beyond, the oldest go, and are counted."
    )


class AdminSettings(Section):
    """The admin port."""

    listen: Listen = Field(
        default="127.0.0.1:9883", description="Address of /metrics, /healthz and /readyz; port 0 takes a free one."
    )


class HostSettings(Section):
    """The MQTT broker that `mq2mqtt sidecar` works for."""

    type: Literal["mosquitto", "mqtt"] = Field(
        default="mosquitto",
        description="`mosquitto` with the hook, or `mqtt` for any MQTT 5 broker: see docs/mqtt.md for what that lacks.",
    )
    url: HostUrl = Field(
        default="mqtt://127.0.0.1:1883",
        description="The broker: `mqtt://HOST:PORT`, `mqtts://HOST:PORT` or `unix:///PATH`.",
    )
    client_id: Text = Field(
        default="mq2mqtt-sidecar",
        description="MQTT client id of the sidecar, as the hook's `sidecar_client_id`. With `mqtt`, each outbound rule "
        "has a connection besides, with this id, `-` and the rule's source. Keep it: the broker's sessions go by it.",
    )
    username: Text | None = Field(
        default=None, description="User name for the broker; with `token`, `null` is `mq2mqtt`, as the hook expects."
    )
    password: Secret | None = Field(
        default=None, description="Its password, or `file://PATH`; not used where there is a `token`."
    )
    token: Secret | None = Field(
        default=None,
        description="Secret shared with the hook, as in its `token_file`, or `file://PATH`. Not needed on the Unix "
        "socket that the hook knows.",
    )
    tls: TlsSettings = Field(
        default=TlsSettings(),
        description="How a broker at `mqtts://` is verified and what it is shown; `ca_file: null` trusts the system's "
        "certificate authorities (`SSL_CERT_FILE` names others).",
    )

    @model_validator(mode="after")
    def _tls_where_it_is_used(self) -> "HostSettings":
        if self.tls != TlsSettings() and not self.url.startswith("mqtts://"):
            raise ValueError(f"tls is for mqtts://, and url is {self.url}; change url, or leave tls out")
        return self

    @model_validator(mode="after")
    def _token_where_it_is_used(self) -> "HostSettings":
        if self.token is not None and self.type == "mqtt":
            raise ValueError("token is for the hook, type mosquitto; with type mqtt use username and password")
        return self

    def tls_context(self) -> ssl.SSLContext | None:
        """Return how the broker is verified, `None` where it is reached without TLS.

        Raises:
            ConfigError: a file cannot be read, or does not hold what it should.
        """
        return client_context(self.tls, field="host.tls") if self.url.startswith("mqtts://") else None


class Limits(Section):
    """Limits on messages."""

    topic_chars: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Longest MQTT topic in characters; `null` is no limit, ApsaraMQ has 64."
    )
    payload_bytes: Annotated[Size, Field(ge=1)] | None = Field(
        default=None, description="Longest payload; `null` is no limit, ApsaraMQ has 64KiB."
    )


class MqttSettings(Section):
    """The MQTT broker that `mq2mqtt run` starts."""

    listen: Listen = Field(default="127.0.0.1:1883", description="Address of the broker; port 0 takes a free one.")
    allow_anonymous: bool | None = Field(
        default=None,
        description="Whether clients need no login. `null`: yes on a loopback address, no on any other.",
    )
    amqtt: dict[str, Any] = Field(
        default={},
        description="Any of amqtt's own settings, merged in: listeners, TLS, WebSocket, plugins. Paths in it are "
        "amqtt's: relative to the working directory.",
    )


_EXAMPLE_RULES = (
    {"id": "telemetry-out", "type": "outbound", "source": "sensors", "target": "mq_sensors"},
    {"id": "commands-in", "type": "inbound", "source": "mq_commands", "target": "devices"},
    {"id": "presence", "type": "status", "source": "GID_dev", "target": "mq_status"},
)


class Settings(BaseSettings):
    """Everything that can be set.

    `load` reads a file; called directly, it takes keyword arguments and the environment, which wins.
    """

    model_config = SettingsConfigDict(
        env_prefix=_ENV_PREFIX,
        env_nested_delimiter=_ENV_DELIMITER,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    node: Node = Field(
        default="default",
        description="Name of this bridge: 1 to 32 letters, digits, `-` and `_`. Keep it: consumer groups go by it. "
        "Where several bridges serve one RocketMQ, each needs its own.",
    )
    rocketmq: RocketMQSettings = Field(default_factory=RocketMQSettings, description="How to reach RocketMQ.")
    spool: SpoolSettings = Field(
        default_factory=SpoolSettings,
        description="The lanes: what devices published and RocketMQ has not got yet, on disk.",
    )
    store: StoreSettings = Field(
        default_factory=StoreSettings,
        description="The database: messages for clients that are away, subscriptions, past connections. docs/store.md.",
    )
    offline: OfflineSettings = Field(
        default_factory=OfflineSettings, description="What is kept for clients that are away: docs/guarantees.md."
    )
    admin: AdminSettings = Field(default_factory=AdminSettings, description="The admin port.")
    host: HostSettings = Field(
        default_factory=HostSettings,
        description="The broker of `mq2mqtt sidecar`.",
    )
    limits: Limits = Field(
        default_factory=Limits,
        description="Limits on messages. A publish over one is refused like a forbidden one; a RocketMQ message over "
        "one is parked.",
    )
    stop_deadline: float = Field(
        default=10, gt=0, le=3600, allow_inf_nan=False, description="Seconds that an ordered stop may take."
    )
    mqtt: MqttSettings = Field(
        default_factory=MqttSettings, description="The broker of `mq2mqtt run`. An amqtt of your own ignores it."
    )
    rules: tuple[Rule, ...] = Field(
        default=(),
        description="What goes from where to where: docs/rules.md.",
        examples=[list(_EXAMPLE_RULES)],
    )

    @property
    def rule_set(self) -> RuleSet:
        """A new rule set of `rules`; raises `ConfigError` when they conflict, which `load` has excluded."""
        return RuleSet(self.rules)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic's
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over the file; there is nothing else."""
        return env_settings, init_settings


_HEADER: Final = """\
The configuration of mq2mqtt: every field with its default. Relative paths are relative to this file.
Environment variables win over it: MQ2MQTT_NODE, and MQ2MQTT_ROCKETMQ__NAMESRV with two underscores
between section and field."""

_MARKDOWN_HEADER: Final = """
# Configuration

One YAML file, `mq2mqtt.yaml`; `mq2mqtt config example` prints one with every field, `mq2mqtt config schema` its JSON
schema. A field that is not in the file has its default; an unknown field is an error.

- **Environment.** A variable wins over the file: `MQ2MQTT_NODE`, with two underscores between section and field as in
  `MQ2MQTT_ROCKETMQ__NAMESRV`. Lists and mappings are JSON there: a list replaces the file's (`MQ2MQTT_RULES`),
  a mapping is merged with the file's, key by key. An empty variable counts as not set.
- **Paths** are relative to the directory of the file, also those from the environment.
- **Secrets** can be kept in files of their own: `secret_key: file:///run/secrets/rocketmq`. A line break at the end of
  such a file is taken off.
- **Sizes** are bytes, or a number with `KiB`, `MiB`, `GiB` or `TiB`.

`mq2mqtt check -c mq2mqtt.yaml` tells what is wrong: one line per problem with file, line, field and remedy.

<!-- Generated from bridge/mq2mqtt/settings; a test compares. -->
"""

_SECTIONS: Final = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
# A rule is at ("rules", index), a field of TLS at ("rocketmq", "tls") or ("host", "tls").
_RULE_DEPTH: Final = 2
_TLS_DEPTH: Final = 2
_RULES: Final[Mapping[str, type[OutboundRule | InboundRule | StatusRule]]] = {
    "outbound": OutboundRule,
    "inbound": InboundRule,
    "status": StatusRule,
}
_SECRETS: Final = frozenset(
    name
    for section in _SECTIONS.values()
    for name, field in section.model_fields.items()
    if Secret in get_args(field.annotation)
)


def example() -> str:
    """Return a commented configuration with every field; it loads as it is."""
    return docgen.example(schema(), header=_HEADER)


def schema() -> dict[str, Any]:
    """Return the JSON schema of the configuration."""
    return Settings.model_json_schema()


def markdown() -> str:
    """Return `docs/configuration.md`."""
    return docgen.markdown(schema(), header=_MARKDOWN_HEADER)


def load(path: str | Path) -> Settings:
    """Read the configuration from `path` and the environment.

    Raises:
        ConfigError: something in it is wrong; one line for each problem.
    """
    source = Path(path)
    document = read_yaml(source)
    report = _Report(source, document)
    # A section whose lines are all commented out is empty in YAML.
    known = {name: document.data[name] for name in Settings.model_fields if document.data.get(name) is not None}
    for name in document.data:
        if name not in Settings.model_fields:
            report.add((name,), unknown_field(name, Settings.model_fields))
    settings = None
    try:
        settings = Settings(**known)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            report.add_error(problem)
    except SettingsError as error:
        raise ConfigError(_no_json(error)) from None
    if settings is not None:
        for index, field, message in conflicts(settings.rules):
            report.add(("rules", index, field), message)
        settings = _anchored(settings, source.absolute().parent, (), report)
    if settings is None or report.lines:
        raise ConfigError("\n".join(report.lines))
    return settings


def _no_json(error: SettingsError) -> str:
    # It says: error parsing value for field "rules" from source "EnvSettingsSource". Of a section it does not say which
    # of its variables is meant.
    section = _ENV_PREFIX + str(error).split('"')[1].upper()
    names = sorted(name for name in _variables() if name == section or name.startswith(section + _ENV_DELIMITER))
    which = "one of these is " if len(names) > 1 else ""
    return f"{_ENVIRONMENT} {', '.join(names)}: {which}no valid JSON, which lists and mappings must be"


def _variables() -> set[str]:
    # They are found in any case, and an empty one counts as not set.
    return {name.upper() for name, value in os.environ.items() if value}


class _Report:
    """The problems found, one line each: file, line, field, what is wrong."""

    def __init__(self, path: Path, document: YamlFile) -> None:
        self._path = path
        self._document = document
        self._problems: list[tuple[int, str]] = []

    @property
    def lines(self) -> list[str]:
        """One for each problem, in the order of the file; the environment's come first."""
        return [text for _, text in sorted(self._problems)]

    def add_error(self, error: ErrorDetails) -> None:
        location: Location = error["loc"]
        kind = error["type"]
        known: Iterable[str] = ()
        if location[0] == "rules" and len(location) > _RULE_DEPTH:
            # Pydantic names the member of the union between the index and the field.
            rule_type = _RULES[str(location[_RULE_DEPTH])]
            known = (field.alias or name for name, field in rule_type.model_fields.items())
            location = location[:_RULE_DEPTH] + location[_RULE_DEPTH + 1 :]
        elif location[0] in _SECTIONS:
            known = _SECTIONS[str(location[0])].model_fields
            if location[1:2] == ("tls",):
                if location[0] == "rocketmq":
                    # Here too it names the member of the union.
                    location = location[:_TLS_DEPTH] + location[_TLS_DEPTH + 1 :]
                known = TlsSettings.model_fields if len(location) > _TLS_DEPTH else known
        if kind == "extra_forbidden":
            self.add(location, unknown_field(str(location[-1]), known))
            return
        if kind.startswith("union_tag"):
            location = (*location, "type")
        self.add(location, describe(error, secret=location[-1] in _SECRETS))

    def add(self, location: Location, message: str) -> None:
        variable = self._variable(location)
        line = 0 if variable else self._document.line(location) or 0
        origin = f"{_ENVIRONMENT} {variable}" if variable else f"{self._path}:{line}" if line else str(self._path)
        if location[0] == "rules" and len(location) >= _RULE_DEPTH:
            index = int(location[1])
            rule = rule_location(index, None if variable else self._rule_id(index))
            where = ": ".join(map(str, (rule, *location[_RULE_DEPTH:])))
        else:
            where = ".".join(map(str, location))
        self._problems.append((line, f"{origin}: {where}: {message}"))

    def _rule_id(self, index: int) -> object:
        rule = self._document.data["rules"][index]
        return rule.get("id") if isinstance(rule, dict) else None

    def _variable(self, location: Location) -> str | None:
        """Return the environment variable that set `location`, if one did."""
        variables = _variables()
        names = (_ENV_PREFIX + _ENV_DELIMITER.join(map(str, location[:n])).upper() for n in range(1, len(location) + 1))
        return next((name for name in names if name in variables), None)


def _anchored(section: _Model, base: Path, location: Location, report: _Report) -> _Model:
    """Resolve relative paths against `base`, and secrets that are kept in files."""
    changes: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            anchored = _anchored(value, base, (*location, name), report)
            if anchored is not value:
                changes[name] = anchored
        elif isinstance(value, Path):
            changes[name] = base / value
        elif isinstance(value, SecretStr) and value.get_secret_value().startswith(_FILE_SCHEME):
            file = base / value.get_secret_value().removeprefix(_FILE_SCHEME)
            try:
                changes[name] = read_secret(file)
            except ValueError as error:
                report.add((*location, name), f"{file} {error}")
        elif isinstance(section, StoreSettings) and (sqlite := _RELATIVE_SQLITE.fullmatch(value)):
            changes[name] = f"{sqlite[1]}{base / sqlite[2]}"
    # A copy counts what it changed as given, which tells whether a file has the section.
    return section.model_copy(update=changes) if changes else section
