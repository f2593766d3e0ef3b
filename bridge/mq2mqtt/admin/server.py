"""The admin port: `/metrics`, `/healthz` and `/readyz` for everybody who reaches it, `/api` for this machine."""

import logging
from collections.abc import Sequence
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

from mq2mqtt.admin.guard import guard
from mq2mqtt.errors import ConfigError
from mq2mqtt.telemetry import Telemetry

__all__ = ["AdminServer"]


def _is_ours(record: logging.LogRecord) -> bool:
    """Leave out what is no HTTP: its sender is told so with 400, and must not fill the log with tracebacks."""
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


_LOGGER: Final = logging.getLogger(__name__)
_LOGGER.addFilter(_is_ours)


class AdminServer:
    """An HTTP server in the bridge's own loop. `port` is the bound port once it has started; `api` are its routes."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        telemetry: Telemetry,
        registry: CollectorRegistry,
        api: Sequence[web.RouteDef] = (),
    ) -> None:
        self._host = host
        self.port = port
        self._telemetry = telemetry
        app = web.Application()
        app.router.add_get("/metrics", make_aiohttp_handler(registry=registry))
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        guarded = web.Application(middlewares=[guard])
        guarded.add_routes(api)
        app.add_subapp("/api", guarded)
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None, logger=_LOGGER, shutdown_timeout=1.0)

    @property
    def url(self) -> str:
        """Base URL, without a trailing slash."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Bind and serve; raises ConfigError when the address cannot be bound."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self.port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(
                f"admin.listen: cannot listen on {self._host}:{self.port} ({error.strerror or error}): "
                "choose a free address"
            ) from error
        self.port = int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Stop serving. Idempotent."""
        await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        ready = self._telemetry.ready
        body = {"ready": ready, "rules": [rule.readiness() for rule in self._telemetry.told]}
        return web.json_response(body, status=200 if ready else 503)
