import os
from pathlib import Path

import pytest

from mq2mqtt.errors import LaneCorruptError, LaneError, LaneFullError
from mq2mqtt.spool.frame import Frame, FrameKind, encode
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.parked import ParkedStore, count_parked, list_parked
from tests.unit.spool.lanes import fill, open_lane

FRAME = Frame(FrameKind.PUBLISH, 1, 5, "dev", "sensors/a", b"\x02\0\0\0\1", b"body")


class Clock:
    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> int:
        self.now += 1
        return self.now


def store_in(lane: Path, *, max_bytes: int = 1 << 20) -> ParkedStore:
    return ParkedStore(lane, max_bytes=max_bytes, machine=Machine(now_us=Clock()))


def test_what_is_parked_is_listed_oldest_first_as_it_was(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    assert (store.count, list_parked(tmp_path), count_parked(tmp_path)) == (0, [], 0)
    store.append(FRAME, key="9", reason="too large: é")
    store.append(FRAME._replace(payload=b"2", kind=FrameKind.ROCKETMQ), key="broker/a-1-5", reason="")
    first, second = list_parked(tmp_path)
    assert (first.key, first.reason, first.parked_us, first.frame) == ("9", "too large: é", 1001, FRAME)
    assert (second.key, second.reason, second.frame.payload) == ("broker/a-1-5", "", b"2")
    assert (store.count, count_parked(tmp_path)) == (2, 2)
    assert (tmp_path / "parked").stat().st_mode & 0o777 == 0o700


def test_the_same_key_again_replaces_the_record(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.append(FRAME, key="9", reason="first")
    store.append(FRAME, key="9", reason="again")
    assert [message.reason for message in list_parked(tmp_path)] == ["again"]
    assert store.count == 1


def test_another_process_may_drop_one(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.append(FRAME, key="1", reason="")
    store.append(FRAME, key="2", reason="")
    # Far from the last change, whatever the file system's clock ticks like.
    os.utime(tmp_path / "parked", ns=(1, 1))
    assert store.count == 2
    list_parked(tmp_path)[0].path.unlink()
    assert store.count == 1
    assert [message.key for message in list_parked(tmp_path)] == ["2"]
    list_parked(tmp_path)[0].path.unlink()
    (tmp_path / "parked").rmdir()
    assert store.count == 0


def test_when_it_is_full_the_oldest_make_room(tmp_path: Path) -> None:
    store = store_in(tmp_path, max_bytes=8 * 1000)
    dropped = [store.append(FRAME._replace(payload=b"." * 200), key=str(number), reason="") for number in range(3)]
    assert dropped == [0, 0, 0]
    assert store.append(FRAME._replace(payload=b"." * 500), key="3", reason="") == 2
    assert [message.key for message in list_parked(tmp_path)] == ["2", "3"]
    assert store.count == 2


def test_the_same_key_again_drops_no_other(tmp_path: Path) -> None:
    store = ParkedStore(tmp_path, max_bytes=1 << 20, max_messages=2)
    for key in ("0", "1", "0", "1"):
        assert store.append(FRAME, key=key, reason="") == 0
    assert store.count == 2


def test_a_message_longer_than_the_quota_is_kept_alone(tmp_path: Path) -> None:
    store = store_in(tmp_path, max_bytes=800)
    for key in ("0", "1"):
        store.append(FRAME._replace(payload=b"." * 5000), key=key, reason="")
    assert [message.key for message in list_parked(tmp_path)] == ["1"]


def test_the_number_is_bounded_over_restarts(tmp_path: Path) -> None:
    for number in range(5):
        ParkedStore(tmp_path, max_bytes=1 << 20, max_messages=3).append(FRAME, key=str(number), reason="")
        # Ages differ, whatever the file system's clock ticks like.
        os.utime(tmp_path / f"parked/{number}.parked", ns=(number, number))
    assert {message.key for message in list_parked(tmp_path)} == {"2", "3", "4"}


def test_a_long_reason_is_cut_at_a_character(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.append(FRAME, key="0", reason="x" + "é" * 100_000)
    (message,) = list_parked(tmp_path)
    assert message.reason == "x" + "é" * 499


@pytest.mark.parametrize("key", ["", "k" * 300])
def test_a_key_that_is_no_file_name_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be a parked message's key"):
        store_in(tmp_path).append(FRAME, key=key, reason="")


@pytest.mark.parametrize("damage", ["flip", "cut", "more", "empty", "not a record"])
def test_a_damaged_record_is_named(damage: str, tmp_path: Path) -> None:
    store_in(tmp_path).append(FRAME, key="0", reason="why")
    path = tmp_path / "parked/0.parked"
    data = path.read_bytes()
    path.write_bytes(
        {
            "flip": data[:-1] + bytes([data[-1] ^ 1]),
            "cut": data[:-1],
            "more": data + b"x",
            "empty": b"",
            "not a record": data[-len(data) + 28 + 1 + 3 :],
        }[damage]
    )
    with pytest.raises(LaneCorruptError, match=f"{path}: damaged"):
        list_parked(tmp_path)


def test_a_damaged_record_hides_no_other(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for key in ("0", "1", "2"):
        store.append(FRAME, key=key, reason="")
    os.truncate(tmp_path / "parked/1.parked", 5)
    damaged: list[LaneCorruptError] = []
    assert [message.key for message in list_parked(tmp_path, on_damage=damaged.append)] == ["0", "2"]
    assert [str(error) for error in damaged] == [f"{tmp_path}/parked/1.parked: damaged; restore it or move it away"]


def test_a_record_without_a_message_is_named(tmp_path: Path) -> None:
    store_in(tmp_path).append(FRAME, key="0", reason="why")
    path = tmp_path / "parked/0.parked"
    path.write_bytes(encode(Frame(FrameKind.PARKED, 0, 1, "0", "why", b"", b"no frame")))
    with pytest.raises(LaneCorruptError, match=f"{path}: holds no message"):
        list_parked(tmp_path)


def test_a_full_disk_refuses(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    (tmp_path / "parked/0.parked").mkdir(parents=True)
    with pytest.raises(LaneFullError, match="cannot park in"):
        store.append(FRAME, key="0", reason="why")
    with pytest.raises(LaneError, match=r"cannot read .*0\.parked"):
        list_parked(tmp_path)


def test_a_leftover_of_an_interrupted_write_is_not_a_message(tmp_path: Path) -> None:
    store_in(tmp_path).append(FRAME, key="0", reason="")
    (tmp_path / "parked/1.parked.tmp").write_bytes(b"half")
    assert count_parked(tmp_path) == len(list_parked(tmp_path)) == store_in(tmp_path).count == 1


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "parked").write_text("")
    with pytest.raises(LaneError, match="parked"):
        store_in(tmp_path)
    with pytest.raises(LaneError, match="parked"):
        count_parked(tmp_path)


def test_power_durability_keeps_the_same_records(tmp_path: Path) -> None:
    store = ParkedStore(tmp_path / "rule-a", max_bytes=1 << 20, durability="power")
    (tmp_path / "rule-a").mkdir()
    store.append(FRAME, key="0", reason="why")
    assert [message.frame for message in list_parked(tmp_path / "rule-a")] == [FRAME]


def test_a_lane_with_parked_messages_opens(tmp_path: Path) -> None:
    lane = open_lane(tmp_path)
    fill(lane, 1)
    store_in(lane.path).append(FRAME, key="0", reason="why")
    lane.close()
    open_lane(tmp_path).close()
