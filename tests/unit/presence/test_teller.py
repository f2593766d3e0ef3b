from pathlib import Path

from mq2mqtt.presence.state import Came, Connection, Followed, Record, State, Went
from mq2mqtt.presence.teller import Teller
from mq2mqtt.spool.lane import Lane
from mq2mqtt.telemetry import Direction, RuleTelemetry


def test_who_came_and_went_while_the_lane_was_full_is_not_remembered(tmp_path: Path) -> None:
    state = State(seq=1)

    def write(record: Record) -> bool:
        state.apply(record)
        return True

    write(Followed("presence", "GID_dev", "t"))
    lane = Lane.open(tmp_path / "presence", max_bytes=1, target="t")
    telemetry = RuleTelemetry("presence", direction=Direction.UPLINK)
    teller = Teller(lane, node="n1", state=state, write=write, telemetry=telemetry)
    for number in range(100):
        write(Came(Connection(f"GID_dev@@@{number}", "c1", "ip", 1)))
        teller.changed(f"GID_dev@@@{number}")
        if number < 99:
            write(Went(f"GID_dev@@@{number}", 2))
            teller.changed(f"GID_dev@@@{number}")
    assert list(teller.owed) == ["GID_dev@@@99"]
    assert telemetry.drops == {"lane_full": 199}
    lane.max_bytes = 1 << 20
    teller.watch()
    assert (lane.messages, len(teller.owed)) == (1, 0)
    lane.close()
