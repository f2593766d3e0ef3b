"""Which queues a member of a consumer group owns: Java's `AllocateMessageQueueAveragely`. No I/O.

Every member computes this alone from the same two lists, so members of other languages must come to the same
result to the last queue, or a queue has two owners or none.
"""

from collections.abc import Iterable, Sequence

from mq2mqtt.rocketmq.route import ReadQueue

__all__ = ["allocate", "java_order", "java_string_hash"]


def java_order(text: str) -> bytes:
    """Return a key that sorts as `String.compareTo`: by UTF-16 code units, where Python compares code points."""
    return text.encode("utf-16-be", "surrogatepass")


def java_string_hash(text: str) -> int:
    """Return `String.hashCode()`: what brokers store of a tag and filter by."""
    units = java_order(text)
    value = 0
    for index in range(0, len(units), 2):
        value = (31 * value + (units[index] << 8 | units[index + 1])) & 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value


def allocate(client_id: str, *, queues: Iterable[ReadQueue], members: Iterable[str]) -> tuple[ReadQueue, ...]:
    """Return the queues of one topic that belong to `client_id`, in order.

    A member is listed once for each of its connections, so twice for a while after a connection was cut without
    a word. A Java client then takes the first share only; this one takes both, which nobody else takes.

    Args:
        client_id: our name in `members`; nothing is allocated to a name that is not in it.
        queues: all readable queues of the topic.
        members: the group's client ids as the broker lists them, in any order.
    """
    all_queues = sorted(queues, key=lambda queue: (java_order(queue.broker), queue.queue_id))
    all_members = sorted(members, key=java_order)
    mine: list[ReadQueue] = []
    for index, member in enumerate(all_members):
        if member == client_id:
            mine += _share(all_queues, index=index, count=len(all_members))
    return tuple(mine)


def _share(queues: Sequence[ReadQueue], *, index: int, count: int) -> Sequence[ReadQueue]:
    """Return the share of the member at `index` of `count`: the first `len(queues) % count` get one more."""
    size, extra = divmod(len(queues), count)
    start = index * size + min(index, extra)
    return queues[start : start + size + (index < extra)]
