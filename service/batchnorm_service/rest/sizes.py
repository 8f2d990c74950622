"""How large a batch may be whose bytes do not tell.

A dimension of 0 leaves nothing of the others in a binary body, and a dimension of 1 adds nothing to it; but JSON writes
as many lists as the shape says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate
from operator import mul
from typing import Final

from batchnorm_client.wire.errors import PayloadTooLarge
from batchnorm_client.wire.tensors import Tensor, codec

_MOST_EMPTY_IN_TEXT: Final = 1 << 20
_LISTS_PER_ELEMENT: Final = 8  # as many dimensions; more of them, of length 1, would make more text than numbers do


def check_elements(tensor: Tensor, most: int, forms: Iterable[str], *, field: str) -> None:
    """Refuse a batch by its shape, before anything is done with it.

    Args:
        tensor: as the caller declared it.
        most: elements that a batch may have, a dimension of 0 counted as 1.
        forms: of the request and the response. If one is text, a batch with a dimension of 0 has at most 2^20
            elements, and it may have eight times as many lists as a batch may have elements.
        field: the tensor's name.

    Raises:
        PayloadTooLarge: it has more.
    """
    shape = tensor.shape
    text = any(codec(form).text for form in forms)
    if 0 < tensor.nbytes <= most and not (text and len(shape) > _LISTS_PER_ELEMENT):
        return  # it has no more elements than bytes
    elements = math.prod(n or 1 for n in shape)
    _check(elements, most, f"{field} has {elements} elements, a dimension of 0 counted as 1", field)
    if text:
        most = most if tensor.nbytes else min(most, _MOST_EMPTY_IN_TEXT)
        _check(elements, most, f"{field} has a dimension of 0, and in JSON {elements} elements", field)
        lists = sum(accumulate(shape[:-1], mul, initial=1))
        _check(lists, _LISTS_PER_ELEMENT * most, f"{field} would be {lists} lists in JSON", field)


def _check(got: int, most: int, detail: str, field: str) -> None:
    if got > most:
        detail += f"; at most {most} are taken, see BATCHNORM_MAX_ELEMENTS"
        raise PayloadTooLarge(detail, field=field, expected=most, got=got)
