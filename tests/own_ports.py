"""Ports that no other test run on this machine takes, not even while nobody listens on them."""

import fcntl
import os
import tempfile
from pathlib import Path

from mq2mqtt.quickstart import ports

_RUNS = 6


def take_own_ports() -> None:
    """Have this process choose its ports from a share of the range that is its own until it ends.

    A test that ends a server and starts it again must find its port free; runs go on beside each other.
    """
    each = len(ports.RANGE) // _RUNS
    for number in range(_RUNS):
        lock = os.open(Path(tempfile.gettempdir(), f"mq2mqtt-test-ports-{number}"), os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            ports.RANGE = ports.RANGE[number * each :][:each]
            return
