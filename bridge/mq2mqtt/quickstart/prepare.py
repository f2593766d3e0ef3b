"""`python -m mq2mqtt.quickstart.prepare`: get what RocketMQ on the JVM and Mosquitto's hook need, and PostgreSQL.

Starts none of them.
"""

import argparse
import asyncio
import sys
from collections.abc import Coroutine

from mq2mqtt.quickstart.jars import rocketmq_jars
from mq2mqtt.quickstart.prerequisites import (
    PrerequisiteError,
    require_java,
    require_mosquitto,
    require_postgresql,
    require_programs,
)
from mq2mqtt.quickstart.rocketmq import DEFAULT_VERSION

__all__ = ["main"]


def main() -> int:
    """Return 0, or 2 after a line on stderr for each thing that is missing."""
    parser = argparse.ArgumentParser(prog="python -m mq2mqtt.quickstart.prepare", description=__doc__)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help="also needed, such as javac")
    parser.add_argument(
        "--rocketmq-version", action="append", default=[], metavar="VERSION", help="also fetched; may be repeated"
    )
    parser.add_argument("--mosquitto", action="store_true", help="also Mosquitto, and what its hook is built with")
    parser.add_argument("--postgresql", action="store_true", help="also a PostgreSQL server")
    return asyncio.run(_prepare(parser.parse_args()))


async def _prepare(arguments: argparse.Namespace) -> int:
    # Each is of use without the others.
    found = [await _managed(_rocketmq(arguments.programs, {DEFAULT_VERSION, *arguments.rocketmq_version}))]
    if arguments.mosquitto:
        found.append(await _managed(require_mosquitto(_say)))
    if arguments.postgresql:
        found.append(await _managed(require_postgresql(_say)))
    return 0 if all(found) else 2


async def _managed(work: Coroutine[None, None, object]) -> bool:
    try:
        await work
    except PrerequisiteError as error:
        _say(str(error))
        return False
    return True


async def _rocketmq(programs: list[str], versions: set[str]) -> None:
    await require_programs(programs, _say)
    await require_java(_say)
    for version in sorted(versions):
        await rocketmq_jars(version, _say)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
