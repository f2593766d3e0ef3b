"""The fault table's own arithmetic, and what writing it leaves alone."""

from pathlib import Path

import pytest

from tests.faults import report
from tests.faults.report import FaultRow, FaultTable


def _row(fault: str, arrivals: list[bytes], traffic: str = "uplink") -> FaultRow:
    return FaultRow.of(
        fault=fault,
        traffic=traffic,
        acknowledged={b"0", b"1", b"2"},
        arrivals=arrivals,
        longest_stall=None,
        told_down=1.234,
        reason="a|b",
    )


def _table(rocketmq_version: str) -> FaultTable:
    return FaultTable(rocketmq_version, host="a host", broker="a broker")


def test_counts() -> None:
    row = _row("killed", [b"0", b"1", b"0", b"1", b"2", b"3"])
    assert (row.acknowledged, row.arrived, row.missing, row.duplicated, row.out_of_order) == (3, 4, 0, 2, 0)
    assert row.markdown("today") == r"| killed | uplink | 3 | 4 | 0 | 2 | 0 | - | 1.23 s | a\|b | today |"


def test_the_total_of_several_clients() -> None:
    total = FaultRow.total([_row("killed", [b"0", b"1", b"0"]), _row("killed", [b"2", b"1"])])
    assert (total.acknowledged, total.arrived, total.missing, total.duplicated, total.out_of_order) == (6, 4, 2, 1, 1)
    assert total.longest_stall is None


@pytest.mark.parametrize("arrivals", [[b"0", b"2"], [b"0", b"2", b"1"]])
def test_what_fails_a_test(arrivals: list[bytes]) -> None:
    with pytest.raises(AssertionError):
        _table("1").add(_row("killed", arrivals))


def test_writing_replaces_the_rows_of_a_fault_and_leaves_others_with_their_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "page.md"
    begin, end = "<!-- fault table on a host: begin -->", "<!-- fault table on a host: end -->"
    other = "<!-- fault table on another: begin -->\n| a | - |\n<!-- fault table on another: end -->"
    file.write_text(f"before\n{begin}\n{end}\n{other}\nafter\n")
    first = _table("1")
    for fault in ("a", "b", "c"):
        first.add(_row(fault, [b"0", b"1", b"2"]))
    monkeypatch.setattr(report, "_today", lambda: "2020-02-29")
    monkeypatch.setattr(report, "FACTOR", 4)
    first.write(file)
    monkeypatch.setattr(report, "_today", lambda: "2020-03-01")
    monkeypatch.setattr(report, "FACTOR", 1)
    second = _table("2")
    second.add(_row("b", [b"0", b"1", b"2", b"2"], "uplink, other"))
    second.add(_row("b", [b"0", b"1", b"2"], "downlink"))
    second.write(file)
    text = file.read_text()
    assert text.startswith(f"before\n{begin}\nLast run 2020-03-01: ")
    assert text.endswith(f"\n{end}\n{other}\nafter\n")
    rows = [line.split(" | ") for line in text.partition(end)[0].splitlines() if line.startswith("| ")]
    earlier, now = "2020-02-29, MQ2MQTT_THOROUGH=4 |", "2020-03-01 |"
    assert [(*row[:2], row[-1]) for row in rows[1:]] == [
        ("| a", "uplink", earlier),
        ("| b", "uplink, other", now),
        ("| b", "downlink", now),
        ("| c", "uplink", earlier),
    ]
    assert "RocketMQ 2, a broker" in text
    assert "RocketMQ 1" not in text


@pytest.mark.parametrize("before", [None, "", "# A page\n", "# A page\n<!-- fault table on a host: begin -->\n"])
def test_a_file_without_the_table_gets_it_at_its_end(tmp_path: Path, before: str | None) -> None:
    file = tmp_path / "page.md"
    if before is not None:
        file.write_text(before)
    table = _table("1")
    table.add(_row("a", [b"0", b"1", b"2"]))
    table.write(file)
    once = file.read_text()
    assert once.startswith(before or "")
    assert once.endswith(" |\n<!-- fault table on a host: end -->\n")
    table.write(file)
    assert file.read_text().count("| a | uplink |") == 1
