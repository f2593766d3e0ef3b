"""Moments that are different in each run, and can be repeated."""

import os
import random

_SEED = "MQ2MQTT_FAULT_SEED"
"""Set it to repeat a run's moments."""


def random_moments(name: str) -> random.Random:
    """Return a source of moments for the use `name`; prints the seed, which is shown when the test fails."""
    seed = os.environ.get(_SEED) or str(random.SystemRandom().randrange(2**32))
    print(f"{_SEED}={seed}")  # noqa: T201
    return random.Random(seed + name)  # noqa: S311 - to be repeated, not a secret
