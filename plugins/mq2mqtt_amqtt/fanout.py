"""One message on its way to one or more devices, and the outcome over all of them."""

from collections.abc import Callable

from mq2mqtt.host import Delivery, DropReason, Outcome, Settled
from mq2mqtt_amqtt.packets import Frame

__all__ = ["Fanout", "Parcel"]

_RANK = {Outcome.DELIVERED: 0, Outcome.QUEUED: 1, Outcome.DROPPED: 2, Outcome.NO_SUBSCRIBER: 3}


class Fanout:
    """Counts the receivers of one message that have not settled; calls `settled` once, with the best outcome."""

    __slots__ = ("_best", "_open", "_settled", "handed")

    def __init__(self, settled: Settled, handed: Callable[[], None], *, receivers: int) -> None:
        self._settled = settled
        self._open = receivers
        self._best = Delivery(Outcome.NO_SUBSCRIBER)
        self.handed = handed

    def done(self, outcome: Outcome, reason: DropReason | None = None) -> None:
        """One receiver has settled."""
        if _RANK[outcome] < _RANK[self._best.outcome]:
            self._best = Delivery(outcome, reason)
        self._open -= 1
        if not self._open:
            self._settled(self._best)


class Parcel:
    """A message for one receiver.

    `ready` is false while the broker's plugins are asked whether the receiver may have it: it keeps its place in the
    order. `settled` parcels are dead: only their packet identifier may still be in use.
    """

    __slots__ = ("deadline", "fanout", "frame", "ready", "settled")

    def __init__(self, fanout: Fanout, frame: Frame, *, ready: bool = True) -> None:
        self.fanout = fanout
        self.frame: Frame | None = frame
        self.ready = ready
        self.deadline = 0.0
        self.settled = False

    def settle(self, outcome: Outcome, reason: DropReason | None = None) -> None:
        """Report the outcome, once; frees the message."""
        if not self.settled:
            self.settled = True
            self.frame = None
            self.fanout.done(outcome, reason)
