"""The command line (design section 5). Exit codes: 0 ok, 1 found problems, 2 wrong usage or configuration.

A database that is away is a problem, code 1: a service manager may start the bridge again, and time mends it.
"""

import asyncio
import gc
import json
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from mq2mqtt import __version__, checks, settings, show
from mq2mqtt import explain as explaining
from mq2mqtt.errors import BridgeError, StoreError
from mq2mqtt.log import quiet_client, set_up_logging
from mq2mqtt.message import MqttMessage
from mq2mqtt.settings.fields import Driver, address

__all__ = ["app", "main"]

app = typer.Typer(
    name="mq2mqtt",
    help="Rules that carry messages between an MQTT broker you already run and Apache RocketMQ.",
    no_args_is_help=True,
    add_completion=False,
    # Else what was wrong stands in a box of several lines, in a log too.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Print what a configuration looks like.", no_args_is_help=True)
spool_app = typer.Typer(help="Look into the lanes: what waits for RocketMQ.", no_args_is_help=True)
parked_app = typer.Typer(help="Look after messages that could not go on as they are.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(spool_app, name="spool")
app.add_typer(parked_app, name="parked")

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="Configuration file.", show_default=True)]
LaneArgument = Annotated[str, typer.Argument(help="Rule id: the lane's name.")]
KeysArgument = Annotated[list[str] | None, typer.Argument(metavar="KEY...", help="Keys, as `parked ls` lists them.")]
AllOption = Annotated[bool, typer.Option("--all", help="All messages that the rule has parked.")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, help="Show at most so many messages.")]
_LOG_LEVELS = "DEBUG, INFO, WARNING or ERROR"
_DEFAULT_CONFIG = Path("mq2mqtt.yaml")
_GC_THRESHOLD = 10_000
_MAX_CLIENT_ID_BYTES = 65_535  # MQTT-1.5.3: a string's length has two bytes


def _listen(value: str | None) -> str | None:
    if value is not None:
        try:
            address(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return value


def _properties(values: list[str] | None) -> list[str] | None:
    for value in values or ():
        if "=" not in value[1:]:
            raise typer.BadParameter(f"{value!r} is not NAME=VALUE")
    return values


def _client_id(value: str | None) -> str | None:
    if value is None:
        return None
    size = len(value.encode("utf-8", "surrogateescape"))
    if size > _MAX_CLIENT_ID_BYTES:
        raise typer.BadParameter(f"{size} bytes, a client id has at most {_MAX_CLIENT_ID_BYTES}")
    return value


def _log_level(value: str) -> str:
    level = value.upper()
    if level not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise typer.BadParameter(f"{value!r} is no log level: use {_LOG_LEVELS}")
    return level


def _version(value: bool) -> None:  # noqa: FBT001 - typer's callback signature
    if value:
        typer.echo(f"mq2mqtt {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    *,
    once: Annotated[bool, typer.Option("--once", help="End after the round trip instead of staying up.")] = False,
    rocketmq: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Name server of a RocketMQ to use; default: start one.")
    ] = None,
    mosquitto: Annotated[
        bool, typer.Option("--mosquitto", help="Use a Mosquitto with the hook, and the sidecar; default: amqtt.")
    ] = False,
    driver: Annotated[
        Driver, typer.Option(help="The bridge's RocketMQ client: docs/drivers.md. With grpc a proxy is started too.")
    ] = "native",
) -> None:
    """Start a real RocketMQ and an MQTT broker with the bridge, and show a round trip both ways."""
    from mq2mqtt.quickstart.session import quickstart as session  # noqa: PLC0415 - the other commands start faster

    quiet_client()
    raise typer.Exit(_run(session(once=once, rocketmq=rocketmq, mosquitto=mosquitto, driver=driver)))


def _wait_with_reloads() -> None:
    # SIGHUP would end the process until `serve` takes it; the file is still to be read, so that nothing is missed.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@app.command()
def run(
    *,
    config: ConfigOption = _DEFAULT_CONFIG,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", callback=_listen, help="MQTT address, instead of mqtt.listen.")
    ] = None,
    log_level: Annotated[str, typer.Option(callback=_log_level, help=f"{_LOG_LEVELS}.")] = "INFO",
    log_json: Annotated[bool, typer.Option("--log-json", help="Write log lines as JSON objects.")] = False,
) -> None:
    """Run an amqtt broker with the bridge in it."""
    _wait_with_reloads()
    from mq2mqtt_amqtt.run import serve  # noqa: PLC0415 - amqtt is slow to import

    set_up_logging(level=log_level, json=log_json)
    loaded = settings.load(config)
    _run(serve(loaded, config, listen=listen))


@app.command()
def sidecar(
    *,
    config: ConfigOption = _DEFAULT_CONFIG,
    log_level: Annotated[str, typer.Option(callback=_log_level, help=f"{_LOG_LEVELS}.")] = "INFO",
    log_json: Annotated[bool, typer.Option("--log-json", help="Write log lines as JSON objects.")] = False,
) -> None:
    """Run the bridge beside an MQTT broker: Mosquitto with the hook, or any that speaks MQTT 5."""
    _wait_with_reloads()
    from mq2mqtt_mosquitto.sidecar import serve  # noqa: PLC0415 - the other commands start faster

    set_up_logging(level=log_level, json=log_json)
    loaded = settings.load(config)
    raise typer.Exit(_run(serve(loaded, config)))


@app.command()
def check(
    *,
    config: ConfigOption = _DEFAULT_CONFIG,
    create: Annotated[bool, typer.Option("--create", help="Create missing RocketMQ topics.")] = False,
    rocketmq_only: Annotated[
        bool, typer.Option("--rocketmq-only", help="With a sidecar's configuration: leave its MQTT broker alone.")
    ] = False,
    mosquitto_conf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Mosquitto's configuration, for what Mosquitto itself does not tell."),
    ] = None,
) -> None:
    """Validate the configuration, reach RocketMQ and a sidecar's broker, and say what is missing or wrong."""
    # What the client logs of its connections is in the findings too.
    set_up_logging(level="ERROR")
    loaded = settings.load(config)
    quiet_client()
    code = _run(checks.check(loaded, config, create=create))
    if loaded.host.type == "mqtt" and not rocketmq_only:
        from mq2mqtt_mqtt.checks import check_broker  # noqa: PLC0415 - the other commands start faster

        code = max(code, _run(check_broker(loaded, mosquitto_conf)))
    elif loaded.host.model_fields_set and not rocketmq_only:
        from mq2mqtt_mosquitto.checks import check_host  # noqa: PLC0415 - the other commands start faster

        code = max(code, _run(check_host(loaded, mosquitto_conf)))
    elif not loaded.host.model_fields_set:
        from mq2mqtt_amqtt.checks import check_plugins  # noqa: PLC0415 - the other commands start faster

        code = max(code, check_plugins(loaded))
    raise typer.Exit(code)


@app.command()
def explain(  # noqa: PLR0913 - the options of the command
    *,
    config: ConfigOption = _DEFAULT_CONFIG,
    topic: Annotated[str | None, typer.Option(help="A device publishes to this MQTT topic.")] = None,
    client_id: Annotated[
        str, typer.Option(callback=_client_id, help="With --topic: the device's client id.")
    ] = "GID_example@@@1",
    qos: Annotated[int, typer.Option(min=0, max=2, help="With --topic: its QoS.")] = 1,
    clean_session: Annotated[
        bool, typer.Option("--clean-session/--persistent-session", help="With --topic: the device's session.")
    ] = True,
    rocketmq_topic: Annotated[
        str | None, typer.Option(metavar="TOPIC", help="A program sends to this RocketMQ topic.")
    ] = None,
    properties: Annotated[
        list[str] | None,
        typer.Option(
            "--property",
            metavar="NAME=VALUE",
            callback=_properties,
            help="With --rocketmq-topic: a property; the tag is TAGS.",
        ),
    ] = None,
    payload: Annotated[str, typer.Option(help="The message's payload or body.")] = "hello",
    connects: Annotated[
        str | None,
        typer.Option(metavar="CLIENT_ID", callback=_client_id, help="A client with this id connects."),
    ] = None,
) -> None:
    """Show which rules take a message or a client's status, and the exact message that is sent; asks no server."""
    if [topic, rocketmq_topic, connects].count(None) != 2:  # noqa: PLR2004 - of the three
        raise typer.BadParameter("give one of --topic, --rocketmq-topic and --connects")
    loaded = settings.load(config)
    if connects is not None:
        raise typer.Exit(explaining.explain_client(loaded, connects))
    body = payload.encode("utf-8", "surrogateescape")
    if rocketmq_topic is not None:
        pairs = (item.partition("=") for item in properties or ())
        stored = explaining.StoredMessage(rocketmq_topic, body, {name: value for name, _, value in pairs})
        raise typer.Exit(explaining.explain_stored(loaded, stored))
    publish = MqttMessage(topic or "", body, qos, client_id=client_id, clean_session=clean_session)
    raise typer.Exit(explaining.explain_publish(loaded, publish))


@config_app.command()
def example() -> None:
    """Print a commented configuration."""
    typer.echo(settings.example(), nl=False)


@config_app.command()
def schema() -> None:
    """Print the JSON schema of the configuration."""
    typer.echo(json.dumps(settings.schema(), indent=2))


@spool_app.command("ls")
def spool_ls(*, config: ConfigOption = _DEFAULT_CONFIG) -> None:
    """List the lanes: messages and bytes that wait, the age of the oldest, parked messages."""
    raise typer.Exit(show.list_lanes(settings.load(config)))


@spool_app.command("show")
def spool_show(lane: LaneArgument, *, config: ConfigOption = _DEFAULT_CONFIG, limit: LimitOption = 20) -> None:
    """Show the messages that wait in a lane, oldest first."""
    raise typer.Exit(show.show_lane(settings.load(config), lane, limit=limit))


@parked_app.command("ls")
def parked_ls(*, config: ConfigOption = _DEFAULT_CONFIG) -> None:
    """List parked messages: rule, number, when, why."""
    raise typer.Exit(show.list_parked_messages(settings.load(config)))


@parked_app.command("show")
def parked_show(lane: LaneArgument, *, config: ConfigOption = _DEFAULT_CONFIG, limit: LimitOption = 20) -> None:
    """Show a rule's parked messages whole, oldest first."""
    raise typer.Exit(show.show_parked(settings.load(config), lane, limit=limit))


@parked_app.command("replay")
def parked_replay(
    lane: LaneArgument,
    keys: KeysArgument = None,
    *,
    config: ConfigOption = _DEFAULT_CONFIG,
    everything: AllOption = False,
) -> None:
    """Send parked messages once more, the way of their rule: when the cause is mended. The bridge may run or not."""
    raise typer.Exit(show.replay_parked(settings.load(config), lane, _keys(keys, everything=everything)))


@parked_app.command("drop")
def parked_drop(
    lane: LaneArgument,
    keys: KeysArgument = None,
    *,
    config: ConfigOption = _DEFAULT_CONFIG,
    everything: AllOption = False,
) -> None:
    """Delete parked messages for good. The bridge may run or not."""
    raise typer.Exit(show.drop_parked(settings.load(config), lane, _keys(keys, everything=everything)))


def _keys(keys: list[str] | None, *, everything: bool) -> list[str]:
    """Return the keys; none are all."""
    if bool(keys) == everything:
        raise typer.BadParameter("give keys or --all")
    return keys or []


def collect_rarely() -> None:
    """Have the interpreter look for cycles rarely, and not in what is loaded by now."""
    # Messages die with their last reference; looking for cycles every 700 of them takes 12 % of a drain.
    gc.set_threshold(_GC_THRESHOLD)
    # What is loaded by now stays: a full look for cycles in it held the loop up for 35 to 75 ms.
    gc.freeze()


def _run(work: Coroutine[Any, Any, int]) -> int:
    """Run on uvloop where it is installed."""
    collect_rarely()
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def main() -> None:
    """Entry point: what an operator did wrong is one clear line and exit code 2, a database that is away code 1."""
    try:
        app()
    except BridgeError as error:
        typer.echo(f"mq2mqtt: {error}", err=True)
        sys.exit(1 if isinstance(error, StoreError) else 2)
    except KeyboardInterrupt:
        sys.exit(130)
