"""The RocketMQ that tests and quickstart stand on, as their fixtures hand it out."""

import asyncio
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from mq2mqtt.errors import LinkError
from mq2mqtt.quickstart.cluster import ask, broker_addresses, topic_exists
from mq2mqtt.quickstart.rocketmq import RocketMQ
from tests.conftest import MakeTopic, SharedRocketMQ, StartRocketMQ

GET_BROKER_CONFIG = 26

pytestmark = pytest.mark.e2e


async def test_shared_one_is_registered_and_answers(rocketmq: SharedRocketMQ) -> None:
    assert await broker_addresses(rocketmq.namesrv) == [rocketmq.broker_address]
    assert (await ask(rocketmq.broker_address, GET_BROKER_CONFIG)).code == 0


async def test_topics_are_fresh_and_others_unknown(rocketmq: SharedRocketMQ, make_topic: MakeTopic, topic: str) -> None:
    names = {topic, await make_topic(), await make_topic(queues=1)}
    assert len(names) == 3
    assert all([await topic_exists(rocketmq.namesrv, name) for name in names])
    assert not await topic_exists(rocketmq.namesrv, "never_created")


async def test_broker_comes_back_with_its_topics_after_kill(own_rocketmq: RocketMQ) -> None:
    await own_rocketmq.create_topic("kept")
    own_rocketmq.kill_broker()
    with pytest.raises(LinkError):
        await ask(own_rocketmq.broker_address, GET_BROKER_CONFIG, timeout=1)
    await own_rocketmq.start_broker()
    assert await topic_exists(own_rocketmq.namesrv, "kept")


async def test_paused_broker_is_silent_until_it_goes_on(own_rocketmq: RocketMQ) -> None:
    own_rocketmq.pause_broker()
    with pytest.raises(LinkError, match="no answer from"):
        await ask(own_rocketmq.broker_address, GET_BROKER_CONFIG, timeout=1)
    own_rocketmq.resume_broker()
    assert (await ask(own_rocketmq.broker_address, GET_BROKER_CONFIG, timeout=30)).code == 0


async def test_broker_registers_with_a_name_server_that_came_back(own_rocketmq: RocketMQ) -> None:
    own_rocketmq.kill_namesrv()
    await own_rocketmq.start_namesrv()
    await own_rocketmq.wait_registered()
    assert await broker_addresses(own_rocketmq.namesrv) == [own_rocketmq.broker_address]


async def test_extra_lines_of_broker_conf_hold(start_rocketmq: StartRocketMQ) -> None:
    server = await start_rocketmq(broker_conf={"maxMessageSize": "70000"})
    answer = await ask(server.broker_address, GET_BROKER_CONFIG)
    assert b"maxMessageSize=70000" in answer.body


def test_jvms_die_with_the_program_that_started_them(tmp_path: Path) -> None:
    program = """
import asyncio, sys, time
from pathlib import Path
from mq2mqtt.quickstart.rocketmq import RocketMQ
server = asyncio.run(RocketMQ.on_jvm(Path(sys.argv[1])))
print(*server.pids, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    asyncio.run(_wait_gone(pids))


async def _wait_gone(pids: list[int]) -> None:
    async with asyncio.timeout(30):
        while any(_is_running(pid) for pid in pids):
            await asyncio.sleep(0.1)


def _is_running(pid: int) -> bool:
    with suppress(OSError):
        os.kill(pid, 0)
        # A zombie that nobody reaps (in a container without an init) has ended too.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
