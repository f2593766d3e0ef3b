"""`python -m mq2mqtt.quickstart.prepare`: get what a RocketMQ on the JVM needs, without starting it."""

import argparse
import asyncio
import sys

from mq2mqtt.quickstart.jars import rocketmq_jars
from mq2mqtt.quickstart.prerequisites import PrerequisiteError, require_java, require_programs
from mq2mqtt.quickstart.rocketmq import DEFAULT_VERSION

__all__ = ["main"]


def main() -> int:
    """Return 0, or 2 after one line on stderr that says what is missing."""
    parser = argparse.ArgumentParser(prog="python -m mq2mqtt.quickstart.prepare", description=__doc__)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help="also needed, such as javac")
    parser.add_argument(
        "--rocketmq-version", action="append", default=[], metavar="VERSION", help="also fetched; may be repeated"
    )
    arguments = parser.parse_args()
    try:
        asyncio.run(_prepare(arguments.programs, {DEFAULT_VERSION, *arguments.rocketmq_version}))
    except PrerequisiteError as error:
        _say(str(error))
        return 2
    return 0


async def _prepare(programs: list[str], versions: set[str]) -> None:
    await require_programs(programs, _say)
    await require_java(_say)
    for version in sorted(versions):
        await rocketmq_jars(version, _say)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
