"""A real Mosquitto with the hook, and the sidecar's end of `$CONTROL/mq2mqtt/v1`."""

import asyncio
import functools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from mq2mqtt.quickstart.ports import free_port
from mq2mqtt.spool.frame import Frame
from mq2mqtt.spool.inspect import read_entries
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.reader import LaneReader
from tests.mqtt_client import Client, Message, publish_packet
from tests.unit.hook.batches import Operation, batch
from tests.unit.hook.driver import HOOK
from tests.waiting import until

TOKEN: Final = "a-token-of-32-characters-exactly"  # noqa: S105 - the test's own
SIDECAR: Final = "mq2mqtt-sidecar"
ANSWERS, RESULTS = "$mq2mqtt/v1", "$mq2mqtt/v1/results"
WELCOME, RESULT, TABLE, CLIENTS, REFUSED, STATS = range(1, 7)
DELIVERED, NO_SUBSCRIBER, OFFLINE, NOT_TAKEN = range(4)
MAX_BYTES: Final = 1 << 20


def mosquitto_program() -> str:
    """Return the broker: `MOSQUITTO` in the environment names another one."""
    found = os.environ.get("MOSQUITTO") or shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    assert found, "the tests of the Mosquitto hook need Mosquitto (Debian: mosquitto, mosquitto-dev)"
    return found


@functools.cache
def says_why() -> bool:
    """Whether this broker lets the hook see why a client goes: 2.1 does, of 2.0 only builds like Debian's."""
    symbols = subprocess.run(["nm", "-D", mosquitto_program()], capture_output=True, text=True, check=True).stdout
    return "mosquitto__get_state" in symbols


def wrapper() -> tuple[list[str], dict[str, str]]:
    """Return what goes before Mosquitto's command line: `MQ2MQTT_HOOK=sanitize|valgrind` in the environment."""
    how = os.environ.get("MQ2MQTT_HOOK", "")
    if how == "sanitize":
        library = subprocess.run(
            ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        return [], {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    if how == "valgrind":
        # Mosquitto 2.0.11 has leaks of its own: `stop` looks for those of the hook.
        options = [
            "--error-exitcode=99",
            "--leak-check=full",
            "--errors-for-leak-kinds=none",
            "--keep-debuginfo=yes",
            # What the C library frees by itself at the end, after a resolver's thread, is no business of the hook.
            "--run-libc-freeres=no",
            "-q",
        ]
        return ["valgrind", *options], {}
    return [], {}


class Mosquitto:
    """A broker of the test's own on a free port, with its spool below `directory`."""

    def __init__(self, directory: Path, hook: Path) -> None:
        self.directory = directory
        self.hook = hook
        self.port = free_port()
        self.spool = directory / "spool"
        self.spool.mkdir(mode=0o700, exist_ok=True)
        self.options = {
            "spool": str(self.spool),
            "auth": "allow",
            "acl": "allow",
            "token_file": str(directory / "token"),
        }
        (directory / "token").write_text(TOKEN + "\n")
        self.lines = ["allow_anonymous true"]
        self.general: list[str] = []
        """Lines before the listener."""
        self.log = directory / "mosquitto.log"
        self._process: subprocess.Popen[bytes] | None = None

    def configuration(self) -> str:
        options = [f"plugin_opt_{name} {value}" for name, value in self.options.items()]
        return "\n".join(
            [
                "user root",
                "set_tcp_nodelay true",
                *self.general,
                f"listener {self.port} 127.0.0.1",
                *self.lines,
                f"plugin {self.hook}",
                *options,
                "",
            ]
        )

    def launch(self) -> None:
        path = self.directory / "mosquitto.conf"
        path.write_text(self.configuration())
        before, environment = wrapper()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*before, mosquitto_program(), "-c", path], stdout=log, stderr=log, env={**os.environ, **environment}
            )

    async def start(self) -> Self:
        said = self.log.stat().st_size if self.log.exists() else 0
        self.launch()

        async def listens() -> bool:
            # It listens before it can be told to end.
            if b" running" not in self.log.read_bytes()[said:]:
                return False
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                return True
            return False

        for _ in range(1800):
            assert self.process.poll() is None, self.log.read_text()
            if await listens():
                return self
            await asyncio.sleep(0.05)
        raise AssertionError(self.log.read_text())

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    def refused_to_start(self) -> str:
        """Start, see that it ends by itself, and return what it said."""
        self.launch()
        assert self.process.wait(60) != 0
        return self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    async def stop(self) -> None:
        """End it as a system does; a sanitizer's complaint fails the test."""
        process = self._process
        if process is None or process.poll() is not None:
            return

        def ended() -> bool:
            # Again and again: Mosquitto forgets one that comes before its loop.
            process.send_signal(signal.SIGTERM)
            return process.poll() is not None

        await until(ended, what="Mosquitto does not end")
        said = self.log.read_text(errors="replace")
        assert process.returncode == 0, said[-5000:]
        assert "AddressSanitizer" not in said
        if "definitely lost" in said:
            sources = "|".join(path.stem for path in HOOK.glob("*.c"))
            assert not re.search(rf"\(({sources})\.c:\d+\)", said), said[-5000:]

    async def connect(self, client_id: str, **options: Any) -> Client:  # noqa: ANN401 - those of Client.connect
        return await Client.connect(self.port, client_id, **options)

    def frames(self, rule: str) -> list[Frame]:
        path = self.spool / rule
        return [entry.frame for entry in read_entries(path)] if path.is_dir() else []

    def payloads(self, rule: str) -> list[bytes]:
        return [frame.payload for frame in self.frames(rule)]

    def events(self) -> list[dict[str, Any]]:
        """Return the client events in the order in which they were written, each with its `clientId`."""
        return [{"clientId": frame.client_id, **json.loads(frame.payload)} for frame in self.frames(".clients")]

    async def gone(self, client_id: str) -> dict[str, Any]:
        """Wait until a client that has sent DISCONNECT is gone; return that event."""
        event = await self.event("disconnect" if says_why() else "tcpclean", client_id)
        assert event["reason"] == ("disconnect" if says_why() else "unknown")
        return event

    async def event(self, kind: str, client_id: str) -> dict[str, Any]:
        """Wait for an event; return the last one of that kind."""

        def found() -> list[dict[str, Any]]:
            return [event for event in self.events() if (event["type"], event["clientId"]) == (kind, client_id)]

        await until(found, what=f"{kind} of {client_id}")
        return found()[-1]


def table_of(  # noqa: PLR0913 - the table's fields
    lanes: dict[str, str],
    parents: Iterable[str] = (),
    *,
    max_bytes: int = MAX_BYTES,
    durability: str = "process",
    topic_chars: int | str = "-",
    payload_bytes: int | str = "-",
) -> bytes:
    """Return the lane table's text: lanes by rule id, and the parent topics of all rules."""
    lines = [f"mq2mqtt-table\t1\t{max_bytes}\t{durability}\t{topic_chars}\t{payload_bytes}"]
    lines += [f"lane\t{rule}\t{parent}" for rule, parent in lanes.items()]
    lines += [f"parent\t{parent}" for parent in (*lanes.values(), *parents)]
    return "\n".join([*lines, ""]).encode()


class Answer(NamedTuple):
    kind: int
    entries: int
    number: int
    body: bytes

    @property
    def text(self) -> str:
        """Of an answer that is a text behind its length."""
        (size,) = struct.unpack_from("<I", self.body)
        assert len(self.body) == 4 + size
        return self.body[4:].decode()


class Sidecar:
    """The sidecar's connection: asks, and takes the answers."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.number = 0
        self._answers: list[Answer] = []
        self._seen = 0

    @classmethod
    async def connect(cls, broker: Mosquitto, *, parents: Iterable[str] = ()) -> Self:
        client = await broker.connect(SIDECAR, clean=False, username="mq2mqtt", password=TOKEN)
        await client.subscribe((RESULTS, 0), *((f"{parent}/#", 1) for parent in parents))
        return cls(client)

    def send(self, *operations: Operation) -> int:
        self.number += 1
        self.send_bytes(batch(*operations, number=self.number))
        return self.number

    def send_bytes(self, payload: bytes) -> None:
        self.client.send(publish_packet("$CONTROL/mq2mqtt/v1", payload))

    def _take(self) -> None:
        for message in self.client.messages[self._seen :]:
            assert message.topic in {ANSWERS, RESULTS}, f"the sidecar was shown {message}"
            assert message.qos == 0
            version, kind, count, number = struct.unpack_from("<BBHI", message.payload)
            assert version == 1
            self._answers.append(Answer(kind, count, number, message.payload[8:]))
        self._seen = len(self.client.messages)

    async def answer(self, kind: int, number: int) -> Answer:
        """Wait for an answer and take it."""

        def found() -> bool:
            self._take()
            return any((answer.kind, answer.number) == (kind, number) for answer in self._answers)

        await self.client.wait(found, f"answer {kind} to {number}")
        answer = next(one for one in self._answers if (one.kind, one.number) == (kind, number))
        self._answers.remove(answer)
        return answer

    async def results(self, *operations: Operation) -> list[int]:
        answer = await self.answer(RESULT, self.send(*operations))
        assert answer.entries == len(operations)
        return list(answer.body)

    async def table(self, text: bytes) -> tuple[bool, str]:
        answer = await self.answer(TABLE, self.send(Operation(2, payload=text)))
        return bool(answer.body[0]), answer._replace(body=answer.body[1:]).text

    async def stats(self) -> dict[tuple[str, str], int]:
        """Return the counters."""
        return {(name, rule): int(value) for name, rule, value in await self._stats_lines() if name != "problem"}

    async def problems(self) -> dict[str, str]:
        """Return why lanes take nothing now, by rule."""
        return {rule: value for name, rule, value in await self._stats_lines() if name == "problem"}

    async def _stats_lines(self) -> list[list[str]]:
        answer = await self.answer(STATS, self.send(Operation(7)))
        lines = [line.split("\t") for line in answer.text.splitlines()]
        assert len(lines) == answer.entries
        return lines


def only(messages: list[Message]) -> Message:
    (message,) = messages
    return message


def settle(path: Path) -> None:
    """Settle all as the sidecar does, by the cursor: the lane has its writer, so it is made from a copy."""
    copy = path.with_name("copy") / path.name
    shutil.copytree(path, copy)
    lane = Lane.open(copy, max_bytes=1 << 20, target="t")
    reader = LaneReader(lane)
    reader.read(max_messages=1000)
    reader.settle_to(reader.position)
    reader.close()
    lane.close()
    for name in ("lane.json", "cursor"):
        (path / name).write_bytes((copy / name).read_bytes())
    shutil.rmtree(copy.parent)
