"""A lane against a model of it, over crashes: `kill -9` and power cuts, between and within its changes to the disk."""

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loguru import logger

from mq2mqtt.errors import LaneFullError
from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.frame import encode_publish
from mq2mqtt.spool.inspect import read_entries, summarize
from mq2mqtt.spool.lane import Durability, Lane
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.parked import ParkedStore, list_parked
from mq2mqtt.spool.reader import Entry, LaneReader
from tests.thorough import searching
from tests.unit.spool.disk import Crash, Disk
from tests.unit.spool.lanes import START_US

MAX_BYTES = 16 * 1024
TARGETS = ("mq_a", "mq_b")
# Several in a sector; about one; over a segment, which is 2 KiB.
PAYLOAD_BYTES = (0, 30, 450, 700, 2500)

sizes = st.sampled_from(PAYLOAD_BYTES)
crash_points = st.integers(0, 6)
parts = st.sampled_from((0.0, 0.01, 0.5, 0.99))


def frame_of(number: int, payload_bytes: int) -> bytes:
    payload = (b"%d " % number).ljust(payload_bytes, b".")
    return encode_publish(MqttMessage("sensors/a", payload, client_id="dev"), accepted_us=number)


class Clock:
    """The machine's; after a power cut it may start in the past."""

    def __init__(self) -> None:
        self.now = START_US

    def __call__(self) -> int:
        self.now += 1
        return self.now


class LaneOverCrashes(RuleBasedStateMachine):
    """What the model knows is what a publisher and RocketMQ know: acknowledgements, and what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        root = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.disk = Disk(root)
        self.stack.enter_context(self.disk.recording())
        logger.disable("mq2mqtt")
        self.stack.callback(logger.enable, "mq2mqtt")
        self.loop = asyncio.new_event_loop()
        # A crash within a sync ends its task with an exception that nobody is left to see.
        self.loop.set_exception_handler(lambda *_: None)
        self.stack.callback(self.loop.close)
        self.path = root / "var" / "spool" / "rule-a"
        self.clock = Clock()
        self.boots = 1
        self.boot_is_known = True
        self.target = TARGETS[0]
        self.lost_power = False
        """Whether power was cut since the model last looked."""
        self.lane: Lane | None = None
        self.reader: LaneReader | None = None
        self.created_us: int | None = None

        self.next_number = 0
        self.sizes: dict[int, int] = {}
        """Payload bytes by number of a message."""
        self.written: dict[int, int] = {}
        """Offset -> number: what `append` took and no crash may yet have taken."""
        self.fresh: set[int] = set()
        """Offsets of those that this process appended: they wait for an acknowledgement."""
        self.committed: set[int] = set()
        """Those that were acknowledged with `durability: power`."""
        self.uncertain: set[int] = set()
        """Numbers whose `append` a crash interrupted."""
        self.history: dict[int, int] = {}
        """Offset -> number: every message that the lane ever took."""
        self.gone: set[int] = set()
        """Offsets of messages that a power cut has taken."""
        self.unsettled: dict[int, Entry] = {}
        """Read, and not settled."""
        self.settled: set[int] = set()
        self.parked: dict[int, int] = {}
        """Offset -> number."""

    @initialize(durability=st.sampled_from(("process", "power")), boot_is_known=st.booleans())
    def begin(self, durability: Durability, boot_is_known: bool) -> None:  # noqa: FBT001 - drawn
        self.durability = durability
        self.boot_is_known = boot_is_known
        self.open()

    def machine(self) -> Machine:
        boot_id = bytes([self.boots % 256]) * 16 if self.boot_is_known else bytes(16)
        return Machine(now_us=self.clock, boot_id=boot_id, sync=self.disk.sync)

    def open(self) -> None:
        self.lane = Lane.open(
            self.path, max_bytes=MAX_BYTES, target=self.target, durability=self.durability, machine=self.machine()
        )
        self.reader = LaneReader(self.lane)
        assert self.created_us in {None, self.lane.info.created_us}
        self.created_us = self.lane.info.created_us

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
        if self.lane is not None:
            self.lane.close()
        self.reader = self.lane = None

    @property
    def up(self) -> tuple[Lane, LaneReader]:
        assert self.lane is not None
        assert self.reader is not None
        return self.lane, self.reader

    # -- what a bridge does --

    def do_append(self, payload_bytes: int) -> bool:
        """Return whether the lane took it."""
        lane, _ = self.up
        number = self.next_number
        self.next_number += 1
        self.sizes[number] = payload_bytes
        frame = frame_of(number, payload_bytes)
        self.uncertain.add(number)
        try:
            offset = lane.append(frame)
        except LaneFullError:
            assert lane.unsent_bytes + len(frame) > MAX_BYTES
            self.uncertain.discard(number)
            return False
        self.uncertain.discard(number)
        assert offset > max(self.history, default=0)
        self.written[offset] = self.history[offset] = number
        self.fresh.add(offset)
        return True

    def do_commit(self, meanwhile: list[int]) -> None:
        """Wait as publishers do; `meanwhile`, while the disk is at it, others come."""
        if self.durability == "power":
            self.loop.run_until_complete(self.commit(meanwhile))

    async def commit(self, meanwhile: list[int]) -> None:
        lane, _ = self.up
        covered = set(self.fresh)
        first = lane.durable()
        if first is not None:
            started, go_on = threading.Event(), threading.Event()

            def syncing() -> None:
                started.set()
                go_on.wait()

            self.disk.syncing = syncing
            try:
                await self.until(lambda: started.is_set() or first.done())
                for payload_bytes in meanwhile:
                    self.do_append(payload_bytes)
            finally:
                self.disk.syncing = None
                go_on.set()
                await self.until(first.done)
            first.result()
        self.committed |= covered
        covered = set(self.fresh)
        if (second := lane.durable()) is not None:
            await self.until(second.done)
            second.result()
        self.committed |= covered

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self.disk.crashed:
                raise Crash
            await asyncio.sleep(0)

    def do_settle(self, offsets: list[int], *, park: bool) -> None:
        """Send or park messages that were read."""
        lane, reader = self.up
        if park:
            store = ParkedStore(lane.path, max_bytes=1 << 30, durability=self.durability, machine=self.machine())
            for offset in offsets:
                store.append(self.unsettled[offset].frame, key=str(offset), reason="why")
                self.parked[offset] = self.written[offset]
        self.settled.update(offsets)
        for offset in offsets:
            del self.unsettled[offset]
        reader.settle(offsets)

    def do_read(self, count: int) -> None:
        _, reader = self.up
        for entry in reader.read(max_messages=count):
            self.check(entry)
            self.unsettled[entry.offset] = entry

    def check(self, entry: Entry) -> None:
        """See that a message is the one that was written there, whole."""
        number = self.history[entry.offset]
        assert entry.frame.accepted_us == number
        assert entry.frame.payload == (b"%d " % number).ljust(self.sizes[number], b".")

    def do_retarget(self) -> None:
        lane, _ = self.up
        self.target = TARGETS[1 - TARGETS.index(self.target)]
        lane.retarget(self.target)

    # -- rules --

    @rule(payload_bytes=sizes, count=st.integers(1, 12))
    def append(self, payload_bytes: int, count: int) -> None:
        for _ in range(count):
            self.do_append(payload_bytes)

    @rule(meanwhile=st.lists(sizes, max_size=4))
    def commit_all(self, meanwhile: list[int]) -> None:
        self.do_commit(meanwhile)

    @rule(payload_bytes=sizes)
    def fill(self, payload_bytes: int) -> None:
        while self.do_append(payload_bytes):
            pass
        assert self.up[0].full

    @rule(count=st.integers(1, 30))
    def read(self, count: int) -> None:
        self.do_read(count)

    @precondition(lambda self: self.unsettled)
    @rule(data=st.data(), park=st.booleans())
    def settle(self, data: st.DataObject, park: bool) -> None:  # noqa: FBT001 - drawn
        self.do_settle(self.some_unsettled(data), park=park)

    def some_unsettled(self, data: st.DataObject) -> list[int]:
        offsets = list(self.unsettled)
        if data.draw(st.booleans()):
            return offsets[: data.draw(st.integers(1, len(offsets)))]
        return data.draw(st.lists(st.sampled_from(offsets), unique=True, max_size=8))

    @rule()
    def drain(self) -> None:
        lane, _ = self.up
        self.do_settle(list(self.unsettled), park=False)
        while lane.messages:
            self.do_read(100)
            self.do_settle(list(self.unsettled), park=False)
        assert lane.unsent_bytes == 0
        assert not lane.full

    @rule()
    def retarget(self) -> None:
        self.do_retarget()

    @rule()
    def restart(self) -> None:
        self.close()
        self.open()
        self.check_what_is_there(self.written)

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        self.disk.crashed = True
        self.recover(data)

    @rule(
        data=st.data(),
        after=crash_points,
        part=parts,
        action=st.sampled_from(("append", "commit", "settle", "park", "retarget")),
    )
    def crash_within(self, data: st.DataObject, after: int, part: float, action: str) -> None:
        offsets = self.some_unsettled(data) if self.unsettled and action in {"settle", "park"} else []
        payload_bytes = data.draw(sizes)
        self.disk.crash_after(after, part=part)
        try:
            if action == "append":
                while self.do_append(payload_bytes):
                    pass
            elif action == "commit":
                self.do_append(payload_bytes)
                self.do_commit([payload_bytes] * 3)
            elif action == "retarget":
                self.do_retarget()
            else:
                self.do_settle(offsets, park=action == "park")
        except Crash:
            pass
        self.disk.crashed = True
        self.recover(data)

    def recover(self, data: st.DataObject) -> None:
        """Open again; crash a few times while that is done."""
        for _ in range(data.draw(st.integers(0, 2))):
            self.stop(data)
            self.disk.crash_after(data.draw(crash_points), part=data.draw(parts))
            with contextlib.suppress(Crash):
                self.open()
            self.disk.crashed = True
        power_was_cut = self.stop(data)
        seen = None
        if self.path.is_dir():
            summary = summarize(self.path)
            assert summary.problem is None
            seen = summary.messages
            assert len(list(read_entries(self.path))) == seen
        self.open()
        assert seen in {None, self.up[0].messages}
        required = self.committed if power_was_cut else set(self.written)
        self.check_what_is_there(required)

    def stop(self, data: st.DataObject) -> bool:
        """End the process; return whether that was by a power cut, now or since the model last looked."""
        self.close()
        if data.draw(st.booleans()):
            self.boots += 1
            self.clock.now += data.draw(st.sampled_from((10**9, 0, -(10**9))))
            self.lost_power = True
            self.disk.cut_power(lambda low, high: data.draw(st.integers(low, high)) if high > low else low)
        else:
            self.disk.kill()
        return self.lost_power

    def check_what_is_there(self, required: set[int] | dict[int, int]) -> None:
        """Compare what was found with what must be; forget what a power cut was free to take."""
        lane, reader = self.up
        found: dict[int, Entry] = {}
        position = reader.cursor
        for entry in read_entries(self.path):
            assert entry.offset >= position
            position = entry.offset + 1
            if entry.offset not in self.history:
                assert entry.frame.accepted_us in self.uncertain
                assert entry.offset > max(self.history, default=0)
                self.history[entry.offset] = entry.frame.accepted_us
            self.check(entry)
            found[entry.offset] = entry
        numbers = [self.history[offset] for offset in found]
        assert numbers == sorted(numbers)
        lost = self.written.keys() - found.keys() - self.settled
        assert not lost & set(required)
        self.gone |= lost
        assert not self.gone & found.keys()
        if not self.lost_power:
            assert not [offset for offset in found if offset in self.settled and offset < self.first_unsettled()]
        assert lane.messages == len(found)
        assert lane.unsent_bytes == sum(len(frame_of(number, self.sizes[number])) for number in numbers)
        if self.durability == "power" or not self.lost_power:
            # Those that are damaged were parked before a power cut, with `durability: process`.
            found_parked = list_parked(self.path, on_damage=lambda _: None)
            listed = {int(message.key): message.frame.accepted_us for message in found_parked}
            assert self.parked.items() <= listed.items()
        else:
            self.parked.clear()
        self.unsettled.clear()
        self.uncertain.clear()
        self.fresh.clear()
        self.written = {offset: self.history[offset] for offset in found}
        self.committed &= found.keys()
        self.settled.clear()
        self.lost_power = False

    def first_unsettled(self) -> int:
        return min((offset for offset in self.written if offset not in self.settled), default=1 << 63)

    @invariant()
    def counts_agree(self) -> None:
        if self.lane is not None:
            assert self.lane.messages == len(self.written.keys() - self.settled)

    def teardown(self) -> None:
        self.close()
        self.stack.close()


TestLaneOverCrashes = LaneOverCrashes.TestCase
TestLaneOverCrashes.settings = searching(60, steps=30)
