"""Prometheus' own checker, for tests of the alerts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def need_promtool(directory: Path) -> Path:
    """Find `promtool`, or take it out of Debian's package, which is unpacked in `directory` and never installed.

    Installing it would start a Prometheus on this machine. Skips the test where neither works; fails when `CI=true`.
    """
    found = shutil.which("promtool")
    if found is not None:
        return Path(found)
    if shutil.which("apt-get") is None:
        return _give_up("no `promtool` here, and no apt-get to fetch it with")
    fetched = _fetch(directory)
    if fetched.returncode != 0 and os.geteuid() == 0:
        # A machine that is new has no lists of packages yet.
        subprocess.run(["apt-get", "update", "-qq"], check=False, capture_output=True)
        fetched = _fetch(directory)
    packages = list(directory.glob("prometheus_*.deb"))
    if fetched.returncode != 0 or not packages:
        return _give_up(
            f"no `promtool` here, and `apt-get download prometheus` failed: {fetched.stderr.strip()[-200:]}"
        )
    subprocess.run(["dpkg-deb", "--extract", str(packages[0]), str(directory)], check=True)
    return directory / "usr" / "bin" / "promtool"


def _fetch(directory: Path) -> subprocess.CompletedProcess[str]:
    command = ["apt-get", "download", "-qq", "prometheus"]
    return subprocess.run(command, cwd=directory, check=False, capture_output=True, text=True)


def _give_up(reason: str) -> Path:
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
