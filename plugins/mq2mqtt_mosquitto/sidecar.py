"""`mq2mqtt sidecar`: the bridge as a process beside the broker."""

import asyncio
import signal
from pathlib import Path

from loguru import logger

from mq2mqtt.bridge import Bridge
from mq2mqtt.reload import ConfigFile
from mq2mqtt.settings import Settings
from mq2mqtt_mosquitto.host import MosquittoHost
from mq2mqtt_mqtt.host import ClientHost

__all__ = ["serve"]


async def serve(settings: Settings, config_file: Path) -> int:
    """Run the bridge until SIGTERM or SIGINT; return the process's exit code. SIGHUP reloads the rules.

    Raises:
        BridgeError: the configuration is wrong, or the spool cannot be used.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    reload = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    host: MosquittoHost | ClientHost
    if settings.host.type == "mqtt":
        host = ClientHost(settings)
        bridge = Bridge(settings, host, subscriber=host)
    else:
        host = MosquittoHost(settings)
        bridge = Bridge(settings, host, writer=host)
        host.changed = bridge.look
        host.follow(bridge.presence)
    host.intake, host.telemetry = bridge.intake, bridge.telemetry
    try:
        await bridge.start()
        host.start()
        logger.info("event loop: {}", type(loop).__module__.partition(".")[0])
        reloading = asyncio.create_task(ConfigFile(config_file).reload_on(reload, bridge), name="mq2mqtt.reload")
        await stop.wait()
        logger.info("stopping")
        reloading.cancel()
        # What devices are being handed is settled while the broker can still be asked.
        await bridge.stop_receiving()
        if isinstance(host, ClientHost):
            # What it would still fetch, the lanes do not take any more.
            await host.stop()
    finally:
        await bridge.stop()
        await host.stop()
    return 0
