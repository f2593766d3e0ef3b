"""How far a queue is consumed: what was handed out, what of it is settled, and what may be committed. No I/O."""

from collections.abc import Sequence

from mq2mqtt.rocketmq.message import ReceivedMessage

__all__ = ["WINDOW_BYTES", "WINDOW_MESSAGES", "SettledPrefix"]

WINDOW_MESSAGES = 1000
WINDOW_BYTES = 32 * 1024 * 1024
"""Of bodies. Without it a window of messages of the largest size would be 4 GB."""


class SettledPrefix:
    """Tracks the messages of one queue that are handed out and not settled.

    The committed offset is the end of the contiguous settled prefix: everything before it is settled, was filtered
    out, or is not in the queue.
    """

    __slots__ = ("_unsettled", "_unsettled_bytes", "frontier")

    def __init__(self, start: int) -> None:
        self.frontier = start
        """Offset before which everything is handed out or needs no handing out."""
        self._unsettled: dict[int, ReceivedMessage] = {}  # by offset, in the order of handing out: ascending
        self._unsettled_bytes = 0

    @property
    def unsettled(self) -> int:
        """Number of messages handed out and not settled."""
        return len(self._unsettled)

    @property
    def committable(self) -> int:
        """End of the contiguous settled prefix."""
        return next(iter(self._unsettled), self.frontier)

    def room(self, messages: Sequence[ReceivedMessage]) -> int:
        """Return how many of `messages` may be handed out now."""
        room = min(WINDOW_MESSAGES - len(self._unsettled), len(messages))
        budget = WINDOW_BYTES - self._unsettled_bytes
        for index in range(room):
            budget -= len(messages[index].body)
            if budget < 0:
                # One message is always let through, however large.
                return max(index, 0 if self._unsettled else 1)
        return max(room, 0)

    def hand_out(self, messages: Sequence[ReceivedMessage], frontier: int) -> None:
        """Note that `messages`, next in the queue, are handed out; after them all is done up to `frontier`."""
        unsettled = self._unsettled
        for message in messages:
            unsettled[message.offset] = message
            self._unsettled_bytes += len(message.body)
        self.frontier = frontier

    def settle(self, message: ReceivedMessage) -> bool:
        """Note that `message` is settled; false when it was not handed out from here, or is settled already."""
        # By identity: after a queue was lost and won again the same offset may be out twice.
        if self._unsettled.get(message.offset) is not message:
            return False
        del self._unsettled[message.offset]
        self._unsettled_bytes -= len(message.body)
        return True

    def reset(self, offset: int) -> None:
        """Start again at `offset`, anywhere; what is handed out is forgotten."""
        self._unsettled = {}
        self._unsettled_bytes = 0
        self.frontier = offset
