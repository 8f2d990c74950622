"""Arrays of both kinds as tensors of the wire: views wherever that is possible, one copy where it is not."""

import numpy as np
import pytest
import torch

from batchnorm_client.arrays import from_wire, to_torch, to_wire
from batchnorm_client.wire.tensors import Tensor

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def address(tensor):
    return np.frombuffer(tensor.buffer, np.uint8).ctypes.data


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int64", "uint8", "bool"])
def test_torch_there_and_back(dtype):
    array = torch.from_numpy(ROWS).to(getattr(torch, dtype))
    tensor = to_wire(array)
    assert (tensor.dtype, tensor.shape) == (dtype, (4, 3))
    back = from_wire(tensor, array)
    assert torch.equal(back, array)
    assert back.dtype == array.dtype


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "uint8", "bool", ">f4"])
def test_numpy_there_and_back(dtype):
    array = ROWS.astype(dtype)
    back = from_wire(to_wire(array), array)
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype


def test_contiguous_arrays_are_not_copied():
    assert address(to_wire(ROWS)) == ROWS.ctypes.data
    assert address(to_wire(ROWS[1:])) == ROWS[1:].ctypes.data
    for array in (torch.from_numpy(ROWS), torch.ones(4, 3, requires_grad=True), torch.ones(4, 3).bfloat16()):
        assert address(to_wire(array)) == array.data_ptr()


def test_results_are_views_that_can_be_written_to():
    buffer = bytearray(to_wire(ROWS).buffer)
    tensor = Tensor("float32", (4, 3), memoryview(buffer))
    for like in (ROWS, torch.from_numpy(ROWS)):
        view = from_wire(tensor, like)
        view[0, 0] = 7
        assert np.frombuffer(buffer, np.float32)[0] == 7
        view[0, 0] = 0


@pytest.mark.parametrize("array", [ROWS[:, ::2], ROWS.T, ROWS[::-1], np.asfortranarray(ROWS)])
def test_other_layouts_are_copied_in_order(array):
    np.testing.assert_array_equal(to_wire(array).numpy(), array)
    if min(array.strides) > 0:
        np.testing.assert_array_equal(to_wire(torch.from_numpy(array)).numpy(), array)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), ()])
def test_shapes_with_little_in_them(shape):
    for array in (np.ones(shape, np.float32), torch.ones(shape), torch.ones(shape).bfloat16()):
        tensor = to_wire(array)
        assert tensor.shape == shape
        assert from_wire(tensor, array).shape == shape
        assert to_torch(tensor).shape == shape


@pytest.mark.parametrize(
    "array", [torch.zeros(2, dtype=torch.complex128), np.zeros(2, "c16"), np.array(["a"]), [1.0], 1.0]
)
def test_what_cannot_be_sent(array):
    with pytest.raises(TypeError):
        to_wire(array)


def test_tensors_pass():
    tensor = Tensor("bfloat16", (1,), b"\x80\x3f")
    assert to_wire(tensor) is tensor
