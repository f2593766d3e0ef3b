"""`mq2mqtt check` with a sidecar's configuration: do the broker, its hook and the spool directory fit?"""

import asyncio
import fcntl
import grp
import json
import os
import pwd
import stat
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from statistics import median
from typing import Final

from mq2mqtt.settings import Settings
from mq2mqtt_mosquitto.client import Incoming, MqttClient, MqttError, Subscription
from mq2mqtt_mosquitto.control import (
    CONTROL_TOPIC,
    RESULTS_TOPIC,
    Answer,
    ControlError,
    OperationCode,
    Refused,
    Stats,
    Welcome,
    WelcomeFlags,
    decode_answer,
    encode_batch,
    encode_operation,
)
from mq2mqtt_mosquitto.greeting import login_of, objection
from mq2mqtt_mosquitto.mosquitto_conf import Advice, advice, found_in, read_conf, report

__all__ = ["check_host"]

_ANSWER_SECONDS = 5.0
_GREETINGS: Final = 7
_STALL_SECONDS: Final = 0.02
"""Between two answers written at once: without Nagle's algorithm some microseconds, with it 40 ms."""


async def check_host(settings: Settings, mosquitto_conf: Path | None) -> int:
    """Print one line per finding; return the exit code.

    Raises:
        ConfigError: `mosquitto_conf` cannot be read, or a file of `host.tls` is no use.
    """
    # Read first: a file that cannot be read is no reason to connect to the broker.
    of_conf: list[Advice] = []
    if mosquitto_conf is not None:
        of_conf += found_in(mosquitto_conf, advice(read_conf(mosquitto_conf), spool=settings.spool.path))
    findings = list(_spool(settings.spool.path))
    findings += [finding async for finding in _broker(settings, asks_conf=mosquitto_conf is None)]
    findings += of_conf
    return report(findings)


def _spool(path: Path) -> Iterator[Advice]:
    """Can both write there, and nobody else read?"""
    try:
        status = path.stat()
    except OSError as error:
        yield Advice(
            f"spool.path {path}: {error.strerror}; make it, with mode 2770 and a group that Mosquitto's user and the "
            "sidecar's have in common",
            wrong=True,
        )
        return
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        yield Advice(f"spool.path {path}: this user may not write there; run check as the sidecar's user", wrong=True)
        return
    mode = stat.S_IMODE(status.st_mode)
    users = _users(path)
    if mode & 0o007:
        yield Advice(f"spool.path {path} is open to everybody, with what devices publish: chmod o= {path}", wrong=True)
    if mode & stat.S_IWGRP and not mode & stat.S_ISGID:
        yield Advice(
            f"spool.path {path}: what is made in it is not its group's, as mode {mode:o} has it: chmod g+s {path}",
            wrong=True,
        )
    elif not mode & stat.S_IWGRP and len(users) > 1:
        yield Advice(
            f"spool.path {path}: {' and '.join(users)} write there, and mode {mode:o} is for one of them: chgrp it to "
            f"a group that both have, and chmod 2770 {path}",
            wrong=True,
        )
    else:
        yield Advice(f"spool.path {path}: mode {mode:o}, group {_name(grp.getgrgid, status.st_gid)}")


def _users(path: Path) -> list[str]:
    """Name those who have written there: the hook its table, the sidecar its instance."""
    owners = {file.stat().st_uid for file in (path / "lanes.table", path / "instance") if file.exists()}
    return sorted(_name(pwd.getpwuid, owner) for owner in owners)


def _name(lookup: object, number: int) -> str:
    """Return the name of a user or group, or its number in a container that does not know it."""
    try:
        return str(lookup(number)[0])  # type: ignore[operator]
    except KeyError:
        return str(number)


async def _broker(settings: Settings, *, asks_conf: bool) -> AsyncIterator[Advice]:
    if _is_running(settings.spool.path):
        yield Advice(f"a sidecar runs on {settings.spool.path}: its connection to {settings.host.url} is left alone")
        for finding in await asyncio.to_thread(_readiness, settings.admin.listen):
            yield finding
    else:
        async for finding in _conversation(settings):
            yield finding
    if asks_conf:
        yield Advice("Mosquitto tells nobody its queue limits: --mosquitto-conf FILE looks at them")


def _is_running(spool: Path) -> bool:
    """Whether a bridge has the spool now, or may have it: two with one client id would throw each other out."""
    try:
        descriptor = os.open(spool / "instance", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        # Only the sidecar's own user can see whether it is locked; the group can read the login.
        return True
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _readiness(listen: str) -> list[Advice]:
    """Say what the sidecar that runs says of itself."""
    url = f"http://{listen}/readyz"
    try:
        try:
            with urllib.request.urlopen(url, timeout=_ANSWER_SECONDS) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            answer = json.load(error)
        down = [rule for rule in answer["rules"] if rule["state"] == "down"]
    except (OSError, ValueError, KeyError) as error:
        return [Advice(f"{url}: {error}", wrong=True)]
    if not down:
        return [Advice(f"{url}: no rule is down")]
    return [Advice(f"{url}: rule {rule['id']} is down: {rule['reason']}", wrong=True) for rule in down]


async def _conversation(settings: Settings) -> AsyncIterator[Advice]:
    """Log in as the sidecar does, and greet the hook."""
    url = settings.host.url
    visit = _Visit()
    try:
        client = await MqttClient.connect(login_of(settings), received=visit.received, room=_ignore)
    except TimeoutError:
        yield Advice(f"host.url {url}: the broker does not answer", wrong=True)
        return
    except OSError as error:
        yield Advice(f"host.url {url}: {error.strerror or error}", wrong=True)
        return
    except MqttError as error:
        yield Advice(f"host.url {url}: {error}; is host.token the line in plugin_opt_token_file?", wrong=True)
        return
    try:
        await client.subscribe([Subscription(RESULTS_TOPIC)])
        gaps = [await visit.greet(client, number) for number in range(1, _GREETINGS + 1)]
    except TimeoutError:
        yield Advice(
            f"host.url {url}: the login is good, but no hook answers; load its plugin, with this sidecar's client id",
            wrong=True,
        )
        return
    except (OSError, MqttError, ControlError) as error:
        yield Advice(f"host.url {url}: {error}", wrong=True)
        return
    finally:
        client.close()
    for finding in _about(visit.welcome, settings.spool.path):
        yield finding
    if not url.startswith("unix:"):
        yield _about_stalls(median(gaps))


def _about(welcome: Welcome | None, spool: Path) -> Iterator[Advice]:
    if welcome is None:
        yield Advice("the hook answers a greeting with something else; is it of this version?", wrong=True)
        return
    auth, acl = (
        "allow" if flag in welcome.flags else "defer" for flag in (WelcomeFlags.AUTH_ALLOW, WelcomeFlags.ACL_ALLOW)
    )
    version = ".".join(map(str, welcome.version))
    problem = objection(welcome, spool)
    if problem is None:
        yield Advice(f"hook {version} in Mosquitto {welcome.broker_version}: auth {auth}, acl {acl}, spool {spool}")
    else:
        yield Advice(problem, wrong=True)
    for line in welcome.problems:
        yield Advice(f"the hook: {line}", wrong=True)


def _about_stalls(gap: float) -> Advice:
    if gap > _STALL_SECONDS:
        return Advice(
            f"a message that follows another at once waits {gap * 1000:.0f} ms: set_tcp_nodelay true in mosquitto.conf",
            wrong=True,
        )
    return Advice("messages that follow one another at once do not wait (set_tcp_nodelay)")


class _Visit:
    """Greetings, one at a time: WELCOME, and STATS right behind it."""

    def __init__(self) -> None:
        self.welcome: Welcome | None = None
        self._arrived: dict[type[Answer], float] = {}
        self._changed = asyncio.Event()

    def received(self, message: Incoming) -> None:
        _, answer = decode_answer(message.payload)
        if isinstance(answer, Welcome):
            self.welcome = answer
        self._arrived[type(answer)] = asyncio.get_running_loop().time()
        self._changed.set()

    async def greet(self, client: MqttClient, number: int) -> float:
        """Return the seconds between the two answers; raises `TimeoutError` without them, `MqttError` if refused."""
        self._arrived.clear()
        client.publish(CONTROL_TOPIC, encode_batch(number, [encode_operation(OperationCode.HELLO)]))
        async with asyncio.timeout(_ANSWER_SECONDS):
            while not self._arrived.keys() >= {Welcome, Stats}:
                if Refused in self._arrived:
                    raise MqttError("the hook refuses a greeting; is it of this version?")
                if client.closed.done():
                    raise MqttError(client.closed.result())
                self._changed.clear()
                await self._changed.wait()
        return self._arrived[Stats] - self._arrived[Welcome]


def _ignore() -> None:
    """Nothing waits for room."""
