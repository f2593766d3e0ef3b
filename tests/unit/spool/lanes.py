"""What the spool's tests share: messages, and a machine with a clock and a boot id of the test's own."""

from dataclasses import replace
from pathlib import Path

from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.frame import encode_publish
from mq2mqtt.spool.lane import Durability, Lane
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.reader import LaneReader

START_US = 1_700_000_000_000_000
MACHINE = Machine(now_us=lambda: START_US, boot_id=b"b" * 16)
REBOOTED = replace(MACHINE, boot_id=b"c" * 16)


def frame_of(number: int, *, payload_bytes: int = 0) -> bytes:
    payload = b"%d " % number
    return encode_publish(
        MqttMessage("sensors/a", payload.ljust(payload_bytes, b"."), client_id="dev"), accepted_us=START_US + number
    )


def open_lane(
    spool: Path, *, max_bytes: int = 1 << 20, durability: Durability = "process", machine: Machine = MACHINE
) -> Lane:
    return Lane.open(spool / "rule-a", max_bytes=max_bytes, target="mq_a", durability=durability, machine=machine)


def fill(lane: Lane, count: int, *, first: int = 0, payload_bytes: int = 0) -> list[int]:
    return [lane.append(frame_of(number, payload_bytes=payload_bytes)) for number in range(first, first + count)]


def numbers(reader: LaneReader, *, max_messages: int = 10_000) -> list[int]:
    """Read on; return what `frame_of` was called with."""
    return [int(entry.frame.payload.rstrip(b".")) for entry in reader.read(max_messages=max_messages)]


def segment_files(lane: Path) -> list[Path]:
    return sorted(lane.glob("*.seg"))
