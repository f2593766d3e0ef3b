from collections.abc import Iterator
from pathlib import Path

import pytest

from mq2mqtt.presence.state import Came, Connection, Followed, Record, State, Went
from mq2mqtt.presence.teller import Teller
from mq2mqtt.spool.lane import Lane
from mq2mqtt.telemetry import Direction, RuleTelemetry


class Told:
    """A rule's teller, the state that it goes by, and its lane."""

    def __init__(self, directory: Path) -> None:
        self.state = State(seq=1)
        self.write(Followed("presence", "GID_dev", "t"))
        self.lane = Lane.open(directory / "presence", max_bytes=1000, target="t")
        self.telemetry = RuleTelemetry("presence", direction=Direction.UPLINK)
        self.teller = Teller(self.lane, node="n1", state=self.state, write=self.write, telemetry=self.telemetry)

    def write(self, record: Record) -> bool:
        self.state.apply(record)
        return True

    def comes(self, device: str) -> None:
        client_id = f"GID_dev@@@{device}"
        self.write(Came(Connection(client_id, "c1", "ip", 1)))
        self.teller.changed(client_id)

    def goes(self, device: str) -> None:
        client_id = f"GID_dev@@@{device}"
        self.write(Went(client_id, 2))
        self.teller.changed(client_id)


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    told = Told(tmp_path)
    yield told
    told.lane.close()


def test_who_came_and_went_while_the_lane_was_full_is_not_remembered(told: Told) -> None:
    told.lane.append(bytes(950))
    for number in range(99):
        told.comes(f"{number}")
        told.goes(f"{number}")
    told.comes("99")
    assert list(told.teller.owed) == ["GID_dev@@@99"]
    assert told.telemetry.drops == {"lane_full": 199}
    told.lane.max_bytes = 1 << 20
    told.teller.watch()
    assert (told.lane.messages, len(told.teller.owed)) == (2, 0)


def test_an_event_longer_than_the_lane_holds_up_no_other(told: Told) -> None:
    told.comes("x" * 1000)
    told.comes("a")
    told.goes("x" * 1000)
    told.goes("a")
    assert (told.lane.messages, len(told.teller.owed)) == (2, 0)
    assert told.telemetry.drops == {"too_large": 2}
