"""One connection to a name server or broker: many requests in flight, matched with their answers by `opaque`."""

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Final, cast

from mq2mqtt.rocketmq.errors import FrameError, NotConnected, RequestTimeout
from mq2mqtt.rocketmq.remoting import Command, FrameDecoder, Response, encode_request, encode_response

__all__ = ["Connection", "open_connection"]

logger = logging.getLogger(__name__)

_CLOSED: Final = "closed by the peer"
_SWEEP_SECONDS: Final = 0.2  # one timer for all timeouts: a timer for each call costs more than the call's header
_WRITE_BUFFER: Final = 1024 * 1024
_FLUSH_BYTES: Final = 64 * 1024
_OPAQUE_LIMIT: Final = 2**31 - 1  # a signed integer in Java

RequestHandler = Callable[["Connection", Command], tuple[int, str] | None]


class Connection(asyncio.Protocol):
    """Made by `open_connection`; ends with `connection_lost` and is then of no further use.

    Attributes:
        address: `host:port`, for error texts.
        answered: whether the peer ever sent a well-formed frame.
    """

    def __init__(
        self, address: str, *, on_request: RequestHandler, on_lost: Callable[["Connection", str], None]
    ) -> None:
        self.address = address
        self.answered = False
        self._loop = asyncio.get_running_loop()
        self._on_request = on_request
        self._on_lost = on_lost
        self._decoder = FrameDecoder()
        self._transport: asyncio.Transport | None = None
        self._lost: str | None = None
        self._cause = _CLOSED
        self._opaque = 0
        # opaque -> (answer, sent at, deadline, seconds)
        self._waiting: dict[int, tuple[asyncio.Future[Response], float, float, float]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._writable: asyncio.Future[None] | None = None
        self._received_at = self._loop.time()
        self._suspect_at: float | None = None

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended."""
        return self._lost is not None

    async def call(self, code: int, fields: dict[str, str], body: bytes = b"", *, timeout: float) -> Response:  # noqa: ASYNC109 - one sweep serves all timeouts
        """Send a request and wait for its answer, whatever its code.

        Raises:
            NotConnected: the connection is lost, now or before the answer.
            RequestTimeout: no answer within `timeout` seconds.
        """
        return await self.call_encoded(lambda opaque: encode_request(code, opaque, fields, body), timeout=timeout)

    async def call_encoded(self, encode: Callable[[int], bytes], *, timeout: float) -> Response:  # noqa: ASYNC109
        """As `call`, with the frame made by `encode`, which is given the `opaque` to put into it."""
        sent_at = self._loop.time()
        if self._writable is not None:
            await self._wait_writable(timeout)
        if self._lost is not None:
            raise NotConnected(self.address, self._lost)
        opaque = self._opaque = self._opaque % _OPAQUE_LIMIT + 1
        self._write(encode(opaque))
        answer: asyncio.Future[Response] = self._loop.create_future()
        self._waiting[opaque] = (answer, sent_at, sent_at + timeout, timeout)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep)
        try:
            return await answer
        finally:
            self._waiting.pop(opaque, None)

    def close(self, reason: str = "closed by this client") -> None:
        """End the connection at once; calls in flight fail with `NotConnected`. Idempotent."""
        if self._lost is None and self._transport is not None:
            self._cause = reason
            self._transport.abort()
            self._end(reason)

    # The transport's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport (asyncio)."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER)

    def data_received(self, data: bytes) -> None:
        """Give answers to their callers (asyncio)."""
        self._received_at = self._loop.time()
        try:
            commands = self._decoder.feed(data)
        except FrameError as error:
            logger.warning("%s sent something that is not RocketMQ's protocol: %s", self.address, error)
            self.close(str(error))
            return
        if not commands:
            return
        self.answered = True
        self._suspect_at = None
        waiting = self._waiting
        for command in commands:
            if not command.is_response:
                self._serve(command)
                continue
            entry = waiting.pop(command.opaque, None)
            if entry is None:
                logger.debug("late answer from %s, code %d", self.address, command.code)
            elif not entry[0].done():
                entry[0].set_result(command)

    def pause_writing(self) -> None:
        """Hold back callers until the peer reads (asyncio)."""
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        """Let callers go on (asyncio)."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what is in flight (asyncio)."""
        if isinstance(exc, ssl.SSLError):
            # Where the server wants to see a certificate, it says so after the handshake.
            self._end(f"refused by the peer: {_words(exc)}")
        elif exc is not None:
            self._end(str(exc) or type(exc).__name__)
        elif self._cause == _CLOSED and not self.answered and not self._is_tls():
            # A server that takes nothing but TLS says no more than that.
            self._end(f"{_CLOSED} without an answer; does it want TLS?")
        else:
            self._end(self._cause)

    def _is_tls(self) -> bool:
        return self._transport is not None and self._transport.get_extra_info("sslcontext") is not None

    def _end(self, reason: str) -> None:
        if self._lost is not None:
            return
        self._lost = reason
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        self.resume_writing()
        self._unsent.clear()
        waiting, self._waiting = self._waiting, {}
        for answer, *_ in waiting.values():
            if not answer.done():
                answer.set_exception(NotConnected(self.address, reason))
        self._on_lost(self, reason)

    def _serve(self, request: Command) -> None:
        reply = self._on_request(self, request)
        if reply is not None and not request.is_one_way:
            code, remark = reply
            self._write(encode_response(request, code, remark))

    def _write(self, frame: bytes) -> None:
        # Frames of one turn of the loop leave in one system call; many are not held back, so that the transport
        # can say that it has enough.
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(frame)
        self._unsent_bytes += len(frame)
        if self._unsent_bytes >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._unsent and self._transport is not None and self._lost is None:
            data = self._unsent[0] if len(self._unsent) == 1 else b"".join(self._unsent)
            self._transport.write(data)
        self._unsent.clear()
        self._unsent_bytes = 0

    async def _wait_writable(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while self._writable is not None:
                    await asyncio.shield(self._writable)
        except TimeoutError:
            # The peer has taken no byte of a full buffer for so long.
            self.close("the peer does not read")
            raise RequestTimeout(self.address, seconds) from None

    def _sweep(self) -> None:
        now = self._loop.time()
        self._sweeper = None
        silent_since: float | None = None
        for answer, sent_at, deadline, seconds in self._waiting.values():
            if deadline <= now and not answer.done():
                answer.set_exception(RequestTimeout(self.address, seconds))
                if sent_at > self._received_at:
                    silent_since = sent_at if silent_since is None else max(silent_since, sent_at)
        if silent_since is not None:
            # Half-open: a call that began after another had timed out times out too, and not a byte came between.
            if self._suspect_at is not None and silent_since >= self._suspect_at:
                logger.warning("%s has stopped answering; closing the connection", self.address)
                self.close("it has stopped answering")
                return
            self._suspect_at = self._suspect_at or now
        if any(not entry[0].done() for entry in self._waiting.values()):
            self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep)


async def open_connection(
    address: str,
    *,
    ssl_context: ssl.SSLContext | None,
    on_request: RequestHandler,
    on_lost: Callable[[Connection, str], None],
    timeout: float,  # noqa: ASYNC109 - connecting is the whole call
) -> Connection:
    """Connect to `address` (`host:port`, IPv6 in brackets).

    Raises:
        NotConnected: it cannot be reached within `timeout` seconds.
    """
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout):
            _, connection = await loop.create_connection(
                lambda: Connection(address, on_request=on_request, on_lost=on_lost),
                host.strip("[]"),
                int(port),
                ssl=ssl_context,
            )
    except TimeoutError:
        raise NotConnected(address, f"no connection within {timeout:g} s") from None
    except ssl.SSLCertVerificationError as error:
        raise NotConnected(address, f"its certificate is not accepted: {error.verify_message}") from error
    except (ssl.SSLError, ConnectionResetError) as error:
        if ssl_context is None:
            raise NotConnected(address, str(error)) from error
        raise NotConnected(address, f"no TLS connection: {_words(error)}; is TLS enabled there?") from error
    except (OSError, ValueError) as error:
        # ValueError: a broker may announce an address without a port, or with a host that is no name.
        raise NotConnected(address, getattr(error, "strerror", None) or str(error)) from error
    return connection


def _words(error: OSError) -> str:
    """Return what `error` is about, without OpenSSL's file and line: `wrong version number`."""
    return str(getattr(error, "reason", None) or error.strerror or error).lower().replace("_", " ")
