"""How hard to search for counterexamples: little in CI, as long as one likes by hand."""

import os
from typing import Final

from hypothesis import HealthCheck, settings

__all__ = ["FACTOR", "searching"]

FACTOR: Final = int(os.environ.get("MQ2MQTT_THOROUGH", "1"))
"""`MQ2MQTT_THOROUGH`, 1 without it."""


def searching(examples: int, *, steps: int = 50) -> settings:
    """Return settings for that many examples; `MQ2MQTT_THOROUGH=N` in the environment makes it N times as many."""
    return settings(
        max_examples=examples * FACTOR,
        stateful_step_count=steps,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
