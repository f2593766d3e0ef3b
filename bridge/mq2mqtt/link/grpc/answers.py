"""From the client's threads to the event loop."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from mq2mqtt.errors import BridgeError, NotConnectedError

__all__ = ["Answers"]


class Answers:
    """What is asked and not yet answered.

    Args:
        translate: makes the bridge's error of the client's.
    """

    def __init__(self, translate: Callable[[BaseException], BridgeError]) -> None:
        self._translate = translate
        self._awaited: set[asyncio.Future[Any]] = set()

    async def of(self, future: Future[Any]) -> Any:  # noqa: ANN401 - the client has no types
        """Wait for `future`, which a thread of the client fulfils; it is cancelled with the waiting.

        Raises:
            BridgeError: what became of it, translated; `NotConnectedError` after `close`.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._awaited.add(answer)
        future.add_done_callback(lambda done: _hand_over(loop, answer, done))
        try:
            return await answer
        except BridgeError:
            raise
        except Exception as error:
            raise self._translate(error) from error
        finally:
            self._awaited.discard(answer)
            future.cancel()

    def close(self) -> None:
        """Fail whatever waits. The client forgets what it has not answered when it is shut down."""
        for answer in self._awaited:
            if not answer.done():
                answer.set_exception(NotConnectedError("the link is closed"))


def _hand_over(loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Any], done: Future[Any]) -> None:
    # A loop that is closed has nobody who waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(_fulfil, answer, done)


def _fulfil(answer: asyncio.Future[Any], done: Future[Any]) -> None:
    if answer.done():
        return
    if done.cancelled():
        answer.set_exception(NotConnectedError("the client was shut down"))
    elif error := done.exception():
        answer.set_exception(error)
    else:
        answer.set_result(done.result())
