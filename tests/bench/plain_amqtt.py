"""The baseline: the broker that `mq2mqtt run` starts, with the same settings, logging and loop, without the bridge."""

import asyncio
import importlib
import importlib.util
import sys

from amqtt.broker import Broker

from mq2mqtt.log import set_up_logging


async def serve(port: int) -> None:
    """Serve until killed."""
    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
        "plugins": {"mq2mqtt_amqtt.AuthPlugin": {"allow_anonymous": True}},
    }
    await Broker(config).start()
    await asyncio.Event().wait()


def main() -> None:
    """Run on uvloop where `mq2mqtt run` would."""
    set_up_logging(level="INFO")
    try:
        run = importlib.import_module("uvloop").run
    except ImportError:
        run = asyncio.run
    run(serve(int(sys.argv[1])))


if __name__ == "__main__":
    main()
