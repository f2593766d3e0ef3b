"""One message on its way to one or more devices, and the outcome over all of them."""

from collections.abc import Callable
from typing import Final

from mq2mqtt.host import Delivery, DropReason, Missed, Outcome, Settled
from mq2mqtt_amqtt.packets import Frame

__all__ = ["Fanout", "Parcel"]

_RANK: Final = {outcome: rank for rank, outcome in enumerate(Outcome)}
_KEPT: Final = (DropReason.SLOW_DEVICE, DropReason.DISCONNECTED)


class Fanout:
    """Counts the receivers of one message that have not settled; calls `settled` once, with the best outcome."""

    __slots__ = ("_best", "_missed", "_open", "_settled", "handed")

    def __init__(
        self, settled: Settled, handed: Callable[[], None], *, receivers: int, missed: Missed | None = None
    ) -> None:
        self._settled = settled
        self._missed = missed
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

    def missed(self, client_id: str, qos: int, reason: DropReason) -> None:
        """A persistent session, one receiver, did not get it: have it kept, or drop it for `reason`."""
        if self._missed is None:
            self.done(Outcome.DROPPED, reason)
        else:
            self._missed(client_id, qos, self._kept)

    def _kept(self, delivery: Delivery) -> None:
        self.done(delivery.outcome, delivery.reason)


class Parcel:
    """A message for one receiver.

    `ready` is false while the broker's plugins are asked whether the receiver may have it: it keeps its place in the
    order. `written`: the device was sent it. `settled` parcels are dead: only their packet identifier may still be in
    use. `session` is the client id of a receiver whose session is to get it later when it does not now. `kept`: when it
    is settled as `slow_device` or `disconnected`, it is kept for the receiver, in the order of settling. `missed_qos`:
    that was before the plugins answered, and whoever asked them reports the outcome: kept with this QoS, or not.
    """

    __slots__ = ("deadline", "fanout", "frame", "kept", "missed_qos", "ready", "session", "settled", "written")

    def __init__(
        self, fanout: Fanout, frame: Frame, *, ready: bool = True, session: str | None = None, kept: bool = False
    ) -> None:
        self.fanout = fanout
        self.frame: Frame | None = frame
        self.ready = ready
        self.session = session
        self.kept = kept or session is not None
        self.missed_qos = 0
        self.deadline = 0.0
        self.settled = False
        self.written = False

    def settle(self, outcome: Outcome, reason: DropReason | None = None) -> None:
        """Report the outcome, once, unless it becomes one with `missed_qos`; frees the message."""
        if self.settled:
            return
        self.settled = True
        frame, self.frame = self.frame, None
        if frame is None or self.session is None or reason not in _KEPT:
            self.fanout.done(outcome, reason)
        elif self.ready:
            self.fanout.missed(self.session, frame.qos, reason)
        else:
            self.missed_qos = frame.qos
