"""Who may use the API: programs on this machine, and no web page that is open in a browser there."""

import ipaddress
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final

from aiohttp import web
from loguru import logger

from mq2mqtt.admin.answers import ApiError, check_url, failure
from mq2mqtt.errors import BridgeError

__all__ = ["guard"]

_LOCAL_ONLY: Final = (
    "the API answers programs on this machine only, until tokens come: ask 127.0.0.1, [::1] or localhost, "
    "without a proxy between"
)
_NO_PAGES: Final = "the API answers no web pages of other origins"
_LOCAL_NAME: Final = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
# A proxy on this machine would make everybody whom it serves one of this machine.
_OF_PROXIES: Final = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def guard(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Refuse strangers, and say in JSON what went wrong."""
    refusal = _refusal(request)
    if refusal is not None:
        return failure(HTTPStatus.FORBIDDEN, refusal)
    try:
        check_url(request)
        response = await handler(request)
    except ApiError as error:
        return failure(error.status, str(error))
    except web.HTTPException as error:
        return _without_page(error, request)
    except BridgeError as error:
        logger.error("the API could not answer {}: {}", request.method, error)
        return failure(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
    except Exception:  # noqa: BLE001 - the edge of a request: whoever asks is told, and the bridge goes on
        logger.exception("unexpected error in the API")
        return failure(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error, see the log")
    response.headers["Cache-Control"] = "no-store"
    return response


def _without_page(error: web.HTTPException, request: web.Request) -> web.Response:
    """Return what aiohttp says of a request that no handler takes."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        answer = failure(HTTPStatus.METHOD_NOT_ALLOWED, f"{request.method} does nothing here: use {allowed}")
        answer.headers["Allow"] = allowed
        return answer
    if isinstance(error, web.HTTPNotFound):
        return failure(HTTPStatus.NOT_FOUND, "there is nothing at this path: see docs/api.md")
    return failure(error.status, error.reason)


def _refusal(request: web.Request) -> str | None:
    if not _is_loopback(_peer(request)):
        return _LOCAL_ONLY
    # A name that somebody made point to this machine is theirs, and so is the page that uses it (DNS rebinding).
    hosts = request.headers.getall("Host", [])
    if len(hosts) != 1 or not _LOCAL_NAME.fullmatch(hosts[0]) or any(name in request.headers for name in _OF_PROXIES):
        return _LOCAL_ONLY
    # A page may send simple requests anywhere. Browsers say of each whose it is.
    origin = request.headers.get("Origin")
    if origin is not None and origin != f"http://{hosts[0]}":
        return _NO_PAGES
    if request.headers.get("Sec-Fetch-Site", "none") not in {"none", "same-origin"}:
        return _NO_PAGES
    return None


def _peer(request: web.Request) -> str:
    """Return the address that the connection comes from, empty if it is not known any more."""
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    return str(peer[0]) if peer else ""


def _is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback
