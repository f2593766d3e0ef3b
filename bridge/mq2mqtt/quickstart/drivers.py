"""What an administrator prepares in a RocketMQ for a driver, and the section `rocketmq` that leads the bridge there."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from mq2mqtt.quickstart.bridge import INBOUND_GROUP, INBOUND_TOPIC, OUTBOUND_TOPIC
from mq2mqtt.quickstart.cluster import create_ordered_group, create_topic, topic_exists
from mq2mqtt.quickstart.jars import rocketmq_jars
from mq2mqtt.quickstart.prerequisites import Say, require_java
from mq2mqtt.quickstart.proxy import Proxy
from mq2mqtt.quickstart.rocketmq import DEFAULT_VERSION

__all__ = ["make_group", "make_topic", "reach"]

_BY_PROXY: Final = "grpc"
"""The driver whose clients get messages in order only from topics and groups that are made for it."""


async def make_topic(driver: str, namesrv: str, topic: str, *, queues: int = 4) -> None:
    """Create `topic` as a rule needs it that runs with `driver`; raises `LinkError`."""
    await create_topic(namesrv, topic, queues=queues, message_type="FIFO" if driver == _BY_PROXY else None)


async def make_group(driver: str, namesrv: str, group: str) -> None:
    """Create consumer group `group` where a rule that runs with `driver` needs that; raises `LinkError`."""
    if driver == _BY_PROXY:
        await create_ordered_group(namesrv, group)


async def reach(driver: str, namesrv: str, *, directory: Path, stack: AsyncExitStack, say: Say) -> dict[str, str]:
    """Make the quickstart's topics, and what else `driver` needs; return the bridge's section `rocketmq`.

    What is started keeps its files in `directory` and is ended by `stack`.

    Raises:
        BridgeError: RocketMQ refuses, or a proxy can't be started.
    """
    for topic in (OUTBOUND_TOPIC, INBOUND_TOPIC):
        if not await topic_exists(namesrv, topic):
            await make_topic(driver, namesrv, topic)
            say(f"created RocketMQ topic {topic}")
    await make_group(driver, namesrv, INBOUND_GROUP)
    if driver != _BY_PROXY:
        return {"driver": driver, "namesrv": namesrv}
    await require_java(say)
    jars = await rocketmq_jars(DEFAULT_VERSION, say)
    say("starting RocketMQ's proxy on the JVM")
    proxy = await Proxy.on_jvm(directory, namesrv=namesrv, jars=jars)
    stack.callback(proxy.kill)
    return {"driver": driver, "proxy": proxy.address}
