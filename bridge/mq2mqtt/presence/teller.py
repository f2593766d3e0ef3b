"""What one status rule tells: events into its lane, and later the difference, where the lane took nothing."""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from mq2mqtt.errors import FrameTooLargeError, LaneError
from mq2mqtt.host import DropReason
from mq2mqtt.message import ClientEvent, ClientEventType
from mq2mqtt.presence.state import Announced, Connection, Kept, Record, RuleState, State, Told, Untold
from mq2mqtt.presence.syncing import Syncing
from mq2mqtt.spool.frame import Frame, FrameKind, encode
from mq2mqtt.spool.lane import Lane
from mq2mqtt.status import status_body
from mq2mqtt.telemetry import RuleTelemetry, Trouble

__all__ = ["Teller"]

# Clients told of before devices get their turn: about 5 ms.
_AT_ONCE: Final = 200


class _RefusedError(Exception):
    """The lane, or the journal, takes nothing now."""


class Teller:
    """Tells what one rule's lane has not been told of who is connected.

    `write` puts a record into the journal, and returns whether it is there. While the lane takes nothing, `owed` has
    the clients that something is to be told of: each is told of once, as it is when the lane takes again.
    """

    def __init__(
        self, lane: Lane, *, node: str, state: State, write: Callable[[Record], bool], telemetry: RuleTelemetry
    ) -> None:
        self._rule_id = telemetry.rule_id
        self._lane = lane
        self._node = node
        self._state = state
        self._write = write
        self._telemetry = telemetry
        self._syncing = Syncing(lane.durable)
        self._refuses = False
        self._later: asyncio.Handle | None = None
        # Bounded by who is connected or announced. A plain dict looks for its first key behind all that were taken out.
        self.owed: OrderedDict[str, None] = OrderedDict()
        lane.on_space = self.try_again

    @property
    def _rule(self) -> RuleState:
        return self._state.rules[self._rule_id]

    # -- events --

    def changed(self, client_id: str) -> None:
        """A client came or went."""
        is_settled = self._try_to_settle(client_id)
        if not is_settled:
            self._telemetry.dropped(DropReason.LANE_FULL)
        if is_settled or not (client_id in self._state.connections or client_id in self._rule.announced):
            self.owed.pop(client_id, None)
        else:
            self.owed[client_id] = None

    def said_goodbye(self, connection: Connection, time_ms: int) -> None:
        """A client said DISCONNECT."""
        if self._try_to_settle(connection.client_id):
            with contextlib.suppress(_RefusedError):
                self._tell(ClientEventType.DISCONNECT, connection, time_ms)
                return
        self._telemetry.dropped(DropReason.LANE_FULL)

    def _try_to_settle(self, client_id: str) -> bool:
        if self._refuses:
            return False
        try:
            self._settle(client_id)
        except _RefusedError:
            return False
        return True

    def _settle(self, client_id: str) -> None:
        """Tell what differs for one client: that its old connection is gone, and then that it has a new one."""
        entry, now = self._rule.announced.get(client_id), self._state.connections.get(client_id)
        if entry is not None and _is_over(entry, now):
            ended_ms = self._state.began_ms if entry.ended_ms is None else entry.ended_ms
            self._tell(ClientEventType.TCPCLEAN, entry.connection, ended_ms)
            entry = None
        if now is not None and (entry is None or entry.stale):
            self._tell(ClientEventType.CONNECT, now, now.connected_ms)

    def _tell(self, kind: ClientEventType, connection: Connection, time_ms: int) -> None:
        state = self._state
        told = Told(self._rule_id, self._lane.next_offset, kind, connection, time_ms, state.seq + 1, state.epoch)
        if not self._write(told):
            self._refuse("the journal of who is connected cannot be written, see the log")
        self._append(told)

    def _append(self, told: Told) -> None:
        """Bring into the lane what the journal says is there."""
        connection = told.connection
        event = ClientEvent(told.type, connection.client_id, connection.channel_id, connection.client_ip, told.time_ms)
        body = status_body(event, seq=told.seq, epoch=told.epoch, node=self._node)
        frame = Frame(FrameKind.EVENT, 0, time.time_ns() // 1000, connection.client_id, "", b"", body)
        try:
            self._lane.append(encode(frame))
        except FrameTooLargeError:
            # It never fits. Taken for told, because nobody behind it would be told of.
            self._telemetry.dropped(DropReason.TOO_LARGE)
            return
        except LaneError as error:
            self._write(Untold(self._rule_id))
            self._refuse(str(error))
        self._telemetry.outcomes["accepted"] += 1
        if self._lane.durability == "power":
            self._syncing.soon()

    def _refuse(self, problem: str) -> None:
        self._refuses = True
        self._telemetry.rule_down(Trouble.LANE, problem)
        raise _RefusedError

    # -- the difference --

    def take_up(self) -> None:
        """Settle what a crash may have left between the journal and the lane; call it once, before anything is told."""
        last = self._rule.last
        if last is None or _has(self._lane, last.offset):
            return
        if last.offset == self._lane.next_offset:
            with contextlib.suppress(_RefusedError):
                self._append(last)
        # Else the machine has started anew, and nobody knows whether it was in the lane: it is told again.
        elif last.type is ClientEventType.TCPCLEAN:
            self._write(Untold(self._rule_id))
        elif (entry := self._rule.announced.get(last.connection.client_id)) is not None:
            self._write(Kept(self._rule_id, replace(entry, stale=True)))

    def compare(self, clients_of_group: list[str]) -> None:
        """Find out what is owed: `clients_of_group` are connected."""
        rule, connections = self._rule, self._state.connections
        gone = [client_id for client_id, entry in rule.announced.items() if _is_over(entry, connections.get(client_id))]
        news = [
            client_id
            for client_id in clients_of_group
            if (entry := rule.announced.get(client_id)) is None or entry.stale
        ]
        self.owed = OrderedDict.fromkeys([*gone, *news])

    def try_again(self) -> None:
        """Tell what is owed, some at once and then more by and by; nothing while the lane takes nothing."""
        self._refuses, refused = False, self._refuses
        for _ in range(_AT_ONCE):
            client_id = next(iter(self.owed), None)
            if client_id is None:
                break
            if not self._try_to_settle(client_id):
                return
            self.owed.pop(client_id, None)
        if refused and not self._refuses:
            self._telemetry.rule_up(Trouble.LANE)
        if self.owed and self._later is None:
            self._later = asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._later = None
        self.try_again()

    def watch(self) -> None:
        """Try again what was refused; a disk that is full gives no sign when it has space."""
        if self._refuses or self.owed:
            self.try_again()

    def pause(self) -> None:
        """Tell nothing of what is owed: the rule is off. `compare` finds out anew."""
        self.owed.clear()

    def close(self) -> None:
        """Tell nothing more. Idempotent."""
        self._refuses = True
        self.owed.clear()
        if self._later is not None:
            self._later.cancel()
        self._lane.on_space = None


def _is_over(entry: Announced, now: Connection | None) -> bool:
    return now is None or now.channel_id != entry.connection.channel_id


def _has(lane: Lane, offset: int) -> bool:
    """Whether the lane gave this offset to a message, as far as its files tell."""
    return any(segment.base <= offset < segment.end for segment in lane.segments())
