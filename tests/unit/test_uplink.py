import asyncio
import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from loguru import logger

from mq2mqtt.errors import LaneError, LinkError, MessageRejectedError, NotConnectedError
from mq2mqtt.intake import LaneIntake
from mq2mqtt.link import Queue
from mq2mqtt.link.memory import MemoryCluster, MemoryLink
from mq2mqtt.message import MqttMessage, RocketMessage
from mq2mqtt.outlet import Outlet
from mq2mqtt.settings import SpoolSettings
from mq2mqtt.spool import lane as writing
from mq2mqtt.spool.frame import encode_publish
from mq2mqtt.spool.parked import list_parked
from mq2mqtt.telemetry import Direction, RuleTelemetry
from tests import waiting
from tests.unit.spool.followed import Pair

TOPIC = "mq_sensors"


class Link(MemoryLink):
    """A link that refuses what the test says, and knows how many sends a queue has at once."""

    def __init__(self, cluster: MemoryCluster | None = None) -> None:
        super().__init__(cluster=cluster)
        self.poison: set[bytes] = set()
        self.broken: set[int] = set()
        self.sizes: list[int] = []
        self.at_once: dict[Queue, int] = {}
        self.most_at_once = 0
        self.visible: tuple[int, ...] | None = None

    async def queues(self, topic: str) -> tuple[Queue, ...]:
        queues = await super().queues(topic)
        return queues if self.visible is None else tuple(queue for queue in queues if queue.queue_id in self.visible)

    async def send(self, queue: Queue, messages: Sequence[RocketMessage]) -> None:
        self.at_once[queue] = self.at_once.get(queue, 0) + 1
        self.most_at_once = max(self.most_at_once, self.at_once[queue])
        self.sizes.append(len(messages))
        try:
            await asyncio.sleep(0.001)
            if queue.queue_id in self.broken:
                raise NotConnectedError("broker away")
            if self.poison & {message.body for message in messages}:
                raise MessageRejectedError("illegal")
            await super().send(queue, messages)
        finally:
            self.at_once[queue] -= 1


class Lane:
    """An outlet under test."""

    def __init__(self, directory: Path, link: Link) -> None:
        self.link = link
        self.telemetry = RuleTelemetry("rule-1", direction=Direction.UPLINK)
        self.path = directory / "rule-1"
        self.intake = LaneIntake(telemetry=self.telemetry)
        lane = writing.Lane.open(self.path, max_bytes=1 << 30, target=TOPIC)
        self.outlet = Outlet(
            lane,
            target=TOPIC,
            node="n1",
            spool=SpoolSettings(path=directory),
            link=link,
            telemetry=self.telemetry,
        )
        self.intake.attach(lane)

    def publish(self, *bodies: bytes, client_id: str = "c1", topic: str = "sensors/x") -> None:
        for body in bodies:
            frame = encode_publish(MqttMessage(topic, body, 1, client_id=client_id), accepted_us=1)
            assert self.intake.accept(frame, qos=1) is None

    def stored(self) -> list[bytes]:
        return [message.body for queue in self.link.cluster.queues(TOPIC) for message in queue]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.outlet.uplink.run(), name="uplink under test")
        try:
            yield
        finally:
            self.outlet.uplink.finish()
            await asyncio.wait_for(task, 30)
            self.outlet.close()

    def check_sum(self) -> None:
        self.outlet.refresh_gauges()
        outcomes = self.telemetry.outcomes
        assert outcomes["accepted"] == outcomes["sent"] + outcomes["parked"] + self.telemetry.lane_messages


@pytest.fixture
async def link() -> Link:
    link = Link()
    await link.create_topic(TOPIC)
    return link


@pytest.fixture
def lane(tmp_path: Path, link: Link) -> Lane:
    return Lane(tmp_path, link)


until = functools.partial(waiting.until, seconds=60)


async def test_each_clients_messages_are_stored_in_order_one_batch_at_a_time(lane: Lane) -> None:
    for number in range(3000):
        lane.publish(b"%d" % number, client_id=f"c{number % 7}")
    async with lane.running():
        await until(lambda: len(lane.stored()) == 3000)
    for queue in lane.link.cluster.queues(TOPIC):
        for client in {message.properties["clientId"] for message in queue}:
            numbers = [int(message.body) for message in queue if message.properties["clientId"] == client]
            assert numbers == sorted(numbers)
            assert len(numbers) == len(range(int(client[1:]), 3000, 7))
    assert lane.link.most_at_once == 1
    assert max(lane.link.sizes) > 1
    lane.check_sum()


async def test_without_a_client_id_each_topics_messages_are_stored_in_order(lane: Lane) -> None:
    for number in range(700):
        lane.publish(b"%d" % number, client_id="", topic=f"sensors/t{number % 7}")
    async with lane.running():
        await until(lambda: len(lane.stored()) == 700)
    queues = [queue for queue in lane.link.cluster.queues(TOPIC) if queue]
    assert len(queues) > 1
    topics = [{message.properties["mqttSecondTopic"] for message in queue} for queue in queues]
    assert sum(len(names) for names in topics) == len(set().union(*topics)) == 7
    for queue in queues:
        assert not any("clientId" in message.properties for message in queue)
        for name in {message.properties["mqttSecondTopic"] for message in queue}:
            numbers = [int(message.body) for message in queue if message.properties["mqttSecondTopic"] == name]
            assert numbers == sorted(numbers)


async def test_keys_are_node_rule_and_offset(lane: Lane) -> None:
    lane.publish(b"a", b"b")
    async with lane.running():
        await until(lambda: len(lane.stored()) == 2)
    keys = [message.properties["KEYS"] for queue in lane.link.cluster.queues(TOPIC) for message in queue]
    first, second = (key.rpartition(":") for key in keys)
    assert first[0] == second[0] == "n1:rule-1"
    assert int(second[2]) == int(first[2]) + 1


async def test_an_illegal_message_is_parked_alone(lane: Lane) -> None:
    lane.link.poison = {b"42"}
    bodies = [b"%d" % number for number in range(100)]
    lane.publish(*bodies)
    async with lane.running():
        await until(lambda: lane.telemetry.outcomes["sent"] == 99)
        lane.check_sum()
    assert lane.stored() == [body for body in bodies if body != b"42"]
    (parked,) = list_parked(lane.path)
    assert (parked.frame.payload, parked.reason) == (b"42", "illegal")
    assert lane.telemetry.outcomes["parked"] == 1


async def test_a_message_rocketmq_cannot_carry_is_parked_in_its_place(lane: Lane) -> None:
    lane.publish(b"before")
    lane.publish(b"never", topic="sensors/\x01")
    lane.publish(b"after")
    async with lane.running():
        await until(lambda: lane.stored() == [b"before", b"after"])
    (parked,) = list_parked(lane.path)
    assert parked.frame.payload == b"never"
    assert "0x01" in parked.reason
    lane.check_sum()


async def test_nothing_is_lost_while_rocketmq_is_away_and_the_rule_says_so(lane: Lane) -> None:
    async with lane.running():
        await until(lambda: lane.telemetry.up)
        lane.link.fail_with(TOPIC, LinkError("busy"))
        lane.publish(*(b"%d" % number for number in range(50)))
        await until(lambda: not lane.telemetry.up)
        assert lane.telemetry.reason == "busy"
        lane.check_sum()
        lane.link.fail_with(TOPIC, None)
        await until(lambda: len(lane.stored()) == 50)
        assert lane.telemetry.up
    assert lane.stored() == [b"%d" % number for number in range(50)]
    lane.check_sum()


async def test_an_idle_rule_finds_out_by_itself(lane: Lane) -> None:
    async with lane.running():
        await until(lambda: lane.telemetry.up)
        lane.link.fail_with(TOPIC, LinkError("no broker"))
        await until(lambda: not lane.telemetry.up)
        lane.link.fail_with(TOPIC, None)
        await until(lambda: lane.telemetry.up)


async def test_an_idle_rule_is_up_again_when_its_lane_can_be_read_again(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lane.running():
        await until(lambda: lane.telemetry.up)
        with monkeypatch.context() as patch:
            patch.setattr(lane.outlet.lane, "look", _unreadable)
            await until(lambda: lane.telemetry.reason == "too many open files")
        await until(lambda: lane.telemetry.up)


def _unreadable() -> bool:
    raise LaneError("too many open files")


def test_a_message_that_came_just_before_the_writer_let_go_is_not_deleted(
    tmp_path: Path, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(tmp_path)
    telemetry = RuleTelemetry("rule-a", direction=Direction.UPLINK)
    spool = SpoolSettings(path=tmp_path)
    outlet = Outlet(pair.followed, target=TOPIC, node="n1", spool=spool, link=link, telemetry=telemetry)
    assert not outlet.is_empty
    is_released = pair.followed.is_released

    def after_the_last_message() -> bool:
        pair.writer.append(encode_publish(MqttMessage("sensors/x", b"last", 1), accepted_us=1))
        pair.writer.close()
        return is_released()

    with monkeypatch.context() as patch:
        patch.setattr(pair.followed, "is_released", after_the_last_message)
        assert not outlet.is_empty
    assert pair.followed.messages == 1
    outlet.close()
    pair.watcher.close()


async def test_one_broken_queue_does_not_hold_up_the_others(lane: Lane) -> None:
    lane.link.broken = {0}
    for number in range(200):
        lane.publish(b"%d" % number, client_id=f"c{number}")
    async with lane.running():
        await until(lambda: lane.telemetry.outcomes["sent"] > 100 and not any(lane.link.at_once.values()))
        assert not lane.link.cluster.queues(TOPIC)[0]
        assert not lane.telemetry.up
        lane.check_sum()
        lane.link.broken = set()
        await until(lambda: len(lane.stored()) == 200)
        await until(lambda: lane.telemetry.up)


async def test_when_queues_vanish_their_clients_move_and_keep_their_order(lane: Lane) -> None:
    lane.link.broken = {0, 1}
    for number in range(400):
        lane.publish(b"%d" % number, client_id=f"c{number % 20}")
    async with lane.running():
        await until(lambda: lane.telemetry.outcomes["sent"] > 0)
        lane.link.visible = (2, 3)
        await until(lambda: len(lane.stored()) == 400)
    for queue in lane.link.cluster.queues(TOPIC):
        for client in {message.properties["clientId"] for message in queue}:
            numbers = [int(message.body) for message in queue if message.properties["clientId"] == client]
            assert numbers == sorted(numbers)


async def test_what_was_not_sent_is_sent_by_the_next_process(tmp_path: Path, link: Link) -> None:
    first = Lane(tmp_path, link)
    first.publish(b"a", b"b", b"c")
    first.outlet.close()
    second = Lane(tmp_path, link)
    assert second.telemetry.outcomes["accepted"] == 3
    async with second.running():
        await until(lambda: second.stored() == [b"a", b"b", b"c"])
        second.check_sum()


async def test_cancelled_while_sending_nothing_is_counted_as_sent(lane: Lane) -> None:
    lane.link.broken = {0, 1, 2, 3}
    lane.publish(b"a", b"b")
    task = asyncio.create_task(lane.outlet.uplink.run(), name="uplink under test")
    await until(lambda: bool(lane.link.sizes))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0.02)
    assert lane.telemetry.in_flight == 0
    lane.check_sum()
    assert lane.telemetry.lane_messages == 2
    lane.outlet.close()


async def test_a_bug_while_sending_stops_nothing(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    right = lane.link.send

    async def wrong(queue: Queue, messages: Sequence[RocketMessage]) -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise ZeroDivisionError
        await right(queue, messages)

    monkeypatch.setattr(lane.link, "send", wrong)
    lane.publish(b"a")
    async with lane.running():
        await until(lambda: lane.stored() == [b"a"])
        await until(lambda: lane.telemetry.up)


async def test_another_target_gets_what_waits_after_what_is_in_flight_has_its_answer(lane: Lane) -> None:
    other = "mq_other"
    await lane.link.create_topic(other, queues=2)
    lane.link.broken = {0, 1, 2, 3}
    for number in range(200):
        lane.publish(b"%d" % number, client_id=f"c{number % 5}")
    async with lane.running():
        await until(lambda: bool(lane.link.sizes))
        lane.outlet.uplink.retarget("mq_nowhere")
        await until(lambda: "mq_nowhere" in (lane.telemetry.reason or ""))
        lane.link.broken = set()
        lane.outlet.uplink.retarget(other)
        await until(lambda: lane.telemetry.outcomes["sent"] == 200)
        await until(lambda: lane.telemetry.up)
    assert lane.stored() == []
    queues = lane.link.cluster.queues(other)
    assert {message.topic for queue in queues for message in queue} == {other}
    for queue in queues:
        for client in {message.properties["clientId"] for message in queue}:
            numbers = [int(message.body) for message in queue if message.properties["clientId"] == client]
            assert numbers == sorted(numbers)
    assert sum(map(len, queues)) == 200
    lane.check_sum()


async def test_two_changes_of_the_target_while_a_batch_is_in_flight_send_nothing_to_the_first(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    for topic in ("mq_second", "mq_third"):
        await lane.link.create_topic(topic)
    answer = asyncio.Event()
    right = lane.link.send

    async def slow(queue: Queue, messages: Sequence[RocketMessage]) -> None:
        await answer.wait()
        await right(queue, messages)

    monkeypatch.setattr(lane.link, "send", slow)
    lane.publish(b"in flight")
    async with lane.running():
        await until(lambda: lane.telemetry.in_flight == 1)
        lane.publish(b"waits")
        lane.outlet.uplink.retarget("mq_second")
        await asyncio.sleep(0.05)
        lane.outlet.uplink.retarget("mq_third")
        answer.set()
        await until(lambda: lane.telemetry.outcomes["sent"] == 2)
    assert lane.stored() == [b"in flight"]
    assert not any(lane.link.cluster.queues("mq_second"))
    assert [m.body for queue in lane.link.cluster.queues("mq_third") for m in queue] == [b"waits"]


async def test_a_rule_sleeps_while_its_proof_is_under_way(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asyncio.Event()
    answer = asyncio.Event()
    steps = 0
    queues = lane.link.queues

    async def slow_probe(_topic: str) -> None:
        asked.set()
        await answer.wait()

    async def counted_queues(topic: str) -> tuple[Queue, ...]:
        nonlocal steps
        steps += 1
        return await queues(topic)

    monkeypatch.setattr(lane.link, "probe", slow_probe)
    monkeypatch.setattr(lane.link, "queues", counted_queues)
    async with lane.running():
        await asked.wait()
        before = steps
        await asyncio.sleep(0.3)
        assert steps == before
        answer.set()
        await until(lambda: lane.telemetry.up)


async def test_what_lies_before_a_damaged_message_is_stored_and_the_damage_is_logged_once(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mq2mqtt.uplink._BACKOFF_FIRST", 0.01)
    monkeypatch.setattr("mq2mqtt.uplink._BACKOFF_MAX", 0.02)
    lane.link.visible = (0,)
    lane.publish(*(b"%d" % number for number in range(2000)))
    segment = max(lane.path.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(segment.read_bytes())
    data[-10] ^= 0xFF
    segment.write_bytes(data)
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), format="{message}", level="ERROR")
    async with lane.running():
        await until(lambda: len(lane.stored()) == 1999)
        # Many more attempts to read on.
        await asyncio.sleep(0.5)
        assert not lane.telemetry.up
        assert segment.name in (lane.telemetry.reason or "")
    logger.remove(sink)
    assert len(lines) == 1
    assert segment.name in lines[0]


async def test_with_more_queues_than_messages_ahead_no_batch_is_empty(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mq2mqtt.uplink.MAX_AHEAD", 4)
    lane.publish(*(b"%d" % number for number in range(1000)))
    async with lane.running():
        await until(lambda: len(lane.stored()) == 1000)
    assert min(lane.link.sizes) > 0


async def test_the_old_topics_probe_proves_nothing_of_the_new_one(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "mq_other"
    await lane.link.create_topic(other)
    answers = {TOPIC: asyncio.Event(), other: asyncio.Event()}
    asked: list[str] = []

    async def slow_probe(topic: str) -> None:
        asked.append(topic)
        await answers[topic].wait()

    monkeypatch.setattr(lane.link, "probe", slow_probe)
    async with lane.running():
        await until(lambda: asked == [TOPIC])
        lane.outlet.retarget(other)
        answers[TOPIC].set()
        # The new topic is asked at once; the old one's answer has been looked at by then.
        await until(lambda: asked == [TOPIC, other])
        assert not lane.telemetry.up
        answers[other].set()
        await until(lambda: lane.telemetry.up)


async def test_a_late_batch_to_the_old_topic_proves_nothing_of_the_new_one(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = asyncio.Event()
    right = lane.link.send

    async def slow(queue: Queue, messages: Sequence[RocketMessage]) -> None:
        await answer.wait()
        await right(queue, messages)

    monkeypatch.setattr(lane.link, "send", slow)
    ups: list[object] = []
    monkeypatch.setattr(lane.telemetry, "rule_up", ups.append)
    lane.publish(b"in flight")
    async with lane.running():
        await until(lambda: lane.telemetry.in_flight == 1)
        lane.outlet.retarget("mq_nowhere")
        answer.set()
        await until(lambda: "mq_nowhere" in (lane.telemetry.reason or ""))
    assert lane.stored() == [b"in flight"]
    assert ups == []


async def test_messages_that_come_closely_wait_for_each_other(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq2mqtt.uplink._LINGER_SECONDS", 3600)
    monkeypatch.setattr("mq2mqtt.uplink._CLOSE_SECONDS", 0)
    monkeypatch.setattr("mq2mqtt.uplink._CLOSE_MESSAGES", -1)
    async with lane.running():
        lane.publish(b"x")
        await until(lambda: lane.link.sizes == [1] and not lane.telemetry.in_flight)
        for _ in range(31):
            lane.publish(b"x")
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert lane.link.sizes == [1]
        lane.publish(b"x")
        await until(lambda: lane.link.sizes == [1, 32])


async def test_messages_that_do_not_come_closely_are_sent_at_once(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq2mqtt.uplink._LINGER_SECONDS", 3600)
    async with lane.running():
        for sizes in ([1], [1, 2], [1, 2, 2], [1, 2, 2, 1]):
            lane.publish(*[b"x"] * sizes[-1])
            await until(lambda sizes=sizes: lane.link.sizes == sizes and not lane.telemetry.in_flight)  # type: ignore[misc]
            # Two at once are few in a while.
            await asyncio.sleep(0.11)


async def test_what_is_collected_is_sent_when_its_time_is_over(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq2mqtt.uplink._LINGER_SECONDS", 0.3)
    monkeypatch.setattr("mq2mqtt.uplink._CLOSE_MESSAGES", -1)
    async with lane.running():
        lane.publish(b"1", b"2")
        await until(lambda: lane.link.sizes == [2])
        lane.publish(b"3")
        await until(lambda: lane.link.sizes == [2, 1])
