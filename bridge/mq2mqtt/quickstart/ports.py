"""Free TCP ports on the loopback interface."""

import fcntl
import functools
import os
import random
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["free_base", "free_port", "free_ports", "is_free"]

# Below Linux's ephemeral range (32768 and up): a server that is stopped and started again must not find its port
# taken by somebody's outgoing connection.
RANGE = range(20_000, 32_000)
_ATTEMPTS = 500
# Whoever got a port may not listen on it yet, or be between two starts. Other processes see the locks of `_claim`.
_given: set[int] = set()


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` of every interface now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections of the last one in TIME_WAIT do not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104 - bound for a moment, never listening
        except OSError:
            return False
    return True


def free_port(preferred: int | None = None) -> int:
    """Return `preferred` if it is free, else a random free port.

    Raises:
        OSError: no free port was found.
    """
    if preferred is not None and is_free(preferred) and _claim(preferred):
        return preferred
    return free_base((0,))


def free_ports(count: int) -> tuple[int, ...]:
    """Return `count` different free ports.

    Raises:
        OSError: there are not so many.
    """
    base = free_base(range(count))
    return tuple(range(base, base + count))


def free_base(offsets: Sequence[int]) -> int:
    """Return a random N such that N + offset is free, and was not given out before, for each of `offsets`.

    Raises:
        OSError: no such N was found.
    """
    for _ in range(_ATTEMPTS):
        base = random.choice(RANGE)  # noqa: S311 - spreads parallel runs, no secret
        ports = [base + offset for offset in offsets]
        if all(port in RANGE and port not in _given and is_free(port) for port in ports) and all(map(_claim, ports)):
            _given.update(ports)
            return base
    msg = f"no free TCP port in {RANGE.start}-{RANGE.stop}"
    raise OSError(msg)


def _claim(port: int) -> bool:
    """Hold `port` until this process ends; `False` where another process of this user does."""
    try:
        fcntl.lockf(_claims(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except BlockingIOError:
        return False
    return True


@functools.cache
def _claims() -> int:
    """Open the file of which byte N is locked by who holds port N."""
    path = Path(tempfile.gettempdir()) / f"mq2mqtt-ports-{os.getuid()}"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
