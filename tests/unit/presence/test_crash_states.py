"""Presence and one status rule's lane over crashes: killed at any change to the disk, recovery included.

The model knows what the broker knows, who is connected, and what RocketMQ gets, the events in the lane.
"""

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from loguru import logger

from mq2mqtt.message import ClientEvent, ClientEventType
from mq2mqtt.presence import Journal, Presence, StatusTracker
from mq2mqtt.rules import RuleSet, StatusRule
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.telemetry import Direction, RuleTelemetry
from tests.thorough import searching
from tests.unit.spool.disk import Crash, Disk
from tests.unit.spool.lanes import START_US

MAX_BYTES = 4096  # some 18 events
CLIENTS = [f"GID_dev@@@{name}" for name in "abc"]
clients = st.sampled_from(CLIENTS)
crash_points = st.integers(0, 12)
parts = st.sampled_from((0.0, 0.01, 0.5, 0.99))


class PresenceOverCrashes(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        root = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.disk = Disk(root)
        self.stack.enter_context(self.disk.recording())
        # So that the journal is written anew again and again.
        self.stack.enter_context(mock.patch("mq2mqtt.presence.journal._SURELY_WORTH", 6))
        self.stack.enter_context(mock.patch("mq2mqtt.presence.journal._AT_ONCE", 2))
        logger.disable("mq2mqtt")
        self.stack.callback(logger.enable, "mq2mqtt")
        self.spool = root / "spool"
        self.now = START_US
        self.boots = 1
        self.machine_restarts = 0
        self.targets = 0
        self.rule = StatusRule(id="presence", type="status", source="GID_dev", target="t0")
        self.truth: dict[str, str] = {}
        """Channel by client id: who is connected to the broker."""
        self.channels = 0
        self.told: list[dict[str, Any]] = []
        """What RocketMQ has, in order."""
        self.crashes_again: int | None = None
        """After how many changes the start that follows a crash is killed."""
        self.presence: Presence | None = None

    @initialize(lives_on=st.booleans())
    def begin(self, lives_on: bool) -> None:  # noqa: FBT001 - drawn
        self.lives_on = lives_on
        self.open()

    # -- the product --

    def machine(self) -> Machine:
        return Machine(now_us=self._clock, boot_id=bytes([self.boots % 256]) * 16, sync=self.disk.sync)

    def _clock(self) -> int:
        self.now += 1
        return self.now

    def open(self) -> None:
        """Start the bridge; a broker of its own has nobody then, another tells what has changed meanwhile."""
        if not self.lives_on:
            self.truth.clear()
        journal = Journal(self.spool / ".presence", machine=self.machine())
        presence = Presence(journal, node="n1")
        presence.apply(RuleSet([self.rule]))
        target = self.rule.target
        self.lane = Lane.open(self.spool / "presence", max_bytes=MAX_BYTES, target=target, machine=self.machine())
        self.reader = LaneReader(self.lane)
        self.presence = presence
        presence.attach(self.lane, RuleTelemetry("presence", direction=Direction.UPLINK))
        presence.start(lives_on=self.lives_on)
        for client_id, known in list(presence.connections.items()):
            if self.truth.get(client_id) != known.channel_id:
                self.tell(ClientEventType.TCPCLEAN, client_id, known.channel_id)
        for client_id, channel in self.truth.items():
            self.tell(ClientEventType.CONNECT, client_id, channel)

    def tell(self, kind: ClientEventType, client_id: str, channel: str) -> None:
        assert self.presence is not None
        self.presence.take(ClientEvent(kind, client_id, channel, "192.0.2.1:1", self.now // 1000))

    def close(self) -> None:
        if self.presence is not None:
            self.presence.close()
            self.reader.close()
            self.lane.close()
            self.presence = None

    def surviving(self, step: Callable[[], None]) -> None:
        """Do `step`; if the process is killed in it, start anew, again if it is killed in that."""
        try:
            step()
        except Crash:
            self.presence = None
            self.disk.kill()
            self.disk.crash_after(self.crashes_again)
            self.crashes_again = None
            self.surviving(self.open)

    # -- what happens --

    @rule(client_id=clients)
    def connects(self, client_id: str) -> None:
        """Also where it is connected: then it takes its connection over, and the broker tells of both."""
        channel = f"c{self.channels}"
        self.channels += 1
        if client_id in self.truth:
            self.ends(client_id)
        self.truth[client_id] = channel
        self.surviving(lambda: self.tell(ClientEventType.CONNECT, client_id, channel))

    @rule(client_id=clients)
    def takes_over(self, client_id: str) -> None:
        channel = f"c{self.channels}"
        self.channels += 1
        self.truth[client_id] = channel
        self.surviving(lambda: self.tell(ClientEventType.CONNECT, client_id, channel))

    @rule(client_id=clients)
    def says_goodbye(self, client_id: str) -> None:
        if (channel := self.truth.get(client_id)) is not None:
            self.surviving(lambda: self.tell(ClientEventType.DISCONNECT, client_id, channel))

    @rule(client_id=clients)
    def ends(self, client_id: str) -> None:
        if (channel := self.truth.pop(client_id, None)) is not None:
            self.surviving(lambda: self.tell(ClientEventType.TCPCLEAN, client_id, channel))

    @rule()
    def broker_begins_anew(self) -> None:
        self.truth.clear()
        presence = self.presence
        assert presence is not None
        self.surviving(lambda: presence.begin(time_ms=self.now // 1000))

    @rule()
    def rocketmq_takes_all(self) -> None:
        self.surviving(self.drain)

    def drain(self) -> None:
        while entries := self.reader.read(max_messages=100):
            for entry in entries:
                body = {**json.loads(entry.frame.payload), "offset": entry.offset}
                if body not in self.told:
                    self.told.append(body)
                self.reader.settle([entry.offset])

    @rule(seconds=st.just(1))
    def a_second_passes(self, seconds: int) -> None:  # noqa: ARG002 - hypothesis wants rules to differ
        presence = self.presence
        assert presence is not None
        self.surviving(presence.watch)

    @rule()
    def is_disabled_and_enabled(self) -> None:
        presence = self.presence
        assert presence is not None
        for enabled in (False, True):
            if self.presence is presence:
                changed = self.rule.model_copy(update={"enabled": enabled})
                self.surviving(lambda changed=changed: presence.apply(RuleSet([changed])))  # type: ignore[misc]

    @rule()
    def gets_another_target(self) -> None:
        presence = self.presence
        assert presence is not None
        self.targets += 1
        self.rule = self.rule.model_copy(update={"target": f"t{self.targets}"})
        self.surviving(lambda: presence.apply(RuleSet([self.rule])))

    @rule(point=crash_points, part=parts, again=st.none() | crash_points)
    def will_be_killed(self, point: int, part: float, again: int | None) -> None:
        self.disk.crash_after(point, part=part)
        self.crashes_again = again

    @rule()
    def is_killed(self) -> None:
        self.presence = None
        self.disk.kill()
        self.surviving(self.open)

    @rule()
    def is_restarted(self) -> None:
        def again() -> None:
            self.close()
            self.open()

        self.surviving(again)

    @precondition(lambda self: self.machine_restarts < 3)
    @rule()
    def the_machine_restarts(self) -> None:
        self.presence = None
        self.disk.kill()
        self.boots += 1
        self.machine_restarts += 1
        self.truth.clear()
        self.surviving(self.open)

    # -- what must be so in the end --

    def teardown(self) -> None:
        try:
            if self.presence is not None:
                self.disk.crash_after(None)
                for _ in range(4):
                    self.drain()
                    self.presence.watch()
                self.check()
        finally:
            with contextlib.suppress(Exception):
                self.close()
            self.stack.close()

    def check(self) -> None:
        events = [event for event in self.told if event["eventType"] != "disconnect"]
        times = Counter((event["eventType"], event["clientId"], event["channelId"]) for event in events)
        for (kind, client_id, channel), count in times.items():
            is_connected = self.truth.get(client_id) == channel
            if kind == "connect":
                assert 1 <= count <= 1 + self.targets + self.machine_restarts
                ends = times["tcpclean", client_id, channel]
                assert (ends == 0) if is_connected else (1 <= ends <= 1 + self.machine_restarts)
            else:
                assert times["connect", client_id, channel]
        for client_id, channel in self.truth.items():
            assert times["connect", client_id, channel]
        for client_id in CLIENTS:
            assert [event["seq"] for event in events if event["clientId"] == client_id] == sorted(
                event["seq"] for event in events if event["clientId"] == client_id
            )
            # No connection is told of before the end of the one before it.
            channels = [event["channelId"] for event in events if event["clientId"] == client_id]
            runs = [channel for at, channel in enumerate(channels) if at == 0 or channels[at - 1] != channel]
            assert len(runs) == len(set(runs))
        tracker = StatusTracker()
        for event in self.told:
            tracker.feed(event)
        assert tracker.online == self.truth.keys()


TestPresenceOverCrashes = PresenceOverCrashes.TestCase
TestPresenceOverCrashes.settings = searching(examples=60, steps=40)


@pytest.mark.parametrize("lives_on", [False, True])
def test_killed_at_every_step_and_again_at_every_step_of_the_start(*, lives_on: bool) -> None:
    """What the journal says of the last event must outlive a start that is killed too."""
    # Neither has more steps.
    for point, again in product(range(17), range(24)):
        states = PresenceOverCrashes()
        states.begin(lives_on=lives_on)
        states.will_be_killed(point=point, part=0.5, again=again)
        states.connects(client_id=CLIENTS[0])
        states.takes_over(client_id=CLIENTS[0])
        states.teardown()
