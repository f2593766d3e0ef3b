"""A real PostgreSQL for tests: in a temporary directory, run by a user without rights."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Self

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from mq2mqtt.quickstart.ports import free_port
from mq2mqtt.quickstart.prerequisites import find_program
from tests.bridge_process import wait_for

_START_SECONDS = 60.0
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "50",
    # What a test shows is the end of processes, not of the machine.
    "fsync": "off",
}


class PostgreSQL:
    """A server. Use as a context manager; nobody needs a password."""

    def __init__(self) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="mq2mqtt-postgresql-"))
        # It refuses to be root.
        self._user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        if self._user is not None:
            os.chown(self.directory, self._user, -1)

    def __enter__(self) -> Self:
        data = str(self.directory / "data")
        self._run(
            "initdb", "-D", data, "-U", "mq2mqtt", "--auth=trust", "-E", "UTF8", "--no-locale", "--no-sync"
        ).wait()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.directory)

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        settings = (f"--{name}={value}" for name, value in _SETTINGS.items())
        self._process = self._run("postgres", "-D", str(self.directory / "data"), "-p", str(self.port), *settings)
        wait_for(self._ready, seconds=_START_SECONDS, what=self.log)

    def stop(self) -> None:
        """End it without a word to anybody; what is committed is found at the next start. Idempotent."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=60)
            self._process = None

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-4000:]

    def url(self, database: str = "postgres", *, user: str = "mq2mqtt") -> str:
        return f"postgresql+asyncpg://{user}@127.0.0.1:{self.port}/{database}"

    async def new_database(self) -> str:
        """Return the URL of a new one."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        await self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    async def execute(self, statement: str, *, url: str | None = None) -> None:
        engine = create_async_engine(url or self.url(), isolation_level="AUTOCOMMIT", poolclass=NullPool)
        async with engine.connect() as connection:
            await connection.execute(text(statement))

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"PostgreSQL ended:\n{self.log()}"
        with contextlib.suppress(OSError):
            return b"database system is ready to accept connections" in self._since_start()
        return False

    def _since_start(self) -> bytes:
        return (self.directory / "log").read_bytes().rpartition(b"starting PostgreSQL")[2]

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        found = find_program(program)
        assert found is not None, f"no {program} here"
        with (self.directory / "log").open("ab") as log:
            return subprocess.Popen(
                [found, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                user=self._user,
                extra_groups=None if self._user is None else [],
            )
