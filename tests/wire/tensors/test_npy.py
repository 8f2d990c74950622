"""The .npy form against numpy's own reader and writer."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as arrays

from batchnorm_client.wire.errors import DtypeMismatch, MalformedBody, NotAcceptable, UnsupportedMediaType
from batchnorm_client.wire.media_types import JSON, NPY, SAFETENSORS
from batchnorm_client.wire.tensors import Tensor, decode, encode

NAMES = [
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "float16",
    "uint32",
    "int32",
    "float32",
    "uint64",
    "int64",
    "float64",
]
ARRAYS = arrays.arrays(
    arrays.scalar_dtypes().filter(lambda d: d.name in NAMES and d.byteorder != ">"),
    arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
)


def save(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def file_with(header: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text + data


def read(body: bytes | bytearray) -> Tensor:
    return decode(NPY, body, {"input": "float32"})["input"]


@given(ARRAYS)
def test_reads_what_numpy_saves(array: np.ndarray) -> None:
    tensor = read(save(np.ascontiguousarray(array).reshape(array.shape)))
    assert (tensor.dtype, tensor.shape) == (array.dtype.name, array.shape)
    np.testing.assert_array_equal(tensor.numpy(), array)


@given(ARRAYS)
def test_numpy_loads_what_it_writes(array: np.ndarray) -> None:
    back = np.load(io.BytesIO(b"".join(encode(NPY, {"output": Tensor.of(array)}))), allow_pickle=False)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.filterwarnings("ignore:Stored array in format")
def test_versions(version: tuple[int, int]) -> None:
    array = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(read(save(array, version)).numpy(), array)


def test_data_are_viewed_not_copied() -> None:
    body = bytearray(save(np.ones((3, 4), np.float32)))
    view = read(body).numpy()
    assert np.shares_memory(view, np.frombuffer(body, np.uint8))
    body[-4:] = np.float32(5).tobytes()
    assert view[2, 3] == 5


def test_data_that_lie_askew_are_copied() -> None:
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}"
    body = file_with(header + " " * ((-len(header) - 10) % 16 + 1), np.array([1.0, 2.0]).tobytes())
    view = read(body).numpy()
    assert view.flags.aligned
    assert view.tolist() == [1.0, 2.0]
    assert not np.shares_memory(view, np.frombuffer(body, np.uint8))


def test_other_writers_habits() -> None:
    """Key order, quotes and padding are not fixed by NEP 1."""
    body = file_with('{"shape": (2,), "descr": "<f4", "fortran_order": False}', np.array([1, 2], "<f4").tobytes())
    assert read(body).numpy().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("array", [np.array([1, None]), np.zeros(2, "f4,i4"), np.zeros(2, [("a", "f4")])])
def test_pickles_and_structures_are_never_read(array: np.ndarray) -> None:
    with pytest.raises(MalformedBody, match=r"pickled objects .* never read"):
        read(save(array))


def test_fortran_order() -> None:
    with pytest.raises(MalformedBody, match="ascontiguousarray"):
        read(save(np.asfortranarray(np.ones((2, 3), np.float32))))


@pytest.mark.parametrize("shape", ["()", "(1,)"])
def test_fortran_order_says_nothing_below_two_dimensions(shape: str) -> None:
    body = file_with(f"{{'descr': '<f4', 'fortran_order': True, 'shape': {shape}}}", np.float32(3).tobytes())
    assert read(body).numpy().reshape(-1).tolist() == [3.0]


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.ones(2, ">f4"), ">f4"),
        (np.ones(2, ">i8"), ">i8"),
        (np.ones(2, "c16"), "<c16"),
        (np.ones(2, "S3"), "|S3"),
        (np.ones(2, "U3"), "<U3"),
        (np.ones(2, "M8[s]"), "<M8[s]"),
        (np.ones(2, np.longdouble), np.dtype(np.longdouble).str),
        (np.zeros(2, "V2"), "|V2"),
    ],
)
def test_dtypes_that_are_not_read(array: np.ndarray, got: str) -> None:
    with pytest.raises(DtypeMismatch) as caught:
        read(save(array))
    assert caught.value.fields == {"field": "input", "expected": ["float16", "float32", "float64"], "got": got}


@pytest.mark.parametrize("length", [*range(0, 128, 9), 127, 128, 129, 151, 153, 300])
def test_every_other_length(length: int) -> None:
    body = save(np.ones((2, 3), np.float32))
    assert len(body) == 152
    with pytest.raises(MalformedBody):
        read((body + bytes(200))[:length])


@pytest.mark.parametrize(
    "shape",
    [
        "(3,)",
        "(-2,)",
        "(True, True)",
        "(2.0,)",
        "('2',)",
        "[2]",
        "2",
        "None",
        f"({2**64},)",
        f"({2**62}, {2**62})",
        f"(0, {2**63})",
        f"({2**40}, 0, {2**40})",
        "(1,) * 2",
        f"({'1,' * 65})",
        f"({'9' * 3000},)",
    ],
)
def test_shapes_that_lie(shape: str) -> None:
    with pytest.raises(MalformedBody):
        read(file_with(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}", bytes(8)))


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{}",
        "[]",
        "1",
        "{'descr': '<f4', 'fortran_order': False}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'more': 1}",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (2,)}",
        "{'descr': 4, 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)",
        "{'descr': '\\x3cf4', 'fortran_order': False, 'shape': (2,)}",
        "__import__('os').getpid()",
        "(" * 2000 + ")" * 2000,
        "{[]: 1}",
        "\0",
        "\xff",
    ],
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_headers_that_are_none(header: str, version: tuple[int, int]) -> None:
    with pytest.raises(MalformedBody):
        read(file_with(header, bytes(8), version))


@pytest.mark.parametrize("version", [(0, 0), (1, 1), (4, 0), (255, 255)])
def test_versions_that_are_not_known(version: tuple[int, int]) -> None:
    with pytest.raises(MalformedBody) as caught:
        read(file_with("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(8), version))
    assert caught.value.fields["got"] == list(version)


def test_header_is_bounded() -> None:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}"
    assert read(file_with(header.ljust(4096), bytes(8))).shape == (2,)
    with pytest.raises(MalformedBody, match="too large"):
        read(file_with(header.ljust(4097), bytes(8)))
    with pytest.raises(MalformedBody, match="too large"):
        read(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100))


def test_one_tensor_in_a_request() -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        decode(NPY, save(np.ones(2)), {"input": "float32", "grad_output": "float32"})
    assert caught.value.fields == {"expected": [JSON, SAFETENSORS], "got": NPY}


def test_one_tensor_in_an_answer() -> None:
    tensor = Tensor.of(np.ones(2))
    with pytest.raises(NotAcceptable):
        encode(NPY, {"output": tensor, "batch_mean": tensor})


def test_bfloat16_has_no_npy() -> None:
    with pytest.raises(NotAcceptable) as caught:
        encode(NPY, {"output": Tensor("bfloat16", (1,), bytes(2))})
    assert caught.value.fields["expected"] == [JSON, SAFETENSORS]
