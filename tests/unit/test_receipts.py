"""Receipts on their way into the lane of their rule."""

import json
from pathlib import Path

from mq2mqtt.host import Outcome
from mq2mqtt.receipts import Receipt, ReceiptBook
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.telemetry import Direction, RuleTelemetry
from tests.waiting import until

TEXT = Receipt("id", "key").text()


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_they_are_synced_where_messages_are_to_survive_a_loss_of_power(tmp_path: Path) -> None:
    synced: list[int] = []
    machine = Machine(sync=synced.append)
    lane = Lane.open(tmp_path / "r.receipts", max_bytes=64 << 10, target="t", durability="power", machine=machine)
    reader = LaneReader(lane)
    book = ReceiptBook(node="n1")
    telemetry = RuleTelemetry("r.receipts", direction=Direction.UPLINK)
    book.attach("r", lane, telemetry)
    files = open_files()
    for number in range(1000):
        book.tell("r", Outcome.QUEUED, TEXT, client_id=f"c{number}", topic="devices/p2p/c")
        reader.settle([entry.offset for entry in reader.read(max_messages=1)])
        if number % 50 == 0:
            before = len(synced)
            await until(lambda before=before: len(synced) > before)  # type: ignore[misc]
    assert telemetry.outcomes["accepted"] == 1000
    await until(lambda: open_files() <= files + 2)
    reader.close()
    lane.close()


def test_a_client_id_makes_no_properties_of_its_own(tmp_path: Path) -> None:
    lane = Lane.open(tmp_path / "commands-in.receipts", max_bytes=1 << 20, target="t")
    book = ReceiptBook(node="n1")
    book.attach("commands-in", lane, RuleTelemetry("commands-in.receipts", direction=Direction.UPLINK))
    client_id = "a\x02TAGS\x01delivered"
    receipt = Receipt("7F00", "order-1").text()
    book.tell("commands-in", Outcome.QUEUED, receipt, client_id=client_id, topic="devices/a")
    reader = LaneReader(lane)
    (entry,) = reader.read(max_messages=1)
    pairs = [item.split("\x01") for item in entry.frame.properties.decode().split("\x02") if item]
    assert pairs == [
        ["TAGS", "queued"],
        ["KEYS", "order-1"],
        ["mq2mqttNode", "n1"],
        ["mqttTopic", "devices/a"],
        ["origMsgId", "7F00"],
    ]
    assert json.loads(entry.frame.payload)["clientId"] == client_id
    reader.close()
    lane.close()


def test_what_comes_before_the_lane_is_open_is_counted(tmp_path: Path) -> None:
    book = ReceiptBook(node="n1")
    telemetry = RuleTelemetry("r.receipts", direction=Direction.UPLINK)
    book.tell("r", Outcome.QUEUED, TEXT, client_id="c", topic="t")  # nobody wants any
    book.expect("r", telemetry)
    book.tell("r", Outcome.QUEUED, TEXT, client_id="c", topic="t")
    book.tell("r", Outcome.DROPPED, TEXT, client_id="c", topic="t")  # never told
    lane = Lane.open(tmp_path / "r.receipts", max_bytes=64 << 10, target="t")
    book.attach("r", lane, telemetry)
    book.tell("r", Outcome.QUEUED, TEXT, client_id="c", topic="t")
    book.detach("r")
    book.tell("r", Outcome.QUEUED, TEXT, client_id="c", topic="t")
    lane.close()
    assert telemetry.drops == {"lane_not_open": 1}
    assert telemetry.outcomes["accepted"] == 1
