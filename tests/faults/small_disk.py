"""A file system of a few megabytes that a test can fill and free again."""

import os
import subprocess
from pathlib import Path
from typing import Self

import pytest

_PAGE = 4096


class SmallDisk:
    """A tmpfs at `path`. Use as a context manager; skips the test where it cannot be mounted."""

    def __init__(self, path: Path, *, megabytes: int) -> None:
        self.path = path
        self._megabytes = megabytes

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            pytest.skip("only root can mount a small file system to fill")
        self.path.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={self._megabytes}m", "mq2mqtt-test", str(self.path)]
        made = subprocess.run(["mount", *options], check=False, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no small file system to fill: {made.stderr.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        # Lazy: a process that the test left behind must not keep it mounted.
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def fill(self, *, spare_pages: int = 0) -> None:
        """Leave so many pages free."""
        descriptor = os.open(self.path / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            while True:
                os.write(descriptor, bytes(_PAGE))
        except OSError:
            pass
        finally:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - spare_pages * _PAGE)
            os.close(descriptor)

    def free(self) -> None:
        (self.path / "filler").unlink()
