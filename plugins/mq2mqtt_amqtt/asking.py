"""May they receive it? The broker's plugins are asked for each receiver of a message, of many messages at a time."""

import asyncio
from collections import OrderedDict

from amqtt.session import Session

from mq2mqtt.host import DropReason, Outcome
from mq2mqtt_amqtt.absent import Absent
from mq2mqtt_amqtt.connection import Connection
from mq2mqtt_amqtt.fanout import Fanout, Parcel
from mq2mqtt_amqtt.roles import Receivers

__all__ = ["Asking"]


class Asking:
    """Lets messages go on as the plugins answer: to devices at once, for parcels have their places in the outboxes.

    What sessions that are away miss is kept in the order of the calls, though an answer may overtake the one before.
    """

    def __init__(self, receivers: Receivers, absent: Absent) -> None:
        self._receivers = receivers
        self._absent = absent
        self._tasks: set[asyncio.Task[None]] = set()
        # In the order of the calls: who misses it, `None` while that is asked. Bounded by the windows of the rules.
        self._missed: OrderedDict[Fanout, list[tuple[Session, int]] | None] = OrderedDict()

    def ask(
        self,
        topic: str,
        fanout: Fanout,
        *,
        receivers: list[tuple[Connection, Parcel]],
        away: list[tuple[Session, int]],
    ) -> None:
        """Ask for parcels in outboxes, none of which is `ready`, and for sessions that are away, with their QoS."""
        self._missed[fanout] = None
        task = asyncio.create_task(self._ask(topic, fanout, receivers, away), name="mq2mqtt.receive-acl")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(
        self, topic: str, fanout: Fanout, receivers: list[tuple[Connection, Parcel]], away: list[tuple[Session, int]]
    ) -> None:
        missed: list[tuple[Session, int]] = []
        for connection, parcel in receivers:
            session = connection.session
            permitted = session is not None and await self._receivers.may_receive(session, topic)
            if parcel.missed_qos and session is not None and permitted:
                missed.append((session, parcel.missed_qos))
            elif parcel.missed_qos:
                fanout.done(Outcome.DROPPED, DropReason.NOT_AUTHORIZED)
            elif permitted:
                parcel.ready = True
                connection.outbox.pump()
            else:
                connection.outbox.discard(parcel, DropReason.NOT_AUTHORIZED)
        for session, qos in away:
            if await self._receivers.may_receive(session, topic):
                missed.append((session, qos))
            else:
                fanout.done(Outcome.DROPPED, DropReason.NOT_AUTHORIZED)
        self._answered(fanout, missed)

    def _answered(self, fanout: Fanout, missed: list[tuple[Session, int]]) -> None:
        if missed:
            self._missed[fanout] = missed
        else:
            del self._missed[fanout]
        while self._missed:
            first, missed_by = next(iter(self._missed.items()))
            if missed_by is None:
                return
            del self._missed[first]
            self._absent.miss(first, missed_by)
