"""Every decoder of bytes from outside, on mutations of what real programs write (`targets.py` has the table)."""

import pytest
from hypothesis import example, given

from tests.fuzz.mutations import mutations
from tests.fuzz.targets import TARGETS, Target
from tests.thorough import searching


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_decoded(name: str) -> None:
    target = TARGETS[name]
    for seed in target.seeds:
        target.decode(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_returns_or_raises_its_own_error(name: str) -> None:
    target: Target = TARGETS[name]

    @searching(200)
    @given(mutations(target.seeds))
    @example(b"")
    def search(data: bytes) -> None:
        target.check(data)

    search()
