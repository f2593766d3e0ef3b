"""Golden bytes of the files around the frames, shared with other writers."""

import json
from pathlib import Path
from typing import Any

import pytest

from mq2mqtt.errors import LaneCorruptError
from mq2mqtt.spool.cursor import CursorFile, Head, read_cursor
from mq2mqtt.spool.segment import HEADER_BYTES, SegmentHeader, segment_name

_VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[2] / "data/lane_v1.json").read_text("utf-8")
)
SLOT_BYTES = 512


@pytest.mark.parametrize("vector", _VECTORS["segments"], ids=lambda vector: str(vector["name"]))
def test_segment_header(vector: dict[str, Any]) -> None:
    header = SegmentHeader(
        vector["base"],
        vector["created_us"],
        vector["previous_base"],
        vector["previous_end"],
        vector["previous_bytes"],
        bytes.fromhex(vector["boot_id_hex"]),
    )
    assert header.pack().hex() == vector["header_hex"]
    name = Path(segment_name(vector["base"]))
    assert SegmentHeader.unpack(bytes.fromhex(vector["header_hex"]) + b"frames", name) == header


@pytest.mark.parametrize("vector", _VECTORS["cursors"], ids=lambda vector: str(vector["name"]))
def test_cursor_slot(vector: dict[str, Any], tmp_path: Path) -> None:
    head = Head(vector["offset"], vector["segment"], vector["position"])
    file = CursorFile(tmp_path, vector["created_us"])
    file.store(head)
    file.close()
    assert (tmp_path / "cursor").read_bytes().hex() == vector["slot_hex"]
    assert read_cursor(tmp_path, vector["created_us"]) == (head, None)


@pytest.mark.parametrize("position", range(HEADER_BYTES))
def test_every_damaged_byte_of_a_header_shows(position: int) -> None:
    damaged = bytearray.fromhex(_VECTORS["segments"][0]["header_hex"])
    damaged[position] ^= 0x10
    with pytest.raises(LaneCorruptError, match=r"x\.seg: byte "):
        SegmentHeader.unpack(bytes(damaged), Path("x.seg"))


def test_a_renamed_segment_shows() -> None:
    with pytest.raises(LaneCorruptError, match="give it that name back"):
        SegmentHeader.unpack(bytes.fromhex(_VECTORS["segments"][0]["header_hex"]), Path(segment_name(7)))


@pytest.mark.parametrize("cut", range(49))
def test_a_torn_write_of_the_cursor_costs_one_step_at_most(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "cursor"
    file = CursorFile(tmp_path, 1)
    file.store(Head(10, 1, 80))
    file.store(Head(20, 1, 90))
    before = path.read_bytes()
    file.store(Head(30, 1, 100))
    file.close()
    after = path.read_bytes()
    # The third write, over the first slot, stopped after `cut` bytes.
    torn = after[:cut] + before[cut:]
    path.write_bytes(torn)
    assert read_cursor(tmp_path, 1) == (Head(30, 1, 100) if torn == after else Head(20, 1, 90), None)


def test_a_cursor_with_both_slots_damaged_is_reported_and_ignored(tmp_path: Path) -> None:
    file = CursorFile(tmp_path, 1)
    file.store(Head(10, 1, 80))
    file.store(Head(20, 1, 90))
    file.close()
    path = tmp_path / "cursor"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    data[SLOT_BYTES + 20] ^= 1
    path.write_bytes(data)
    head, remark = read_cursor(tmp_path, 1)
    assert head is None
    assert remark is not None
    assert str(path) in remark


def test_a_lane_whose_writer_was_killed_before_it_settled_anything_is_no_damage(tmp_path: Path) -> None:
    CursorFile(tmp_path, 1).close()
    assert read_cursor(tmp_path, 1) == (None, None)


def test_a_cursor_of_another_lane_is_ignored(tmp_path: Path) -> None:
    file = CursorFile(tmp_path, 1)
    file.store(Head(10, 1, 80))
    file.close()
    head, remark = read_cursor(tmp_path, 2)
    assert head is None
    assert remark is not None
