"""Child processes that outlive an event loop but never the program that started them."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Child", "die_with_parent"]

_PR_SET_PDEATHSIG = 1
# Loaded before any fork: the child may only call it.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_TAIL_BYTES = 2000


def die_with_parent() -> None:
    """In a freshly forked child: be killed when the thread that forked it ends, however it ends (prctl(2))."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """A program that runs in the background with its output in a file.

    It has its own session, so that Ctrl-C at the terminal reaches the program that owns it alone. Start it from a
    thread that lives as long as it should: the main one.
    """

    def __init__(
        self, command: Sequence[str], *, output: Path, cwd: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.output = output
        self._command, self._cwd = command, cwd
        self._env = None if env is None else os.environ | env
        self.start_again()

    def start_again(self) -> None:
        """Start the program, which has ended, once more."""
        with self.output.open("ab") as file:
            self._begin = file.tell()
            self._process = subprocess.Popen(  # noqa: S603 - commands come from this package
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self._cwd,
                env=self._env,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - it only makes one system call
            )
        self._paused = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """`None` while it runs."""
        return self._process.poll()

    def tail(self) -> str:
        """Return the last lines of its output since it was started, for an error text."""
        data = self.output.read_bytes()[self._begin :][-_TAIL_BYTES:]
        return data.decode(errors="replace").strip()

    @property
    def last_words(self) -> str | None:
        """Exit code and last line, once it has ended."""
        if self.exit_code is None:
            return None
        words = self.tail().splitlines() or ["no output"]
        return f"exit code {self.exit_code}: {words[-1]}"

    def pause(self) -> None:
        """Stop it where it is (SIGSTOP): its connections stay open and nothing answers."""
        self._process.send_signal(signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """Let a paused one go on."""
        self._process.send_signal(signal.SIGCONT)
        self._paused = False

    def kill(self) -> None:
        """End it with SIGKILL, paused or not, and wait for that. Idempotent."""
        self._process.kill()
        self._process.wait()

    def terminate(self, seconds: float) -> None:
        """Ask it to end, wait up to `seconds`, then kill it. Idempotent; blocks."""
        if self._paused:
            self.resume()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self.kill()
