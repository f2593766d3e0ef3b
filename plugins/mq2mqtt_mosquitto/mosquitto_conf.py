"""Mosquitto's own configuration: what of it matters to the bridge, and what should be otherwise."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import typer

from mq2mqtt.errors import ConfigError

__all__ = ["Advice", "MosquittoConf", "advice", "advice_without_hook", "found_in", "read_conf", "report"]

_HOOK: Final = "mq2mqtt_hook"
_PLUGIN_LINES: Final = frozenset({"plugin", "auth_plugin", "global_plugin", "plugin_load"})
"""The last two are Mosquitto 2.1's; `plugin_load` has a name before the path."""
_DEFAULT_QUEUE: Final = 1000
_LARGE_QUEUE: Final = 1_000_000
_DEFAULT_AUTOSAVE: Final = 1800
_DEPTH: Final = 8


@dataclass(slots=True)
class MosquittoConf:
    """The options that count; of one that is there several times the last."""

    options: dict[str, str] = field(default_factory=dict)
    hook: dict[str, str] | None = None
    """The `plugin_opt_` of the hook, without that prefix; `None` when no line loads it."""

    def is_on(self, name: str, *, default: bool = False) -> bool:
        """Whether a switch is `true`."""
        return self.options.get(name, str(default)).lower() in {"true", "1"}

    def number(self, name: str, *, default: int) -> int:
        """Return a number, or the default where there is none that Mosquitto would take."""
        text = self.options.get(name, "")
        return int(text) if text.isdecimal() else default


@dataclass(frozen=True, slots=True)
class Advice:
    """A line for the operator: what is right, or (`wrong`) what to change."""

    text: str
    wrong: bool = False


def found_in(path: Path, findings: Iterable[Advice]) -> Iterator[Advice]:
    """Have each finding name the file that it is about."""
    return (Advice(f"{path}: {found.text}", found.wrong) for found in findings)


def report(findings: Iterable[Advice]) -> int:
    """Print one line for each; return the exit code: 1 if anything is wrong."""
    code = 0
    for finding in findings:
        typer.echo(f"{'PROBLEM' if finding.wrong else 'ok     '}  {finding.text}")
        code |= finding.wrong
    return code


def read_conf(path: Path) -> MosquittoConf:
    """Read the file and those of its `include_dir`, in Mosquitto's order.

    Raises:
        ConfigError: a file cannot be read.
    """
    conf = MosquittoConf()
    _read(path, conf, depth=0)
    return conf


def _read(path: Path, conf: MosquittoConf, *, depth: int) -> None:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"--mosquitto-conf: cannot read {path}: {error.strerror}") from error
    # The options of a plugin follow its line, in the same file.
    plugin: dict[str, str] | None = None
    for line in lines:
        name, _, value = line.strip().partition(" ")
        value = value.strip()
        if name == "include_dir" and depth < _DEPTH:
            for included in sorted(Path(value).glob("*.conf"), key=lambda file: file.name.lower()):
                _read(included, conf, depth=depth + 1)
        elif name in _PLUGIN_LINES:
            plugin = {} if _HOOK in value.rpartition("/")[2] else None
            conf.hook = conf.hook if plugin is None else plugin
        elif name.startswith("plugin_opt_"):
            if plugin is not None:
                plugin[name.removeprefix("plugin_opt_")] = value
        elif name and not name.startswith("#"):
            conf.options[name] = value


def advice(conf: MosquittoConf, *, spool: Path) -> Iterator[Advice]:
    """Say what of `conf` is right and what to change; `spool` is the sidecar's `spool.path`."""
    yield from _about_the_hook(conf, spool)
    yield from _about_who_may(conf)
    yield from advice_without_hook(conf)
    if not conf.number("max_queued_bytes", default=0):
        yield Advice(
            "max_queued_bytes is not set: one client that is away can take all memory; set it to 67108864", wrong=True
        )
    if conf.is_on("per_listener_settings"):
        yield Advice(
            "per_listener_settings is true: the hook sees the listener alone that its plugin line stands below; set it "
            "to false",
            wrong=True,
        )


def advice_without_hook(conf: MosquittoConf) -> Iterator[Advice]:
    """Say what matters to any client that messages must not be lost on the way to."""
    yield from _about_queues(conf)
    yield from _about_persistence(conf)
    if size := conf.number("message_size_limit", default=0):
        yield Advice(
            f"message_size_limit is {size}: Mosquitto drops what is longer without a word, the sidecar's too; replace "
            "it with max_packet_size",
            wrong=True,
        )
    if conf.is_on("set_tcp_nodelay"):
        yield Advice("set_tcp_nodelay true")
    else:
        yield Advice(
            "set_tcp_nodelay is false: a message that follows another at once waits 40 ms; set it to true", wrong=True
        )


def _about_the_hook(conf: MosquittoConf, spool: Path) -> Iterator[Advice]:
    if conf.hook is None:
        yield Advice(f"no line `plugin .../{_HOOK}.so`: Mosquitto works without the hook", wrong=True)
        return
    told = conf.hook.get("spool")
    if told is None or Path(told).absolute() != spool.absolute():
        yield Advice(f"plugin_opt_spool is {told}, spool.path is {spool}: both name one directory", wrong=True)
    token = conf.hook.get("token_file")
    if token is not None and _mode(Path(token)) & 0o007:
        yield Advice(f"{token} is open to everybody, who can then publish as the sidecar: chmod o= {token}", wrong=True)


def _mode(path: Path) -> int:
    """Return the mode of a file; 0 where there is none, or none that this user sees."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _about_who_may(conf: MosquittoConf) -> Iterator[Advice]:
    """What the hook's `auth` and `acl` make of Mosquitto's own means, and these of them."""
    if conf.hook is None:
        return
    auth, acl = conf.hook.get("auth"), conf.hook.get("acl")
    # As Mosquitto 2 has it where there is a listener.
    anonymous = conf.is_on("allow_anonymous", default="listener" not in conf.options)
    if auth == "allow" and ("password_file" in conf.options or not anonymous):
        yield Advice(
            "plugin_opt_auth is allow, which lets everybody in, whatever password_file and allow_anonymous say; "
            "set it to defer",
            wrong=True,
        )
    elif auth == "defer" and anonymous and "password_file" not in conf.options:
        yield Advice(
            "plugin_opt_auth is defer without a password_file: Mosquitto 2.0 refuses whoever has a user name; set it "
            "to allow, or give a password_file (another plugin that decides is as good)",
            wrong=True,
        )
    if acl == "allow" and "acl_file" in conf.options:
        yield Advice("plugin_opt_acl is allow, so that acl_file is not asked; set it to defer", wrong=True)
    elif acl == "defer" and "acl_file" not in conf.options:
        yield Advice(
            "plugin_opt_acl is defer without an acl_file: Mosquitto 2.0 denies everything; set it to allow, or give an "
            "acl_file (another plugin that decides is as good)",
            wrong=True,
        )


def _about_queues(conf: MosquittoConf) -> Iterator[Advice]:
    messages = conf.number("max_queued_messages", default=_DEFAULT_QUEUE)
    size = conf.number("max_queued_bytes", default=0)
    if messages == 0:
        yield Advice(
            "max_queued_messages is 0: Mosquitto 2.0.11 then closes the connection of a device with its next publish "
            f"after one that was denied; set it to {_LARGE_QUEUE}",
            wrong=True,
        )
    elif messages <= _DEFAULT_QUEUE:
        yield Advice(
            f"max_queued_messages is {messages}: QoS 1 and 2 messages beyond it are dropped for a client that is away "
            f"or slow, without a word; set it to {_LARGE_QUEUE}",
            wrong=True,
        )
    else:
        yield Advice(f"max_queued_messages {messages}, max_queued_bytes {size} for each client (0: no bound)")


def _about_persistence(conf: MosquittoConf) -> Iterator[Advice]:
    seconds = conf.number("autosave_interval", default=_DEFAULT_AUTOSAVE)
    if not conf.is_on("persistence"):
        yield Advice(
            "persistence is false: what Mosquitto keeps for clients that are away is lost at each restart, though "
            "settled in RocketMQ; set it to true, with a persistence_location",
            wrong=True,
        )
    elif not seconds:
        yield Advice(
            "autosave_interval is 0: what Mosquitto keeps for clients that are away is lost whenever it does not end "
            "in good order; set it to 300",
            wrong=True,
        )
    else:
        yield Advice(f"persistence true, saved each {seconds} s (autosave_interval)")
