"""What the quickstart prepares in a RocketMQ for a driver, and the `rocketmq` section that leads the bridge there."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from mq2mqtt.quickstart.bridge import INBOUND_GROUP, INBOUND_TOPIC, OUTBOUND_TOPIC
from mq2mqtt.quickstart.cluster import create_ordered_group, create_topic, topic_exists
from mq2mqtt.quickstart.jars import rocketmq_jars
from mq2mqtt.quickstart.prerequisites import Say, require_java
from mq2mqtt.quickstart.proxy import Proxy
from mq2mqtt.quickstart.rocketmq import DEFAULT_VERSION

__all__ = ["reach"]

_FIFO: Final = "FIFO"


async def reach(driver: str, namesrv: str, *, directory: Path, stack: AsyncExitStack, say: Say) -> dict[str, str]:
    """Make the quickstart's topics, and what else `driver` needs; return the bridge's section `rocketmq`.

    What is started keeps its files in `directory` and is ended by `stack`.

    Raises:
        BridgeError: RocketMQ refuses, or a proxy can't be started.
    """
    by_proxy = driver == "grpc"
    for topic in (OUTBOUND_TOPIC, INBOUND_TOPIC):
        if not await topic_exists(namesrv, topic):
            await create_topic(namesrv, topic, message_type=_FIFO if by_proxy else None)
            say(f"created RocketMQ topic {topic}{f' of type {_FIFO}' if by_proxy else ''}")
    if not by_proxy:
        return {"driver": driver, "namesrv": namesrv}
    await create_ordered_group(namesrv, INBOUND_GROUP)
    say(f"created ordered consumer group {INBOUND_GROUP}")
    await require_java(say)
    jars = await rocketmq_jars(DEFAULT_VERSION, say)
    say("starting RocketMQ's proxy on the JVM")
    proxy = await Proxy.on_jvm(directory, namesrv=namesrv, jars=jars)
    stack.callback(proxy.kill)
    return {"driver": driver, "proxy": proxy.address}
