"""`Tensor`: a view of arrays and bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as arrays

from batchnorm_client.wire.tensors import Tensor, itemsize

WIDTHS = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
}


@pytest.mark.parametrize(("dtype", "width"), WIDTHS.items())
def test_itemsize(dtype: str, width: int) -> None:
    assert itemsize(dtype) == width


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="float7"):
        itemsize("float7")
    with pytest.raises(ValueError, match="float7"):
        Tensor("float7", (1,), b"1")


@pytest.mark.parametrize("buffer", [b"", b"1234567", b"123456789", memoryview(bytes(16)).cast("d")])
def test_buffer_of_another_length(buffer: bytes) -> None:
    with pytest.raises(ValueError, match="8 bytes"):
        Tensor("float32", (2,), buffer)


@given(
    arrays.arrays(
        arrays.scalar_dtypes().filter(lambda d: d.kind in "biuf" and d.itemsize <= 8),
        arrays.array_shapes(min_dims=0, min_side=0),
    )
)
def test_array_round_trip(array: np.ndarray) -> None:
    tensor = Tensor.of(array)
    back = tensor.numpy()
    assert tensor.dtype == array.dtype.name
    assert tensor.shape == array.shape == back.shape
    assert tensor.nbytes == array.nbytes == back.nbytes
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 3)])
def test_contiguous_array_is_viewed(shape: tuple[int, ...]) -> None:
    array = np.ones(shape, np.float32)
    tensor = Tensor.of(array)
    assert np.shares_memory(tensor.numpy(), array) == (array.size > 0)
    assert memoryview(tensor.buffer).format == "B"


def test_other_layouts_are_copied() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert bytes(Tensor.of(array.T).buffer) == np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes()
    assert bytes(Tensor.of(array[:, ::2]).buffer) == np.array([0, 2, 3, 5], "<f4").tobytes()
    assert bytes(Tensor.of(array.astype(">f4")).buffer) == array.tobytes()


def test_view_is_as_writable_as_its_buffer() -> None:
    assert Tensor("float32", (1,), bytearray(4)).numpy().flags.writeable
    assert not Tensor("float32", (1,), bytes(4)).numpy().flags.writeable


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2"])
def test_what_numpy_has_not(dtype: str) -> None:
    with pytest.raises(TypeError, match=dtype):
        Tensor(dtype, (2,), bytes(2 * WIDTHS[dtype])).numpy()


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([object()]), np.array([1 + 1j]), np.zeros(1, "f4,i4")])
def test_what_cannot_be_sent(array: np.ndarray) -> None:
    with pytest.raises(TypeError, match="cannot be sent"):
        Tensor.of(array)
