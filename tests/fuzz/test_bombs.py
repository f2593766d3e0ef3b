"""Small inputs that stand for large ones: what they cost is bounded."""

import subprocess
import sys
from pathlib import Path

from tests.fuzz.bombs import BOMBS

ROOT = Path(__file__).parents[2]


def test_bombs_cost_little() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.bombs"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.splitlines() == list(BOMBS)
