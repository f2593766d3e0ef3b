import os
from pathlib import Path

import pytest

from mq2mqtt.errors import LaneCorruptError, LaneError, LaneFullError
from mq2mqtt.spool.frame import Frame, FrameKind, encode
from mq2mqtt.spool.lane import Durability
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.parked import (
    ParkedStore,
    ask_replay,
    count_parked,
    drop,
    keys_of,
    list_parked,
    read_parked,
)
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


def test_where_no_room_can_be_made_it_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ParkedStore(tmp_path, max_bytes=1 << 20, max_messages=1)
    store.append(FRAME, key="1", reason="")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, os.strerror(1))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(LaneError, match="cannot park in"):
        store.append(FRAME, key="2", reason="")


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


ODD_KEYS = ["broker/a-1-5", "../../x", "%2F", "ä\0", "100"]


def test_what_is_to_be_replayed_is_told_by_key_and_gone_when_it_has_arrived(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for key in ODD_KEYS:
        store.append(FRAME, key=key, reason="why")
    assert keys_of(tmp_path) == sorted(ODD_KEYS)
    assert store.replays() == []
    for key in ODD_KEYS[1:]:
        assert ask_replay(tmp_path, key)
        # Asking twice is asking once.
        assert ask_replay(tmp_path, key)
    assert sorted(store.replays()) == sorted(ODD_KEYS[1:])
    assert {message.key: message.replaying for message in list_parked(tmp_path)} == {
        key: key != ODD_KEYS[0] for key in ODD_KEYS
    }
    for key in ODD_KEYS[1:]:
        message = store.read_replay(key)
        assert message is not None
        assert (message.key, message.frame, message.reason) == (key, FRAME, "why")
        store.replayed(key)
        store.replayed(key)
        assert store.read_replay(key) is None
    assert (store.count, store.replays(), keys_of(tmp_path)) == (1, [], ODD_KEYS[:1])


def test_what_cannot_be_replayed_is_parked_again_for_the_new_reason(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.append(FRAME, key="9", reason="first")
    assert ask_replay(tmp_path, "9")
    assert store.append(FRAME, key="9", reason="again") == 0
    (message,) = list_parked(tmp_path)
    assert (message.reason, message.replaying, store.replays(), store.count) == ("again", False, [], 1)


def test_a_full_disk_leaves_parked_what_cannot_be_replayed(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.append(FRAME, key="9", reason="first")
    assert ask_replay(tmp_path, "9")
    (tmp_path / "parked/9.replay.tmp").mkdir()
    assert store.append(FRAME, key="9", reason="again") == 0
    (message,) = list_parked(tmp_path)
    assert (message.reason, message.replaying) == ("first", False)


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_store_that_begins_finds_what_is_to_be_replayed(durability: Durability, tmp_path: Path) -> None:
    ParkedStore(tmp_path, max_bytes=1 << 20).append(FRAME, key="9", reason="first")
    assert ask_replay(tmp_path, "9")
    store = ParkedStore(tmp_path, max_bytes=1 << 20, durability=durability)
    assert (store.count, store.replays()) == (1, ["9"])
    store.append(FRAME, key="9", reason="again")
    assert [(message.reason, message.replaying) for message in list_parked(tmp_path)] == [("again", False)]


def test_what_waits_for_its_replay_takes_room_and_is_never_dropped_for_another(tmp_path: Path) -> None:
    store = ParkedStore(tmp_path, max_bytes=1 << 20, max_messages=2)
    for key in ("0", "1"):
        store.append(FRAME, key=key, reason="")
    assert ask_replay(tmp_path, "0")
    # Far from the last change, whatever the file system's clock ticks like.
    os.utime(tmp_path / "parked", ns=(1, 1))
    assert store.append(FRAME, key="2", reason="") == 1
    assert keys_of(tmp_path) == ["0", "2"]
    assert ask_replay(tmp_path, "2")
    os.utime(tmp_path / "parked", ns=(2, 2))
    assert store.append(FRAME, key="3", reason="") == 0
    assert keys_of(tmp_path) == ["0", "2", "3"]


def test_what_was_taken_away_just_now_was_not_dropped_for_another(tmp_path: Path) -> None:
    store = ParkedStore(tmp_path, max_bytes=1 << 20, max_messages=1)
    store.append(FRAME, key="0", reason="")
    changed = (tmp_path / "parked").stat().st_mtime_ns
    assert drop(tmp_path, "0")
    os.utime(tmp_path / "parked", ns=(changed, changed))
    assert store.append(FRAME, key="1", reason="") == 0


def test_the_count_sees_a_change_within_one_tick_of_the_file_systems_clock(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.append(FRAME, key="0", reason="")
    changed = (tmp_path / "parked").stat().st_mtime_ns
    assert store.count == 1
    assert drop(tmp_path, "0")
    os.utime(tmp_path / "parked", ns=(changed, changed))
    assert store.count == 0


def test_a_damaged_message_is_not_replayed_and_can_be_dropped(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for key in ("0", "1"):
        store.append(FRAME, key=key, reason="")
    assert ask_replay(tmp_path, "1")
    for name in ("0.parked", "1.replay"):
        os.truncate(tmp_path / "parked" / name, 5)
    with pytest.raises(LaneCorruptError, match=r"0\.parked: damaged"):
        ask_replay(tmp_path, "0")
    # The power went after it was asked for.
    assert store.read_replay("1") is None
    assert store.replays() == []
    for key in ("0", "1"):
        with pytest.raises(LaneCorruptError, match=rf"{key}\.parked: damaged"):
            read_parked(tmp_path, key)
        assert drop(tmp_path, key)
    assert keys_of(tmp_path) == []


@pytest.mark.parametrize("key", ["", "nope", "x" * 5000, "/", "..", "\0"])
def test_an_unknown_key_is_nothing(key: str, tmp_path: Path) -> None:
    for _ in range(2):
        assert (read_parked(tmp_path, key), ask_replay(tmp_path, key), drop(tmp_path, key)) == (None, False, False)
        store_in(tmp_path).append(FRAME, key="0", reason="")
    assert keys_of(tmp_path) == ["0"]


def test_dropping_one_that_waits_for_its_replay_cancels_that(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.append(FRAME, key="0", reason="")
    assert ask_replay(tmp_path, "0")
    assert drop(tmp_path, "0")
    assert (store.replays(), store.read_replay("0"), keys_of(tmp_path)) == ([], None, [])
