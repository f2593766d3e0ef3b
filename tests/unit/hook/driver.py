"""The test program of plugins/mosquitto_hook: the hook's C, one line asked and one answered."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final, Self

from mq2mqtt.spool.frame import Frame
from mq2mqtt.spool.machine import Machine

__all__ = ["HOOK", "Driver", "build"]

HOOK: Final = Path(__file__).parents[3] / "plugins" / "mosquitto_hook"


def build(target: str, directory: Path) -> Path:
    """Run `make` there; the compiler's warnings are errors."""
    assert shutil.which("cc"), "the tests of the Mosquitto hook need a C compiler (gcc) and mosquitto-dev"
    made = subprocess.run(
        ["make", "-C", str(HOOK), target, f"BUILD={directory}"], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return directory


def text(data: bytes) -> str:
    return data.hex() or "-"


class Driver:
    """A running test program. It ends with an `AssertionError` here when a sanitizer stops it."""

    def __init__(self, program: Path) -> None:
        # Remarks of lanes and a sanitizer's report; a pipe that nobody reads would fill.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the program
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)
        assert self._process.returncode == 0, self.errors()
        self._errors.close()

    def errors(self) -> str:
        """Return what the program has written to standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def ask(self, *words: object) -> str:
        """Send a command; return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(" ".join(map(str, words)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait(timeout=30)
            raise AssertionError(f"the hook's code crashed at {words[0]}: {self.errors()}")
        return answer.rstrip("\n")

    def be(self, machine: Machine) -> None:
        """Let the C code see the clock and boot id of `machine`."""
        assert self.ask("machine", machine.now_us(), machine.boot_id.hex()) == "set"

    def open(self, lane: Path, *, max_bytes: int = 1 << 20, durability: str = "process") -> tuple[int, int] | str:
        """Open a lane; return its next offset and unsent bytes, or why not."""
        answer = self.ask("open", lane, max_bytes, durability)
        kind, _, rest = answer.partition(" ")
        if kind == "refused":
            return rest
        assert kind == "opened", answer
        following, unsent = map(int, rest.split())
        return following, unsent

    def append(self, frame: Frame) -> tuple[int, int] | str:
        """Append a message; return the next offset and unsent bytes, or the refusal."""
        return result_of(self.ask("append", *fields_of(frame)))

    def trouble(self) -> str:
        """Return why the message that was refused last would be refused again, or `none`."""
        return self.ask("trouble")

    def many(self, count: int, size: int) -> tuple[int, int] | str:
        """Append `count` messages of `size` payload bytes."""
        return result_of(self.ask("many", count, size))

    def close_lane(self) -> None:
        assert self.ask("close") == "closed"


def fields_of(frame: Frame) -> list[object]:
    return [
        int(frame.kind),
        frame.flags,
        frame.accepted_us,
        text(frame.client_id.encode("utf-8", "surrogateescape")),
        text(frame.topic.encode("utf-8", "surrogateescape")),
        text(frame.properties),
        text(frame.payload),
    ]


def result_of(answer: str) -> tuple[int, int] | str:
    kind, _, rest = answer.partition(" ")
    if kind != "written":
        return answer
    following, unsent = map(int, rest.split())
    return following, unsent
