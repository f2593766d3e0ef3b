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


def test_the_table_has_a_column_for_each_driver() -> None:
    def run(rate: float, nul: str) -> links.Run:
        return {"speeds": {"received": {"rate": rate, "cpu_us": 2.5}}, "nul": {"received": nul}}

    one, other = [run(1000, "whole"), run(3000, "whole"), run(2000, "whole")], [run(7, "cut to 1 bytes")]
    assert links.table(links.rows({"native": one, "other": other})) == (
        "|  | native | other |\n"
        "| --- | --- | --- |\n"
        "| received, msg/s | 2,000 (1,000-3,000) | 7 |\n"
        "| received, us of CPU each | 2.50 (2.50-2.50) | 2.50 |\n"
        "| a body with NUL, received | whole | cut to 1 bytes |"
    )
