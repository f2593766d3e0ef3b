"""The configuration file of a running bridge: read at the start, and again when it has changed or somebody asks."""

import asyncio
from pathlib import Path

from loguru import logger

from mq2mqtt import settings
from mq2mqtt.bridge import Bridge
from mq2mqtt.errors import BridgeError

__all__ = ["ConfigFile"]

_POLL_SECONDS = 1.0

_Fingerprint = tuple[int, int, int] | None


class ConfigFile:
    """The file at `path`, and what of it the bridge has seen. The environment stays above it at every reload."""

    def __init__(self, path: Path) -> None:
        # Whoever starts the bridge may change the working directory later.
        self._path = path.absolute()
        self._seen = self._fingerprint()

    def load(self) -> settings.Settings:
        """Read it.

        Raises:
            ConfigError: something in it is wrong; one line for each problem.
        """
        return settings.load(self._path)

    async def reload(self, bridge: Bridge) -> None:
        """Bring its rules into the bridge; where anything in the file is wrong, change nothing."""
        try:
            # A thousand rules take longer to read than devices should wait.
            loaded = await asyncio.to_thread(self.load)
        except BridgeError as error:
            bridge.telemetry.reload_refused(str(error))
        else:
            bridge.reload(loaded)

    async def reload_on(self, request: asyncio.Event, bridge: Bridge) -> None:
        """Reload whenever `request` is set; requests during a reload make one more. Ends when cancelled."""
        while True:
            await request.wait()
            request.clear()
            await self._reload_safely(bridge)

    async def watch(self, bridge: Bridge) -> None:
        """Reload whenever the file has changed and then stayed the same for a second. Ends when cancelled.

        The second is for programs that write a file bit by bit: half of a list of rules may be a valid one.
        """
        before = self._seen
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            now = self._fingerprint()
            if now == before and now != self._seen:
                self._seen = now
                await self._reload_safely(bridge)
            before = now

    async def _reload_safely(self, bridge: Bridge) -> None:
        try:
            await self.reload(bridge)
        except Exception:  # noqa: BLE001 - a task's top edge: the next reload must come through
            logger.exception("unexpected error while reloading, going on")

    def _fingerprint(self) -> _Fingerprint:
        """Return what changes with the file: also when another one is moved into its place, or a link is bent."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
