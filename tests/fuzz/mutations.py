"""Bytes that are almost what a real program writes."""

import struct

from hypothesis import strategies as st

__all__ = ["mutations"]

_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0xFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_FORMATS = (">B", ">H", "<H", ">I", "<I")
_TEXTS = (b"null", b"[]", b"{}", b"-1", b'"x"', b"1e999", b"9" * 30, b"!!int ", b"*x")
_MAX_MUTATIONS = 4


@st.composite
def mutations(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """Draw a seed with a few parts replaced by something else."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, _MAX_MUTATIONS))):
        data = _mutate(draw, data, seeds)
    return data


def _mutate(draw: st.DrawFn, data: bytes, seeds: tuple[bytes, ...]) -> bytes:
    """Replace a part, which may be empty, by another."""
    start = draw(st.integers(0, len(data)))
    end = min(len(data), start + draw(st.integers(0, 40)))
    part = data[start:end]
    match draw(st.sampled_from(("flip", "cut", "remove", "insert", "repeat", "splice", "number", "text"))):
        case "flip":
            part = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in part)
        case "cut":
            part, end = b"", len(data)
        case "remove":
            part = b""
        case "insert":
            part += draw(st.binary(min_size=1, max_size=20))
        case "repeat":
            part *= draw(st.integers(2, 50))
        case "splice":
            other = draw(st.sampled_from(seeds))
            part, end = other[draw(st.integers(0, len(other))) :], len(data)
        case "number":
            # A length or count, wherever one may be.
            layout = draw(st.sampled_from(_FORMATS))
            part = struct.pack(layout, draw(st.sampled_from(_NUMBERS)) & (1 << 8 * struct.calcsize(layout)) - 1)
            end = start + len(part)
        case _:
            part = draw(st.sampled_from(_TEXTS))
    return data[:start] + part + data[end:]
