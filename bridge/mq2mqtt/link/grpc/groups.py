"""Message groups: how the proxy spreads them over a topic's queues. Pure."""

import functools
import itertools

__all__ = ["group_names"]

_MASK_32 = (1 << 32) - 1
_MASK_64 = (1 << 64) - 1


@functools.lru_cache(maxsize=64)
def group_names(count: int) -> tuple[str, ...]:
    """Return `count` names of message groups, each of which the proxy puts into a queue of its own.

    The proxy takes queue `consistentHash(name.hashCode(), count)` of its list (SendMessageActivity of RocketMQ 5).
    Should it do otherwise some day, queues would share the load less evenly; the order within a group would stay.
    """
    return tuple(_name(index, count) for index in range(count))


def _name(index: int, count: int) -> str:
    names = (f"mq2mqtt-{index}-{attempt}" for attempt in itertools.count())
    return next(name for name in names if _bucket(_java_hash(name), count) == index)


def _java_hash(text: str) -> int:
    value = 0
    for char in text:
        value = (value * 31 + ord(char)) & _MASK_32
    return value - (1 << 32) if value >> 31 else value


def _bucket(state: int, count: int) -> int:
    """Guava's `Hashing.consistentHash`."""
    state &= _MASK_64
    bucket = 0
    while True:
        state = (state * 2862933555777941757 + 1) & _MASK_64
        following = int((bucket + 1) / (((state >> 33) + 1) / (1 << 31)))
        if following >= count:
            return bucket
        bucket = following
