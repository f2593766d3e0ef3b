"""`python -m mq2mqtt.quickstart.prepare [PROGRAM ...]`: get what a RocketMQ on the JVM needs, without starting it.

Also the named programs, such as `javac` for tests with the Java client.
"""

import asyncio
import sys

from mq2mqtt.quickstart.jars import rocketmq_jars
from mq2mqtt.quickstart.prerequisites import PrerequisiteError, require_java, require_programs
from mq2mqtt.quickstart.rocketmq import DEFAULT_VERSION

__all__ = ["main"]


def main() -> int:
    """Return 0, or 2 after one line on stderr that says what is missing."""
    try:
        asyncio.run(_prepare(sys.argv[1:]))
    except PrerequisiteError as error:
        _say(str(error))
        return 2
    return 0


async def _prepare(programs: list[str]) -> None:
    await require_programs(programs, _say)
    await require_java(_say)
    await rocketmq_jars(DEFAULT_VERSION, _say)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
