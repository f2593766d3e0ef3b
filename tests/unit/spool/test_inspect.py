import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mq2mqtt.errors import LaneCorruptError
from mq2mqtt.spool.frame import Frame, FrameKind
from mq2mqtt.spool.inspect import LaneSummary, read_entries, summarize, summarize_all
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.parked import ParkedStore
from mq2mqtt.spool.reader import LaneReader
from tests.unit.spool.lanes import MACHINE, START_US, fill, frame_of, open_lane, segment_files

FRAME_BYTES = len(frame_of(0, payload_bytes=100))


def test_a_spool_at_a_glance(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    assert summarize_all(spool) == []
    lane = open_lane(spool, max_bytes=80 * FRAME_BYTES)
    reader = LaneReader(lane)
    fill(lane, 30, payload_bytes=100)
    reader.read(max_messages=13)
    reader.settle_to(START_US + 13)
    ParkedStore(lane.path, max_bytes=1000).append(
        Frame(FrameKind.PUBLISH, 0, 1, "d", "t", b"", b""), key="1", reason=""
    )
    ParkedStore(spool / "inbound", max_bytes=1000).append(
        Frame(FrameKind.ROCKETMQ, 0, 1, "", "t", b"", b""), key="1", reason=""
    )
    (spool / "instance").write_text("a file of the spool's")
    summaries = summarize_all(spool)
    assert summaries == [
        LaneSummary("inbound", "", parked=1),
        LaneSummary("rule-a", "mq_a", 17, 17 * FRAME_BYTES, START_US + 13, parked=1),
    ]
    # What an open lane says of itself is the same, and nothing was changed or locked.
    assert (lane.messages, lane.unsent_bytes, lane.oldest_us) == (17, 17 * FRAME_BYTES, START_US + 13)
    assert [entry.offset for entry in read_entries(lane.path)] == list(range(START_US + 13, START_US + 30))
    reader.close()
    lane.close()
    assert summarize_all(spool) == summaries


def test_an_empty_lane(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    assert summarize(lane.path) == LaneSummary("rule-a", "mq_a")
    assert list(read_entries(lane.path)) == []
    lane.close()


def test_a_write_under_way_is_not_damage(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    fill(lane, 2)
    data = lane.last.path.read_bytes()
    for part in range(len(frame_of(2))):
        lane.last.path.write_bytes(data + frame_of(2)[:part])
        assert summarize(lane.path).messages == len(list(read_entries(lane.path))) == 2
    lane.close()


def test_a_segment_that_just_begins_is_not_damage(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    fill(lane, 2)
    (lane.path / f"{START_US + 2:020d}.seg").write_bytes(b"mq2")
    assert summarize(lane.path).messages == len(list(read_entries(lane.path))) == 2
    lane.close()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_damage_is_shown_and_what_is_before_it_can_be_read(index: int, tmp_path: Path) -> None:
    this_boot = replace(MACHINE, boot_id=Machine().boot_id)
    lane = open_lane(tmp_path, max_bytes=80 * FRAME_BYTES, machine=this_boot)
    fill(lane, 25, payload_bytes=100)
    lane.close()
    path = segment_files(lane.path)[index]
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    entries = read_entries(lane.path)
    before = {0: 8, 1: 17, 2: 24}[index]
    assert [entry.offset for entry in itertools.islice(entries, before)] == list(range(START_US, START_US + before))
    with pytest.raises(LaneCorruptError, match=rf"{path}: byte \d+: CRC mismatch"):
        next(entries)


def test_what_is_wrong_with_a_lane_is_in_its_summary(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    fill(lane, 2)
    lane.close()
    (lane.path / "notes").write_text("")
    assert "notes: no file of a lane" in (summarize(lane.path).problem or "")
    (lane.path / "notes").unlink()
    (lane.path / "lane.json").write_text("{")
    assert "lane.json" in (summarize(lane.path).problem or "")
    (lane.path / "lane.json").unlink()
    assert summarize(lane.path).messages == 2


RUNNING = """
import pathlib, sys
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.frame import encode_publish

lane = Lane.open(pathlib.Path(sys.argv[1]), max_bytes=400_000, target="t")
reader = LaneReader(lane)
frame = encode_publish(MqttMessage("s/a", b"." * 500, client_id="d"), accepted_us=1)
print("running", flush=True)
while True:
    for _ in range(50):
        lane.append(frame)
    reader.settle([entry.offset for entry in reader.read(max_messages=50)])
"""


def test_looking_while_a_bridge_appends_and_deletes(tmp_path: Path) -> None:
    path = tmp_path / "rule-a"
    process = subprocess.Popen([sys.executable, "-c", RUNNING, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"running\n"
        try:
            for _ in range(100):
                summary = summarize(path)
                assert summary.problem is None or "No such file" in summary.problem
                offsets = [entry.offset for entry in read_entries(path)]
                assert offsets == sorted(set(offsets))
            assert process.poll() is None
        finally:
            process.kill()
            process.wait()
    assert summarize(path).problem is None
