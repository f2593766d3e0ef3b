"""Where log lines go: standard error, as text or as JSON; the standard library's logging goes the same way."""

import contextlib
import logging
import sys
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["calm_default_sink", "quiet_client", "set_up_logging"]

_TEXT = "<dim>{time:YYYY-MM-DD HH:mm:ss.SSS}</dim> <level>{level: <8}</level> {message} <dim>[{name}]</dim>"
_DEFAULT_SINK = 0
# amqtt logs every packet at INFO and formats texts for it; an operator of the bridge wants its warnings only.
_QUIET = {"amqtt": logging.WARNING, "transitions": logging.WARNING, "aiohttp.access": logging.WARNING}


class _ToLoguru(logging.Handler):
    """Hands a record of the standard library's logging to loguru, with its level, origin and exception."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level: str | int = logger.level(record.levelname).name
        except ValueError:
            level = record.levelno
        frame: FrameType | None = sys._getframe()  # noqa: SLF001 - loguru's documented recipe for finding the caller
        depth = 0
        while frame is not None and (depth == 0 or frame.f_code.co_filename == logging.__file__):
            frame, depth = frame.f_back, depth + 1
        logger.opt(depth=depth, exception=record.exc_info).log(level, "{}", record.getMessage())


def calm_default_sink() -> None:
    """In a process that is not ours: have loguru's own default sink start at INFO, unless somebody has replaced it.

    It would print a DEBUG line for each connection of each client.
    """
    with contextlib.suppress(ValueError):
        logger.remove(_DEFAULT_SINK)
        logger.add(sys.stderr, level="INFO", format=_TEXT, backtrace=False, diagnose=False)


def quiet_client() -> None:
    """For commands that say themselves what they found: no log lines about connections that cannot be made."""
    logging.getLogger("mq2mqtt.rocketmq").setLevel(logging.ERROR)


def set_up_logging(*, level: str = "INFO", json: bool = False) -> None:
    """Send all log lines at `level` and above to standard error; `json` writes one JSON object per line.

    For a process that is ours (`mq2mqtt run`); the plugin in somebody else's broker leaves its logging alone.
    """
    logger.remove()
    # diagnose would print the values of variables into tracebacks, and so secrets and payloads.
    logger.add(sys.stderr, level=level, format=_TEXT, serialize=json, backtrace=False, diagnose=False)
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.INFO, force=True)
    for name, quiet in _QUIET.items():
        logging.getLogger(name).setLevel(quiet)
