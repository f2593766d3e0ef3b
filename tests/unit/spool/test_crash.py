"""A real process is killed while it appends, reads and settles."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.reader import LaneReader

# Says after each append that it is done, as a broker sends PUBACK; settles some on the way.
WRITER = """
import os, pathlib, sys
from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.frame import encode_publish
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.reader import LaneReader

lane = Lane.open(pathlib.Path(sys.argv[1]), max_bytes=20_000_000, target="t")
reader = LaneReader(lane)
number = int(sys.argv[2])
while True:
    payload = b"%d " % number + b"." * (number % 5000)
    offset = lane.append(encode_publish(MqttMessage("s/a", payload, client_id="d"), accepted_us=number))
    os.write(1, b"a %d %d\\n" % (offset, number))
    if number % 3 == 0:
        for entry in reader.read(max_messages=2):
            os.write(1, b"s %d %d\\n" % (entry.offset, entry.frame.accepted_us))
            reader.settle([entry.offset])
    number += 1
"""


def run_until_killed(lane: Path, *, first: int, lines: int) -> tuple[dict[int, int], dict[int, int]]:
    """Return what was reported as appended, and as about to be settled: offset -> number."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(lane), str(first)], stdout=subprocess.PIPE)
    output = process.stdout
    assert output is not None
    with output:
        text = b"".join(output.readline() for _ in range(lines))
        process.send_signal(signal.SIGKILL)
        text += drain(output)
        process.wait()
    appended: dict[int, int] = {}
    settled: dict[int, int] = {}
    for line in text.splitlines():
        kind, offset, number = line.split()
        (appended if kind == b"a" else settled)[int(offset)] = int(number)
    return appended, settled


def drain(output: IO[bytes]) -> bytes:
    """Return the whole lines that the process wrote before it died."""
    rest = output.read()
    return rest[: rest.rfind(b"\n") + 1]


@pytest.mark.parametrize("lines", [1, 50, 333, 1000, 1700])
def test_everything_reported_as_appended_is_read_back_in_order(lines: int, tmp_path: Path) -> None:
    path = tmp_path / "rule-a"
    appended: dict[int, int] = {}
    settled: dict[int, int] = {}
    for _ in range(3):
        new, done = run_until_killed(path, first=max(appended.values(), default=-1) + 1, lines=lines)
        assert not new.keys() & appended.keys()
        appended |= new
        settled |= done
    lane = Lane.open(path, max_bytes=20_000_000, target="t")
    reader = LaneReader(lane)
    read: dict[int, int] = {}
    while entries := reader.read(max_messages=5000):
        read |= {entry.offset: entry.frame.accepted_us for entry in entries}
        assert all(len(entry.frame.payload) > entry.frame.accepted_us % 5000 for entry in entries)
        reader.settle([entry.offset for entry in entries])
    # At most one append of each run was cut off before it could be reported.
    assert len(read.keys() - appended.keys()) <= 3
    assert list(read) == sorted(read)
    # Nothing was lost, and only what was being settled is read again.
    assert (appended.keys() - settled.keys()) <= read.keys()
    assert len(read.keys() & settled.keys()) <= 3
    assert all(read[offset] == appended[offset] for offset in read.keys() & appended.keys())
    assert lane.messages == 0
    reader.close()
    lane.close()
