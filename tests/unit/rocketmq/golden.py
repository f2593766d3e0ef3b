"""Bytes that the Java client wrote (`golden.json` says which classes)."""

import json
from pathlib import Path

_VALUES: dict[str, str] = json.loads((Path(__file__).parent / "golden.json").read_text())


def golden_text(name: str) -> str:
    return _VALUES[name]


def golden_bytes(name: str) -> bytes:
    return bytes.fromhex(_VALUES[name])
