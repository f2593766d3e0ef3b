"""The hook's C and the spool's Python write the same bytes, and read them alike."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt.spool import frame as codec
from mq2mqtt.spool.frame import LEGAL_FLAGS, Frame, encode
from tests.thorough import searching
from tests.unit.hook.driver import Driver, fields_of

DATA = Path(__file__).parents[2] / "data"
FRAMES: list[dict[str, Any]] = json.loads((DATA / "frames_v1.json").read_text("utf-8"))
LANES: dict[str, list[dict[str, Any]]] = json.loads((DATA / "lane_v1.json").read_text("utf-8"))


def name_of(vector: dict[str, Any]) -> str:
    return str(vector["name"])


@pytest.mark.parametrize("vector", FRAMES, ids=name_of)
def test_a_golden_frame(vector: dict[str, Any], driver: Driver) -> None:
    flags = vector["qos"] | vector["retain"] << 2 | vector["clean_session"] << 3 | vector["will"] << 4
    fields = (vector[f"{field}_hex"] or "-" for field in ("client_id", "topic", "properties", "payload"))
    assert driver.ask("frame", vector["kind"], flags, vector["accepted_us"], *fields) == vector["frame_hex"]
    size = len(vector["frame_hex"]) // 2
    assert driver.ask("look", vector["frame_hex"], 0) == f"sound {size}"
    assert driver.ask("look", vector["frame_hex"][:-2], 0) == "cut"


@pytest.mark.parametrize("vector", LANES["segments"], ids=name_of)
def test_a_golden_segment_header(vector: dict[str, Any], driver: Driver) -> None:
    fields = (vector[field] for field in ("base", "created_us", "previous_base", "previous_end", "previous_bytes"))
    assert driver.ask("header", *fields, vector["boot_id_hex"]) == vector["header_hex"]


@pytest.mark.parametrize("vector", LANES["cursors"], ids=name_of)
def test_a_golden_cursor(vector: dict[str, Any], driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "cursor").write_bytes(bytes.fromhex(vector["slot_hex"]))
    expected = f"{vector['offset']} {vector['segment']} {vector['position']}"
    assert driver.ask("cursor", tmp_path, vector["created_us"]) == expected
    assert driver.ask("cursor", tmp_path, vector["created_us"] + 1) == "none"
    # Of two slots the one with the greater offset counts; a damaged one never.
    older = bytes.fromhex(LANES["cursors"][0]["slot_hex"])
    newer = bytearray.fromhex(LANES["cursors"][1]["slot_hex"])
    (tmp_path / "cursor").write_bytes(newer.ljust(512, b"\0") + older)
    at = LANES["cursors"][1]
    assert driver.ask("cursor", tmp_path, at["created_us"]).startswith(str(at["offset"]))
    newer[30] ^= 1
    (tmp_path / "cursor").write_bytes(newer.ljust(512, b"\0") + older)
    assert driver.ask("cursor", tmp_path, at["created_us"]).startswith(str(LANES["cursors"][0]["offset"]))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
frames = st.builds(
    Frame,
    st.integers(1, 4),
    st.sampled_from(LEGAL_FLAGS),
    st.integers(0, 2**64 - 1),
    texts,
    texts,
    st.binary(max_size=30),
    st.binary(max_size=300),
)


def test_any_frame(driver: Driver) -> None:
    @searching(300)
    @given(frame=frames)
    def search(frame: Frame) -> None:
        assert driver.ask("frame", *fields_of(frame)) == encode(frame).hex()

    search()


def test_any_damage_of_a_frame_is_judged_alike(driver: Driver) -> None:
    @searching(500)
    @given(frame=frames, at=st.integers(0, 400), flip=st.integers(0, 255), cut=st.integers(0, 400))
    def search(frame: Frame, at: int, flip: int, cut: int) -> None:
        data = bytearray(b"front" + encode(frame))
        data[5 + at % (len(data) - 5)] ^= flip
        whole = bytes(data[: max(5, len(data) - cut)] if flip % 2 else data)
        end = codec.frame_end(whole, 5)
        expected = f"sound {end}" if end is not None else "cut" if codec.problem_at(whole, 5) is None else "broken"
        found = driver.ask("look", whole.hex(), 5)
        assert (found if found == "cut" or found.startswith("sound") else "broken") == expected

    search()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "mqtt"),
        (b"a/b", "topic"),
        ("\u00e9/\u20ac/\U0001f600".encode(), "topic"),
        (b"a\0b", "none"),
        (b"a/+/b", "mqtt"),
        (b"#", "mqtt"),
        (b"\xc0\x80", "none"),
        (b"\xed\xa0\x80", "none"),
        (b"\xf4\x90\x80\x80", "none"),
        (b"\xe2\x82", "none"),
        (b"x" * 65535, "topic"),
        (b"x" * 65536, "none"),
    ],
    ids=repr,
)
def test_what_a_topic_is(data: bytes, expected: str, driver: Driver) -> None:
    assert driver.ask("text", data.hex() or "-") == expected
