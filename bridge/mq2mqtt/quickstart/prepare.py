"""`python -m mq2mqtt.quickstart.prepare`: get what a RocketMQ on the JVM needs, without starting it."""

import asyncio
import sys

from mq2mqtt.quickstart.jars import rocketmq_jars
from mq2mqtt.quickstart.prerequisites import PrerequisiteError, require_java
from mq2mqtt.quickstart.rocketmq import DEFAULT_VERSION

__all__ = ["main"]


def main() -> int:
    """Return 0, or 2 after one line on stderr that says what is missing."""
    try:
        asyncio.run(_prepare())
    except PrerequisiteError as error:
        _say(str(error))
        return 2
    return 0


async def _prepare() -> None:
    await require_java(_say)
    await rocketmq_jars(DEFAULT_VERSION, _say)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
