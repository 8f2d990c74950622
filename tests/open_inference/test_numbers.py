"""JSON numbers become the nearest numbers of the data type, ties to even: rounded once."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from batchnorm_client.wire.errors import InvalidRequest
from batchnorm_service.open_inference.numbers import numbers_in

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def values(dtype):
    """All finite numbers of a dtype that are not negative, ascending, by their bits."""
    bits = torch.arange(0x7C00 if dtype == "float16" else 0x7F80, dtype=torch.int16)
    return bits.view(DTYPES[dtype]).double().numpy()


def rounded(number, grid):
    """The bits of the number on the grid that is nearest, by exact arithmetic."""
    at = int(np.searchsorted(grid, abs(number), side="right")) - 1
    below, above = (Fraction(float(grid[at])), Fraction(float(grid[min(at + 1, len(grid) - 1)])))
    middle = (below + above) / 2
    size = Fraction(abs(number))
    up = size > middle or (size == middle and at % 2 == 1)
    return (at + up) | (0x8000 if math.copysign(1, number) < 0 else 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_rounded_once(dtype):
    """By way of float32, some that lie beside a tie would go the wrong way."""
    grid = values(dtype)
    random = np.random.default_rng(0)
    chosen = grid[random.integers(0, len(grid) - 1, 300)]
    above = grid[np.searchsorted(grid, chosen) + 1]
    ties = (chosen + above) / 2
    numbers = np.concatenate(
        [chosen, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), random.normal(size=300), [0.0, 1e-300]]
    )
    numbers = np.concatenate([numbers, -numbers])
    found = np.frombuffer(numbers_in(numbers.tolist(), dtype).buffer, np.uint16)
    assert found.tolist() == [rounded(number, grid) for number in numbers.tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_fit(dtype):
    grid = values(dtype)
    limit = float(grid[-1] + (grid[-1] - grid[-2]) / 2)
    assert numbers_in([float(np.nextafter(limit, 0))], dtype).buffer == numbers_in([float(grid[-1])], dtype).buffer
    for number in (limit, -limit, 1e300):
        with pytest.raises(InvalidRequest, match=f"does not fit {dtype}"):
            numbers_in([0, number], dtype)
    tensor = numbers_in(["NaN", "Infinity", "-Infinity"], dtype)
    found = torch.frombuffer(bytearray(tensor.buffer), dtype=DTYPES[dtype]).double().numpy()
    np.testing.assert_array_equal(found, [np.nan, np.inf, -np.inf])
