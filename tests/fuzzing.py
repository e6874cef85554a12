# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Strategies for input that no program wrote: JSON of any shape, and files with bytes changed."""

from __future__ import annotations

import os

from hypothesis import settings
from hypothesis import strategies as st

__all__ = ["fuzzed", "json_values", "mutated"]

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
"""Multiplies the examples of each property; `make test-reliability` raises it."""


def fuzzed(examples: int = 100) -> settings:
    """Settings of a property that can be tried more often than the tests have time for.

    Args:
        examples: how often the tests try it.
    """
    return settings(max_examples=examples * FACTOR, deadline=None)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
"""What JSON can hold, and NaN, which Python's reader accepts."""


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with bytes turned over, cut out, doubled or put in, and perhaps cut off.

    Args:
        draw: given by hypothesis.
        content: the file.
    """
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(changed) - 1, 0)))
        stop = min(start + draw(st.integers(0, 40)), len(changed))
        kind = draw(st.sampled_from(["turn over", "cut out", "double", "put in", "cut off"]))
        if kind == "turn over" and changed:
            changed[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut out":
            del changed[start:stop]
        elif kind == "double":
            changed[stop:stop] = changed[start:stop] * draw(st.integers(1, 3))
        elif kind == "put in":
            changed[start:start] = draw(st.binary(max_size=8))
        else:
            del changed[stop:]
    return bytes(changed)
