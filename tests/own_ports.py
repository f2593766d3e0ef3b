"""Ports that no other test run on this machine takes, not even while nobody listens on them."""

import fcntl
import os
import sys
import tempfile
import time
from pathlib import Path

from mq2mqtt.quickstart import ports

_RUNS = 6


def take_own_ports() -> None:
    """Have this process choose its ports from a share of the range that is its own until it ends.

    A test that ends a server and starts it again must find its port free; runs go on beside each other. One more than
    there are shares waits until another ends.
    """
    number = _free_share()
    if number is None:
        print(f"{_RUNS} test runs go on: waiting until one of them ends", file=sys.stderr, flush=True)  # noqa: T201
    while number is None:
        time.sleep(1)
        number = _free_share()
    each = len(ports.RANGE) // _RUNS
    ports.RANGE = ports.RANGE[number * each :][:each]


def _free_share() -> int | None:
    """Take a share that no other run has."""
    for number in range(_RUNS):
        lock = os.open(Path(tempfile.gettempdir(), f"mq2mqtt-test-ports-{number}"), os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return number
    return None
