"""`mq2mqtt run`: an amqtt broker of our own with the bridge in it."""

import asyncio
import contextlib
import ipaddress
import logging
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amqtt.broker import Broker
from amqtt.errors import BrokerError, PluginError, PluginLoadError
from amqtt.plugins.base import BaseAuthPlugin
from amqtt.utils import import_string
from dacite import DaciteError
from loguru import logger

from mq2mqtt.errors import BridgeError, ConfigError
from mq2mqtt.reload import ConfigFile
from mq2mqtt.settings import Settings
from mq2mqtt_amqtt.plugin import BridgePlugin
from mq2mqtt_amqtt.sections import sections

__all__ = ["EmbeddedBridge", "RunningBroker", "run_broker", "serve"]

_AUTH = "mq2mqtt_amqtt.AuthPlugin"
_BRIDGE = "mq2mqtt_amqtt.run.EmbeddedBridge"


class EmbeddedBridge(BridgePlugin):
    """`BridgePlugin` with settings that are loaded already; whoever starts the broker reports its errors."""

    @dataclass
    class Config:
        """Configuration of the plugin, made by `run_broker`."""

        settings: Any
        """A `Settings`."""

    def _load(self) -> Settings:
        config: Any = self.config
        settings: Settings = config.settings
        return settings

    def _report(self, error: Exception) -> None:
        """Leave it to `run_broker`, which raises it."""


class RunningBroker:
    """A broker that `run_broker` started."""

    def __init__(self, broker: Broker, plugin: BridgePlugin) -> None:
        self._broker = broker
        self.host = plugin.host
        self.bridge = plugin.bridge

    @property
    def addresses(self) -> list[str]:
        """`host:port` of each socket that clients can connect to."""
        found = []
        for server in self._broker._servers.values():  # noqa: SLF001 - with port 0, only the socket knows
            for socket in getattr(server.instance, "sockets", ()):
                host, port = socket.getsockname()[:2]
                found.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        return found

    async def stop(self) -> None:
        """End all connections, stop the bridge, close the listeners."""
        await self._broker.shutdown()


async def run_broker(settings: Settings, *, listen: str | None = None) -> RunningBroker:
    """Start a broker from `settings.mqtt`; `listen` (`host:port`) wins over the settings.

    Raises:
        BridgeError: the bridge or the broker cannot be started; the text says why.
    """
    config = _broker_config(settings, listen)
    try:
        broker = Broker(config)
    except (BrokerError, DaciteError, PluginError, PluginLoadError, ValueError, OSError) as error:
        cause = error.__cause__
        if isinstance(cause, BridgeError):
            raise cause from None
        raise ConfigError(f"mqtt.amqtt: {f'{error}: {cause}' if cause else error}") from error
    plugin = broker.plugins_manager.get_plugin(EmbeddedBridge.__name__)
    assert isinstance(plugin, EmbeddedBridge)  # noqa: S101 - `_broker_config` put it there
    try:
        with _no_traceback():
            await broker.start()
    except BrokerError as error:
        await plugin.close()
        if isinstance(plugin.failure, BridgeError):
            raise plugin.failure from None
        if plugin.failure is None:
            raise ConfigError(f"the MQTT broker cannot start: {error.__cause__ or error}") from error
        raise plugin.failure from error
    return RunningBroker(broker, plugin)


def _broker_config(settings: Settings, listen: str | None) -> dict[str, Any]:
    base = {"listeners": {"default": {"type": "tcp", "bind": _bind(settings.mqtt.listen)}}, "plugins": {}}
    config = _merged(base, sections(settings))
    if listen is not None:
        config["listeners"]["default"]["bind"] = _bind(listen)
    plugins = config["plugins"]
    allowed = settings.mqtt.allow_anonymous
    if allowed is None:
        allowed = _only_loopback(config["listeners"]) and not any(_authenticates(path) for path in plugins)
    plugins.setdefault(_AUTH, {"allow_anonymous": allowed})
    plugins[_BRIDGE] = {"settings": settings}
    return config


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        known = result.get(key)
        result[key] = _merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return result


def _bind(address: str) -> str:
    """Write an IPv6 address as amqtt 0.12.1 can bind it: it leaves brackets on."""
    host, _, port = address.rpartition(":")
    return f"{host.strip('[]')}:{port}"


def _only_loopback(listeners: Mapping[str, Any]) -> bool:
    return all(_is_loopback(str(listener["bind"])) for listener in listeners.values() if listener.get("bind"))


def _is_loopback(bind: str) -> bool:
    host = bind.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _authenticates(plugin_path: str) -> bool:
    try:
        plugin = import_string(plugin_path)
    except ImportError:
        raise ConfigError(f"mqtt.amqtt.plugins: {plugin_path} cannot be imported") from None
    return isinstance(plugin, type) and issubclass(plugin, BaseAuthPlugin)


@contextlib.contextmanager
def _no_traceback() -> Iterator[None]:
    """Keep amqtt from logging a traceback for an operator's mistake; the error is raised as well."""
    log = logging.getLogger("amqtt.broker")

    def below_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    log.addFilter(below_error)
    try:
        yield
    finally:
        log.removeFilter(below_error)


async def serve(settings: Settings, config_file: Path, *, listen: str | None = None) -> int:
    """Run a broker with the bridge until SIGTERM or SIGINT; return the process's exit code. SIGHUP reloads the rules.

    Raises:
        BridgeError: see `run_broker`.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    reload = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    broker = await run_broker(settings, listen=listen)
    logger.info("MQTT broker listens on {}", ", ".join(broker.addresses))
    logger.info("event loop: {}", type(loop).__module__.partition(".")[0])
    reloading = asyncio.create_task(ConfigFile(config_file).reload_on(reload, broker.bridge), name="mq2mqtt.reload")
    await stop.wait()
    logger.info("stopping")
    reloading.cancel()
    await broker.stop()
    return 0
