"""Builds the hook's test program once, with sanitizers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.hook.driver import Driver, build


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ASan and UBSan: every byte read beyond a message ends it."""
    return build("sanitize", tmp_path_factory.mktemp("hook")) / "sanitize" / "driver"


@pytest.fixture
def driver(program: Path) -> Iterator[Driver]:
    with Driver(program) as running:
        yield running
