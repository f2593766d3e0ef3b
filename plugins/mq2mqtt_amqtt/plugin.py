"""The plugin that amqtt loads: builds the bridge with the broker, starts it before and stops it after the clients."""

import asyncio
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amqtt.broker import Broker, BrokerContext
from amqtt.errors import BrokerError
from amqtt.plugins.base import BasePlugin
from loguru import logger

from mq2mqtt.bridge import Bridge
from mq2mqtt.errors import BridgeError
from mq2mqtt.log import calm_default_sink
from mq2mqtt.reload import ConfigFile
from mq2mqtt.settings import Settings
from mq2mqtt_amqtt.host import AmqttHost
from mq2mqtt_amqtt.patch import replace

__all__ = ["BridgePlugin"]

_AMQTT_COMMAND = "amqtt.scripts.broker_script"
_WRONG_CONFIG = 2  # exit code


class BridgePlugin(BasePlugin[BrokerContext]):
    """The bridge in an amqtt broker.

    Raises:
        BridgeError: the configuration is wrong or a lane cannot be used; amqtt makes it a `PluginInitError`.
    """

    @dataclass
    class Config:
        """Configuration of the plugin in amqtt's YAML."""

        config_file: str | Path
        """The bridge's own configuration file; its rules are reloaded when it changes."""

    def __init__(self, context: BrokerContext) -> None:
        super().__init__(context)
        self._broker: Broker = context._broker_instance  # noqa: SLF001 - amqtt's context offers too little
        self.failure: Exception | None = None
        self._stopped = False
        self._config_file: ConfigFile | None = None
        self._reloading: asyncio.Task[None] | None = None
        try:
            settings = self._load()
            self.host = AmqttHost(self._broker)
            self.bridge = self._build(settings, self.host)
        except BridgeError as error:
            self._report(error)
            raise
        self.host.intake = self.bridge.intake
        self._start_listeners = self._broker._start_listeners  # noqa: SLF001 - see `_listen`
        replace(self._broker, "_start_listeners", self._listen)

    def _load(self) -> Settings:
        calm_default_sink()
        config: Any = self.config
        self._config_file = ConfigFile(Path(config.config_file))
        return self._config_file.load()

    def _build(self, settings: Settings, host: AmqttHost) -> Bridge:
        return Bridge(settings, host)

    def _report(self, error: Exception) -> None:
        """Log why there is no bridge: amqtt's own message names no more than the class of the plugin."""
        logger.error("mq2mqtt: the bridge cannot start: {}", error)

    async def on_broker_pre_start(self) -> None:
        """Start the bridge; amqtt waits for it, and opens its listeners after it."""
        if _AMQTT_COMMAND in sys.modules and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # Python raises KeyboardInterrupt in the middle of whatever task it meets, and that one would be missing in
            # the shutdown that the `amqtt` command then begins.
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, _interrupt)
        try:
            await self.bridge.start()
        except Exception as error:  # noqa: BLE001 - amqtt swallows whatever a hook raises: `_listen` reports it
            self.failure = error
            return
        if self._config_file is not None:
            self._reloading = asyncio.create_task(self._config_file.watch(self.bridge), name="mq2mqtt.reload")

    async def _listen(self) -> None:
        """In place of amqtt's method: a broker whose bridge did not start takes no clients.

        Raises:
            BrokerError: the bridge did not start; it comes out of `Broker.start`.
        """
        if self.failure is None:
            await self._start_listeners()
            return
        self._report(self.failure)
        if _AMQTT_COMMAND in sys.modules:
            # The `amqtt` command keeps running, without listeners, when its broker does not start.
            asyncio.get_running_loop().call_soon(sys.exit, _WRONG_CONFIG)
        raise BrokerError(f"the bridge did not start: {self.failure}") from self.failure

    async def on_broker_pre_shutdown(self) -> None:
        """Stop receiving while clients can still acknowledge, end all connections, then stop the rest."""
        await self.close()

    async def close(self) -> None:
        """See `on_broker_pre_shutdown`. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        if self._reloading is not None:
            self._reloading.cancel()
        await self.bridge.stop_receiving()
        await self.host.close()
        await self.bridge.stop()
        self.host.intake = None


def _interrupt() -> None:
    raise KeyboardInterrupt
