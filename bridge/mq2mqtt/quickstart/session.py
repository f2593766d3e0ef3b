"""`mq2mqtt quickstart`: RocketMQ, an MQTT broker with the bridge in it, and a visible round trip, in one go."""

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import typer

from mq2mqtt.errors import BridgeError, ConfigError
from mq2mqtt.link.drivers import DRIVERS, library
from mq2mqtt.link.native import NativeLink
from mq2mqtt.quickstart.bridge import RunningBridge
from mq2mqtt.quickstart.device import Device
from mq2mqtt.quickstart.drivers import reach
from mq2mqtt.quickstart.prerequisites import PrerequisiteError
from mq2mqtt.quickstart.server import find_rocketmq
from mq2mqtt.quickstart.tour import DEVICE_ID, Tour

__all__ = ["quickstart"]

_INTERRUPTED = 130
_CHECK_INTERVAL = 0.5


async def quickstart(*, once: bool, rocketmq: str | None, mosquitto: bool, driver: str) -> int:
    """Run the guided tour in `var/quickstart` below the current directory, or `var/quickstart-DRIVER`.

    Args:
        once: end after the round trip, instead of staying up until SIGINT or SIGTERM.
        rocketmq: name server `HOST:PORT` to use, instead of starting a RocketMQ.
        mosquitto: run the sidecar beside a Mosquitto with the hook, instead of the bridge in amqtt.
        driver: the bridge's `rocketmq.driver`; with `grpc` a proxy is started too.

    Returns:
        Exit code: 0 when the round trip happened, 1 when it did not, 2 when this machine lacks something, 130 when
        interrupted before. Errors are one line on stderr.
    """
    happened = asyncio.Event()
    session = asyncio.create_task(
        _session(
            _directory(driver), once=once, rocketmq=rocketmq, mosquitto=mosquitto, driver=driver, happened=happened
        ),
        name="quickstart.session",
    )
    try:
        with _on_signals(session.cancel):
            await session
    except asyncio.CancelledError:
        return 0 if happened.is_set() else _INTERRUPTED
    except (PrerequisiteError, ConfigError) as error:
        typer.echo(f"mq2mqtt: {error}", err=True)
        return 2
    except (BridgeError, OSError) as error:
        typer.echo(f"mq2mqtt: {error}", err=True)
        return 1
    return 0


def _directory(driver: str) -> Path:
    # Topics are of another type for some drivers.
    return Path.cwd() / "var" / ("quickstart" if driver == "native" else f"quickstart-{driver}")


@contextlib.contextmanager
def _on_signals(react: Callable[[], object]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, react)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _session(  # noqa: PLR0913 - the options of the command
    directory: Path, *, once: bool, rocketmq: str | None, mosquitto: bool, driver: str, happened: asyncio.Event
) -> None:
    """Bring everything up, in the order of the flow; whatever ends this takes it down in reverse."""
    async with AsyncExitStack() as stack:
        stack.enter_context(_only_one(directory))
        typer.echo(f"everything is kept in {directory}")
        typer.echo(f"driver {driver}: {library(DRIVERS[driver])}")
        server = await find_rocketmq(directory / "rocketmq", given=rocketmq, say=typer.echo)
        stack.push_async_callback(server.stop)
        section = await reach(driver, server.namesrv, directory=directory / "proxy", stack=stack, say=typer.echo)
        bridge = RunningBridge(directory, rocketmq=section)
        if mosquitto:
            await bridge.use_mosquitto(typer.echo)
        stack.push_async_callback(bridge.stop)
        await bridge.start(typer.echo)
        typer.echo(f"ready: MQTT on 127.0.0.1:{bridge.mqtt_port}, rules telemetry-out and commands-in are up")

        link = NativeLink(namesrv=server.namesrv, client_id="mq2mqtt-quickstart-viewer")
        stack.push_async_callback(link.close)
        await link.start()
        device = await Device(DEVICE_ID).connect("127.0.0.1", bridge.mqtt_port)
        stack.push_async_callback(device.close)
        tour = Tour(device, link, typer.echo)
        stack.push_async_callback(tour.close)
        await tour.start()
        await tour.round_trip()
        happened.set()
        typer.echo("")
        typer.echo("the round trip works, both ways")
        typer.echo(f"metrics      {bridge.admin_url}/metrics   readiness  {bridge.admin_url}/readyz")
        if once:
            return
        _invite(bridge, server.namesrv)
        stack.callback(typer.echo, "stopping")
        while True:
            bridge.check()
            await asyncio.sleep(_CHECK_INTERVAL)


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(lock)
        raise PrerequisiteError(f"another quickstart runs in {directory}: stop it first") from exc
    try:
        yield
    finally:
        os.close(lock)


def _invite(bridge: RunningBridge, namesrv: str) -> None:
    mosquitto = bridge.mosquitto
    for line in (
        f"name server  {namesrv}",
        f"bridge log   {bridge.log_file}",
        f"config       {bridge.config_file}",
        *([] if mosquitto is None else [f"mosquitto    {mosquitto.log_file}", f"             {mosquitto.config_file}"]),
        f"try          mosquitto_pub -h 127.0.0.1 -p {bridge.mqtt_port} -i GID_dev@@@me -q 1 -t sensors/hello -m hi",
        "             what reaches RocketMQ, or the device, is shown here",
        "stop         Ctrl-C",
        "",
    ):
        typer.echo(line)
