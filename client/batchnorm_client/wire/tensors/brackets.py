"""JSON text of tensors with dimensions of 1 or 0, which have many nested lists for few elements.

orjson needs some hundred bytes of memory for each nested list of an array, and a dimension of 1 adds a list for each
element without adding a byte to the tensor. The functions here need memory for the text only.
"""

from __future__ import annotations

from typing import Final

import orjson

_FIRST_MARK: Final = 128  # JSON text of numbers is ASCII


def rewrapped(text: bytes, shape: tuple[int, ...]) -> bytes:
    """The JSON text of an array, from that of the same array without its dimensions of 1.

    Between two elements d innermost lists end and begin again: `]]` `,` `[[` for d = 2. Each dimension of 1 that lies
    within the d-th of those lists adds one more.

    Args:
        text: JSON of the array with its dimensions of 1 left out.
        shape: of the array; no dimension is 0.
    """
    kept = [axis for axis, n in enumerate(shape) if n != 1]
    inner = text[len(kept) : len(text) - len(kept)]
    marks = {depth: bytes([_FIRST_MARK + depth]) for depth in range(len(kept) - 1, 0, -1)}
    for depth, mark in marks.items():  # the deepest first: it contains the others
        inner = inner.replace(_between(depth), mark)
    for depth, mark in {0: b",", **marks}.items():
        if kept:
            inner = inner.replace(mark, _between(len(shape) - 1 - kept[-1 - depth]))
    return b"[" * len(shape) + inner + b"]" * len(shape)


def empty_lists(shape: tuple[int, ...]) -> orjson.Fragment:
    """The nested lists of an array without elements: they end where a dimension is 0."""
    text = b"[]"
    for n in reversed(shape[: shape.index(0)]):
        text = b"[" + b",".join([text] * n) + b"]"
    return orjson.Fragment(text)


def _between(depth: int) -> bytes:
    return b"]" * depth + b"," + b"[" * depth
