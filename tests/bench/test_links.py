"""The comparison of drivers runs and says what it should: for one driver, in the environment that tests run in."""

import sys

import pytest

from mq2mqtt.link.drivers import DRIVERS
from mq2mqtt.settings import RocketMQSettings
from tests.bench import links


@pytest.mark.e2e
@pytest.mark.timeout(240)
def test_a_quick_run_measures_a_driver(link_settings: RocketMQSettings) -> None:
    driver = link_settings.driver
    run = links.measure(
        driver,
        namesrv=link_settings.namesrv,
        proxy=link_settings.proxy or "",
        quick=True,
        python=sys.executable,
    )

    assert list(run["speeds"]) == ["one by one", "pipelined", "batched", "received"]
    for speed in run["speeds"].values():
        assert speed["rate"] > 0
        assert speed["cpu_us"] > 0
    assert run["nul"]["sent"] == "whole"
    whole = DRIVERS[driver].capabilities.receives_any_body
    assert run["nul"]["received"] == "whole" if whole else run["nul"]["received"] != "whole"


def _run(rate: float, nul: str = "whole") -> links.Run:
    speed = {"rate": rate, "cpu_us": 2.5}
    return {"speeds": {"received": speed}, "nul": {"received": nul}, "library": "some"}


def test_the_table_has_a_column_for_each_driver() -> None:
    one, other = [_run(1000), _run(3000), _run(2000)], [_run(7, "cut to 1 bytes")]
    assert links.table(links.rows({"native": one, "other": other})) == (
        "|  | native | other |\n"
        "| --- | --- | --- |\n"
        "| received, msg/s | 2,000 (1,000-3,000) | 7 |\n"
        "| received, us of CPU each | 2.50 (2.50-2.50) | 2.50 |\n"
        "| a body with NUL, received | whole | cut to 1 bytes |"
    )


def test_the_figures_are_rows_as_those_of_experiments() -> None:
    found = links.figures({"native": [_run(100), _run(400)], "other": [_run(50), _run(100)]})
    assert [row.as_json() for row in found if row.unit == "msg/s"] == [
        {
            "experiment": "links-native",
            "metric": "received",
            "value": 250,
            "unit": "msg/s",
            "baseline": None,
            "ratio": None,
            "runs": [100, 400],
        },
        {
            "experiment": "links-other",
            "metric": "received",
            "value": 75,
            "unit": "msg/s",
            "baseline": 250,
            "ratio": 0.375,
            "runs": [50, 100],
        },
    ]
    assert [(row.experiment, row.metric, row.unit) for row in found if row.unit != "msg/s"] == [
        ("links-native", "received, CPU", "us/msg"),
        ("links-other", "received, CPU", "us/msg"),
    ]


def test_a_driver_that_cannot_be_measured_costs_the_figures_of_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(driver: str, **_: object) -> links.Run:
        if driver == "grpc":
            raise RuntimeError("its last words")
        return _run(1)

    monkeypatch.setattr(links, "measure", measured)
    runs = links.measure_all(namesrv="", proxy="", quick=True, runs=2)
    assert runs == {driver: [_run(1)] * 2 for driver in DRIVERS if driver != "grpc"}
    assert "links-grpc: failed: its last words" in capsys.readouterr().err
