"""Decodes bodies that inflate to much, within little memory and processor time; `test_bombs.py` starts it."""

import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import lz4.frame
import zstandard

from mq2mqtt.rocketmq.codec import MAX_INFLATED, decode_messages
from mq2mqtt.rocketmq.errors import DecodeError, FrameError
from mq2mqtt.rocketmq.remoting import FrameDecoder
from tests.fuzz.stored import stored_message

__all__ = ["BOMBS"]

SWOLLEN = 4 * MAX_INFLATED
MEMORY_BYTES = 400 << 20
PROCESSOR_SECONDS = 60

_ZLIB, _LZ4, _ZSTD = 0x301, 0x101, 0x201


def _zlib() -> bytes:
    squeeze = zlib.compressobj(1)
    block = bytes(1 << 20)
    return b"".join(squeeze.compress(block) for _ in range(SWOLLEN >> 20)) + squeeze.flush()


def _lz4(*, announced: bool) -> bytes:
    squeeze = lz4.frame.LZ4FrameCompressor(block_size=lz4.frame.BLOCKSIZE_MAX4MB)  # type: ignore[no-untyped-call]
    size = SWOLLEN if announced else 0
    parts = [squeeze.begin(size)]  # type: ignore[no-untyped-call]
    parts += [squeeze.compress(bytes(4 << 20)) for _ in range(SWOLLEN >> 22)]  # type: ignore[no-untyped-call]
    return b"".join([*parts, squeeze.flush()])  # type: ignore[no-untyped-call]


def _zstd(*, announced: bool) -> bytes:
    squeeze = zstandard.ZstdCompressor(level=1).compressobj(size=SWOLLEN if announced else -1)
    block = bytes(1 << 20)
    return b"".join(squeeze.compress(block) for _ in range(SWOLLEN >> 20)) + squeeze.flush()


def _refused(body: bytes, kind: int) -> None:
    problems: list[DecodeError] = []
    assert decode_messages(stored_message(body, kind), on_error=problems.append) == []
    assert "inflates to more" in problems[0].reason


def _answer(body: bytes, kind: int) -> None:
    """Read a pull's answer that is full of bombs."""
    message = stored_message(body, kind)
    rest: list[int] = []
    decode_messages(message * max(2, (4 << 20) // len(message)), on_error=lambda _: None, on_rest=rest.append)
    assert rest


def _lengths() -> None:
    """Read frames that announce more than they hold."""
    for total, mark in ((0xFFFFFFFF, 0), (16 << 20, 0x00FFFFFF), (16 << 20, 0x01FFFFFF), (4, 0x00FFFFFF)):
        decoder = FrameDecoder()
        try:
            decoder.feed(struct.pack(">II", total, mark) + bytes(1000))
        except FrameError:
            continue
        raise AssertionError(f"a frame of {total} bytes with the header mark {mark:#x} was accepted")


def _just_fits(body: bytes, kind: int) -> None:
    [message] = decode_messages(stored_message(body, kind))
    assert len(message.body) == MAX_INFLATED


BOMBS: dict[str, Callable[[], None]] = {
    "zlib": lambda: _refused(_zlib(), _ZLIB),
    "lz4": lambda: _refused(_lz4(announced=False), _LZ4),
    "lz4, its size announced": lambda: _refused(_lz4(announced=True), _LZ4),
    "zstd": lambda: _refused(_zstd(announced=False), _ZSTD),
    "zstd, its size announced": lambda: _refused(_zstd(announced=True), _ZSTD),
    "an answer full of zstd": lambda: _answer(_zstd(announced=True), _ZSTD),
    "the largest that is read": lambda: _just_fits(zlib.compress(bytes(MAX_INFLATED), 1), _ZLIB),
    "lengths": _lengths,
}


def main() -> None:
    """Decode all of them; the first limit that is met ends the process, with the bomb's name shown last."""
    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS,) * 2)
    for name, decode in BOMBS.items():
        print(name, flush=True)  # noqa: T201 - for the test that reads it
        decode()


if __name__ == "__main__":
    main()
