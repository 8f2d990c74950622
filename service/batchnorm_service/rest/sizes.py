"""Limits on a batch's shape, for batches whose size in bytes says little.

A small binary body can declare a shape that is huge as JSON: with a dimension of 0 it has no data at all, and
dimensions of 1 add none, but JSON writes a list per index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate
from operator import mul
from typing import Final

from batchnorm_client.wire.errors import PayloadTooLarge
from batchnorm_client.wire.tensors import Tensor, codec

_MAX_EMPTY_ELEMENTS: Final = 1 << 20
_MAX_LISTS_PER_ELEMENT: Final = 8  # reached with more than 8 dimensions only: brackets would then outweigh the numbers


def check_elements(tensor: Tensor, most: int, forms: Iterable[str], *, field: str) -> None:
    """Refuse a batch whose shape is too large, before computing anything.

    Args:
        tensor: the batch.
        most: how many elements it may have; a dimension of 0 counts as 1.
        forms: the media types of request and response. If one is text, a batch with a dimension of 0 may have 2^20
            elements, and any batch may have `8 * most` nested lists.
        field: the tensor's name.

    Raises:
        PayloadTooLarge: it has more.
    """
    shape = tensor.shape
    text = any(codec(form).text for form in forms)
    if 0 < tensor.nbytes <= most and not (text and len(shape) > _MAX_LISTS_PER_ELEMENT):
        return  # it has no more elements than bytes
    elements = math.prod(n or 1 for n in shape)
    _check(elements, most, f"{field} has {elements} elements, a dimension of 0 counted as 1", field)
    if text:
        most = most if tensor.nbytes else min(most, _MAX_EMPTY_ELEMENTS)
        _check(elements, most, f"{field} has a dimension of 0, and in JSON {elements} elements", field)
        lists = sum(accumulate(shape[:-1], mul, initial=1))
        _check(lists, _MAX_LISTS_PER_ELEMENT * most, f"{field} would be {lists} lists in JSON", field)


def _check(got: int, most: int, detail: str, field: str) -> None:
    if got > most:
        detail += f"; at most {most} are taken, see BATCHNORM_MAX_ELEMENTS"
        raise PayloadTooLarge(detail, field=field, expected=most, got=got)
