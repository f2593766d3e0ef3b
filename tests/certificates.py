"""Certificates for tests: an authority of a test's own, and what it issues. Made with the `openssl` command."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest


class Certificate(NamedTuple):
    """Two PEM files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority whose own certificate is in the file `ca`."""

    def __init__(self, directory: Path) -> None:
        _need_openssl()
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._own = self._make("ca", "-subj", "/CN=test authority", "-addext", "basicConstraints=critical,CA:TRUE")
        self.ca = self._own.certificate

    def issue(self, name: str, *, names: str = "IP:127.0.0.1") -> Certificate:
        """Return a new certificate and its key; `names` is what it is good for, as `subjectAltName` has it."""
        signing = ["-CA", str(self._own.certificate), "-CAkey", str(self._own.key)]
        return self._make(name, "-subj", f"/CN={name}", "-addext", f"subjectAltName={names}", *signing)

    def _make(self, name: str, *arguments: str) -> Certificate:
        made = Certificate(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        files = ["-keyout", str(made.key), "-out", str(made.certificate)]
        subprocess.run(["openssl", "req", "-x509", *new, *files, *arguments], check=True, capture_output=True)
        return made


def _need_openssl() -> None:
    if shutil.which("openssl") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no openssl to make certificates with", pytrace=False)
        pytest.skip("no openssl to make certificates with")
