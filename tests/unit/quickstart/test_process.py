from pathlib import Path

import pytest

from mq2mqtt.quickstart.process import Child
from mq2mqtt.quickstart.rocketmq import RocketMQStartError, keep_starting
from tests.waiting import until

# Ends the first time, and runs the second.
_SCRIPT = "if test -e been; then echo serves; exec sleep 60; fi; touch been; echo {reason}; exit 3"


async def _ended(directory: Path, reason: str) -> Child:
    child = Child(["sh", "-c", _SCRIPT.format(reason=reason)], output=directory / "out", cwd=directory)
    await until(lambda: child.exit_code is not None)
    return child


async def test_what_ended_for_a_reason_that_passes_is_started_again(tmp_path: Path) -> None:
    child = await _ended(tmp_path, "at org.apache.rocketmq.common.utils.NetworkUtil.getLocalAddress")
    assert child.last_words is not None
    keep_starting(child, "it")
    await until(lambda: child.tail() == "serves")
    runs = child.pid
    keep_starting(child, "it")
    assert (child.pid, child.exit_code) == (runs, None)
    child.kill()


async def test_what_ended_for_another_reason_is_not(tmp_path: Path) -> None:
    child = await _ended(tmp_path, "Address already in use")
    with pytest.raises(RocketMQStartError, match="it ended with exit code 3: Address already in use"):
        keep_starting(child, "it")
    assert child.exit_code == 3
