"""A short search with libFuzzer for bytes that the hook's decoders stumble over; `make fuzz` searches longer."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.hook.driver import HOOK

SECONDS = 5 * int(os.environ.get("MQ2MQTT_THOROUGH", "1"))


@pytest.mark.timeout(120 + 3 * SECONDS)
@pytest.mark.skipif(shutil.which("clang-14") is None, reason="libFuzzer comes with clang-14 (Debian: clang-14)")
@pytest.mark.parametrize("target", ["control", "recovery", "table"])
def test_fuzz(target: str, tmp_path: Path) -> None:
    program = tmp_path / f"fuzz_{target}"
    subprocess.run(["make", "-C", HOOK, f"BUILD={tmp_path}", program], check=True, capture_output=True)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    searched = subprocess.run(
        [program, f"-max_total_time={SECONDS}", "-timeout=20", "-max_len=8192", "-verbosity=0", corpus],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert searched.returncode == 0, searched.stderr[-5000:]
