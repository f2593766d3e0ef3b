"""The drivers by name: what each can do, the package it needs, and how one is made."""

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol, cast

from mq2mqtt.errors import ConfigError
from mq2mqtt.link import RocketLink
from mq2mqtt.link.capabilities import Capabilities, capabilities
from mq2mqtt.settings import RocketMQSettings

__all__ = ["DRIVERS", "Driver", "driver_of", "library", "markdown", "open_link"]

_IMPORT_NAME: Final = "rocketmq"
"""What every RocketMQ package of Python calls itself, so that only one can be installed."""


@dataclass(frozen=True, slots=True)
class Driver:
    """One value of `rocketmq.driver`. Says what it can do where its package is not installed too.

    Args:
        name: also the module `mq2mqtt.link.<name>`, and where it needs a `package`, the extra `mq2mqtt[<name>]`.
        capabilities: what it can do.
        package: the distribution it needs beside the bridge's own.
    """

    name: str
    capabilities: Capabilities
    package: str | None = None


class _Module(Protocol):
    """What a driver's module has. It can be imported where its package is not installed."""

    def make_link(self, settings: RocketMQSettings, *, client_id: str) -> RocketLink:
        """Return a link that is not started; raises `ConfigError` where something that it needs is missing."""

    def library(self) -> str:
        """Return package and library in words, with their versions; raises `ConfigError` like `make_link`."""


_ALL: Final = (
    Driver("native", Capabilities()),
    Driver(
        "librocketmq",
        package="rocketmq-client-python",
        capabilities=Capabilities(
            sends_batches=False,
            proves_writing=False,
            tells_refusals=False,
            receives_any_property=False,
            reads_every_message=False,
            shares_groups=False,
            lists_members=False,
            creates_topics=False,
            uses_tls=False,
            maps_addresses=False,
        ),
    ),
    Driver(
        "grpc",
        package="rocketmq-python-client",
        capabilities=Capabilities(
            chooses_queue=False,
            sends_batches=False,
            sends_any_property=False,
            proves_writing=False,
            reads_every_message=False,
            starts_latest=False,
            starts_earliest=False,
            bounds_each_queue=False,
            shows_lag=False,
            lists_members=False,
            creates_topics=False,
            maps_addresses=False,
        ),
    ),
)
DRIVERS: Final[Mapping[str, Driver]] = {driver.name: driver for driver in _ALL}


def driver_of(settings: RocketMQSettings) -> Driver:
    """Return the driver that `rocketmq.driver` names."""
    return DRIVERS[settings.driver]


def open_link(settings: RocketMQSettings, *, client_id: str) -> RocketLink:
    """Return a link of the driver that `settings` name, not yet started.

    Args:
        settings: `rocketmq` of the configuration.
        client_id: unique among the bridges of a cluster, and the same after a restart.

    Raises:
        ConfigError: its package or native library is missing, or a setting is wrong; one line with the remedy.
    """
    return _module(driver_of(settings)).make_link(settings, client_id=client_id)


def library(driver: Driver) -> str:
    """Return the driver's package and client library in words, with their versions.

    Raises:
        ConfigError: one is missing; one line with the remedy.
    """
    return _module(driver).library()


def markdown() -> str:
    """Return the table of docs/drivers.md: what each driver can do, and what the bridge does where one can't."""
    lines = [f"| | {' | '.join(f'`{name}`' for name in DRIVERS)} | without it |", f"|---|{'---|' * len(DRIVERS)}---|"]
    for one in capabilities():
        can = (getattr(driver.capabilities, one.name) for driver in DRIVERS.values())
        marks = " | ".join("yes" if yes else "**no**" for yes in can)
        lines.append(f"| `{one.name}`: {one.means} | {marks} | {one.without} |")
    return "\n".join(lines) + "\n"


def _module(driver: Driver) -> _Module:
    if driver.package is not None:
        _require(driver.package, driver.name)
    return cast("_Module", importlib.import_module(f"mq2mqtt.link.{driver.name}"))


def _require(package: str, name: str) -> None:
    """See that `package`, and no other of the same import name, is installed."""
    found = set(importlib.metadata.packages_distributions().get(_IMPORT_NAME, ()))
    others = ", ".join(sorted(found - {package}))
    if package in found and not others:
        return
    install = f"in mq2mqtt's sources: pip install '.[{name}]'"
    remedy = install
    if others:
        remedy = f"{others} has its import name {_IMPORT_NAME}, and is not it: uninstall that, then {install}"
        if package in found:
            remedy = f"{others} has the same import name {_IMPORT_NAME}: uninstall both, then {install}"
    raise ConfigError(f"rocketmq.driver {name} needs the Python package {package}; {remedy}")
