"""A Mosquitto with the hook as a child process, for the quickstart."""

import asyncio
import secrets
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from pathlib import Path
from typing import Final

import mq2mqtt
from mq2mqtt.quickstart.prerequisites import PrerequisiteError, Say, require_mosquitto
from mq2mqtt.quickstart.process import Child

__all__ = ["RunningMosquitto", "find_hook"]

_HOOK: Final = "mq2mqtt_hook.so"
# Where `make install` puts it, by prefix and distribution.
_INSTALLED: Final = tuple(
    f"{prefix}/{library}" for prefix in ("usr/local", "usr") for library in ("lib/mq2mqtt", "lib/*-linux-gnu")
)
_SOURCES: Final = Path(mq2mqtt.__file__).parents[2] / "plugins" / "mosquitto_hook"
_STOP_DEADLINE: Final = 15.0


async def find_hook(directory: Path, say: Say) -> tuple[str, Path]:
    """Return the files of Mosquitto and of its hook: an installed one, else one that is built in `directory`.

    Raises:
        PrerequisiteError: one of them is missing, and could not be installed or built.
    """
    installed = _installed_hook()
    mosquitto = await require_mosquitto(say, build=installed is None)
    return mosquitto, installed or await _build(directory, say)


def _installed_hook() -> Path | None:
    found = (file for place in _INSTALLED for file in Path("/").glob(f"{place}/{_HOOK}"))
    return next(found, None)


async def _build(directory: Path, say: Say) -> Path:
    if not _SOURCES.is_dir():
        raise PrerequisiteError(
            f"no {_HOOK} is installed here: `make -C plugins/mosquitto_hook install` in the sources"
        )
    say(f"building the hook in {directory}")
    process = await asyncio.create_subprocess_exec(
        *("make", "--silent", f"--directory={_SOURCES}", f"BUILD={directory}"),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        words = output.decode(errors="replace").strip().splitlines() or ["no output"]
        raise PrerequisiteError(f"the hook cannot be built: {words[-1]}")
    return directory / _HOOK


class RunningMosquitto:
    """The broker, with everything in `directory`. `spool` and `token_file` are for the sidecar."""

    def __init__(self, directory: Path, *, program: str, hook: Path, port: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.spool = directory / "spool"
        self.spool.mkdir(exist_ok=True)
        self.token_file = directory / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(f"{secrets.token_hex(32)}\n")
        self.config_file = directory / "mosquitto.conf"
        self.log_file = directory / "mosquitto.log"
        self._program = program
        # deploy/mosquitto.conf says why.
        lines = (
            f"listener {port} 127.0.0.1",
            "allow_anonymous true",
            "set_tcp_nodelay true",
            "max_queued_messages 1000000",
            "max_queued_bytes 67108864",
            # Started by root it would become another user, who cannot read this directory.
            "user root",
            f"plugin {hook}",
            f"plugin_opt_spool {self.spool}",
            f"plugin_opt_token_file {self.token_file}",
            "plugin_opt_auth allow",
            "plugin_opt_acl allow",
        )
        self.config_file.write_text("".join(f"{line}\n" for line in lines))
        self._child: Child | None = None

    def start(self, say: Say) -> None:
        """Start it and wait for nothing: the sidecar does."""
        say(f"starting Mosquitto with the hook: {self._program} -c {self.config_file}")
        self.log_file.write_bytes(b"")
        self._child = Child([self._program, "-c", str(self.config_file)], output=self.log_file, cwd=Path.cwd())

    @property
    def last_words(self) -> str | None:
        """See `Child.last_words`."""
        return None if self._child is None else self._child.last_words

    def stop(self) -> None:
        """Stop it as a service manager does (SIGTERM); blocks. Idempotent."""
        if self._child is not None:
            self._child.terminate(_STOP_DEADLINE)
