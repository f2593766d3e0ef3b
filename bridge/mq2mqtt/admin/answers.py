"""What the API's requests and answers have in common."""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from aiohttp import web

__all__ = ["ApiError", "answer", "check_url", "failure", "limit_of", "only", "parameters"]

_LIMIT: Final = 100
_MAX_LIMIT: Final = 1000
_NOT_ENCODED: Final = re.compile("%(?![0-9A-Fa-f]{2})")


class ApiError(Exception):
    """A request that cannot be done; the text says why, in words for whoever asked."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


def answer(content: Mapping[str, Any], *, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    """Return `content` as JSON."""
    return web.json_response(content, status=status)


def failure(status: int, text: str) -> web.Response:
    """Return `{"error": text}`."""
    return web.json_response({"error": text}, status=status)


def check_url(request: web.Request) -> None:
    """Refuse what decoders disagree about.

    Raises:
        ApiError: 400, the URL is not percent-encoded UTF-8, or holds NUL, which no name has.
    """
    raw = request.raw_path
    try:
        text = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text or _NOT_ENCODED.search(raw):
        raise ApiError(
            HTTPStatus.BAD_REQUEST, "the URL is no percent-encoded UTF-8: write % as %25, / in a name as %2F"
        )


def parameters(request: web.Request, *names: str) -> dict[str, list[str]]:
    """Return the values of each parameter in `names`, in their order.

    Raises:
        ApiError: 400, there are others, or one is empty.
    """
    unknown = sorted(set(request.query) - set(names))
    if unknown:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"unknown parameter {unknown[0]!r}: use {', '.join(names) or 'none'}")
    values = {name: request.query.getall(name, []) for name in names}
    for name, found in values.items():
        if "" in found:
            raise ApiError(HTTPStatus.BAD_REQUEST, f"{name}: empty")
    return values


def limit_of(values: Mapping[str, list[str]]) -> int:
    """Return how many entries a page is to have at most.

    Raises:
        ApiError: 400, it is no number from 1 to 1000.
    """
    text = only(values, "limit")
    if text is None:
        return _LIMIT
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(_MAX_LIMIT)) and 1 <= int(text) <= _MAX_LIMIT):
        raise ApiError(HTTPStatus.BAD_REQUEST, f"limit: {text!r} is no number from 1 to {_MAX_LIMIT}")
    return int(text)


def only(values: Mapping[str, list[str]], name: str) -> str | None:
    """Return the value of a parameter that may be there once.

    Raises:
        ApiError: 400, it is there more often.
    """
    found = values[name]
    if len(found) > 1:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"{name}: give it once")
    return found[0] if found else None
