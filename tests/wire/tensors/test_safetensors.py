"""The safetensors form against the official library."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load, save

from batchnorm_client.wire.errors import DtypeMismatch, MalformedBody
from batchnorm_client.wire.media_types import SAFETENSORS
from batchnorm_client.wire.tensors import (
    Tensor,
    decode,
    decode_safetensors,
    decode_safetensors_header,
    encode,
    encode_safetensors,
    itemsize,
)

CODES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
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
SETS = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name != "__metadata__"),
    arrays.arrays(
        arrays.scalar_dtypes().filter(lambda d: d.name in NAMES and d.byteorder != ">"),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
    ),
    max_size=4,
)
TEXT = st.text(max_size=8)


def file_with(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


@given(SETS, st.none() | st.dictionaries(TEXT, TEXT, max_size=3))
def test_reads_what_the_library_saves(given_arrays: dict[str, np.ndarray], metadata: dict[str, str] | None) -> None:
    tensors, read = decode_safetensors(
        save(given_arrays, metadata or None)
    )  # the library writes no valid JSON for {}, {}
    assert read == (metadata or {})
    assert tensors.keys() == given_arrays.keys()
    for name, array in given_arrays.items():
        assert (tensors[name].dtype, tensors[name].shape) == (array.dtype.name, array.shape)
        np.testing.assert_array_equal(tensors[name].numpy(), array)
        assert tensors[name].numpy().flags.aligned


@given(SETS, st.none() | st.dictionaries(TEXT, TEXT, max_size=3))
def test_the_library_loads_what_it_writes(given_arrays: dict[str, np.ndarray], metadata: dict[str, str] | None) -> None:
    tensors = {name: Tensor.of(array) for name, array in given_arrays.items()}
    body = b"".join(encode_safetensors(tensors, metadata))
    back = load(body)
    assert back.keys() == given_arrays.keys()
    for name, array in given_arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back[name], array)
    ours, read = decode_safetensors(body)
    assert read == (metadata or {})
    assert list(ours) == list(given_arrays)


@pytest.mark.parametrize(("code", "name"), CODES.items())
def test_every_dtype_by_name(code: str, name: str) -> None:
    """The library knows each of these codes too; `deserialize` gives raw bytes, so no reader of bfloat16 is needed."""
    data = bytes(range(2 * itemsize(name)))
    body = file_with({"x": entry(code, [2], [0, len(data)])}, data)
    tensors, _ = decode_safetensors(body)
    assert tensors["x"].dtype == name
    assert bytes(tensors["x"].buffer) == data
    written = b"".join(encode_safetensors(tensors))
    ((back_name, back),) = safetensors.deserialize(written)
    assert (back_name, back["shape"], bytes(back["data"])) == ("x", [2], data)
    assert json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])["x"]["dtype"] == code


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2"])
def test_dtypes_below_a_byte(code: str) -> None:
    with pytest.raises(DtypeMismatch) as caught:
        decode_safetensors(file_with({"x": entry(code, [4], [0, 2])}, bytes(2)))
    assert (caught.value.fields["field"], caught.value.fields["got"]) == ("x", code)


def test_data_are_viewed_not_copied() -> None:
    body = bytearray(save({"a": np.ones((3, 4), np.float32), "b": np.zeros(2, np.int64)}))
    tensors, _ = decode_safetensors(body)
    for tensor in tensors.values():
        assert np.shares_memory(tensor.numpy(), np.frombuffer(body, np.uint8))


def test_data_that_lie_askew_are_copied() -> None:
    header = {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [2], [1, 9])}
    body = file_with(header, b"\x07" + np.array([1, 2], "<f4").tobytes())
    tensors, _ = decode_safetensors(body + b"")
    assert tensors["b"].numpy().flags.aligned
    assert tensors["b"].numpy().tolist() == [1.0, 2.0]


def test_layout_is_the_given_order() -> None:
    tensors = {"z": Tensor.of(np.ones(1)), "a": Tensor.of(np.ones(2, np.float32)), "m": Tensor.of(np.ones(3, np.int8))}
    body = b"".join(encode_safetensors(tensors, {"format": "pt"}))
    header, start = decode_safetensors_header(body)
    assert start % 8 == 0
    assert start == 8 + int.from_bytes(body[:8], "little")
    assert {name: fields["data_offsets"] for name, fields in header.items() if name != "__metadata__"} == {
        "z": [0, 8],
        "a": [8, 16],
        "m": [16, 19],
    }
    assert list(header) == ["__metadata__", "z", "a", "m"]


def test_answers_are_aligned_in_any_order() -> None:
    tensors = {
        "output": Tensor("bfloat16", (3,), bytes(6)),
        "batch_mean": Tensor.of(np.ones(3)),
        "x": Tensor.of(np.ones(1, np.float32)),
    }
    header, start = decode_safetensors_header(b"".join(encode(SAFETENSORS, tensors, {"version": 3})))
    for name, tensor in tensors.items():
        assert (start + header[name]["data_offsets"][0]) % itemsize(tensor.dtype) == 0
    assert header.keys() == tensors.keys()


def test_header_from_the_first_bytes() -> None:
    body = b"".join(
        encode_safetensors({"n": Tensor.of(np.array(7)), "x": Tensor.of(np.ones(10_000))}, {"config": "{}"})
    )
    header, start = decode_safetensors_header(body[:4096])
    assert header["__metadata__"] == {"config": "{}"}
    assert header["n"] == {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}
    assert int.from_bytes(body[start : start + 8], "little") == 7
    for length in (0, 7, 8, start - 1):
        with pytest.raises(MalformedBody):
            decode_safetensors_header(body[:length])


def test_tensors_may_lie_in_another_order_than_named() -> None:
    body = file_with({"a": entry(offsets=[8, 16]), "b": entry(offsets=[0, 8])}, np.arange(4, dtype="<f4").tobytes())
    tensors, _ = decode_safetensors(body)
    assert tensors["a"].numpy().tolist() == [2.0, 3.0]
    assert tensors["b"].numpy().tolist() == [0.0, 1.0]


def test_metadata_of_a_cached_header_cannot_be_changed() -> None:
    body = save({"a": np.ones(1)}, {"k": "v"})
    decode_safetensors(body)[1]["k"] = "changed"
    assert decode_safetensors(body)[1] == {"k": "v"}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b' {"x": 1}',
        b'{"\xff": 1}',
        {"x": 1},
        {"x": []},
        {"x": {}},
        {"x": {"dtype": "F32", "shape": [2]}},
        {"x": entry(more=1)},
        {"x": entry("f32")},
        {"x": entry("F33")},
        {"x": entry("float32")},
        {"x": entry(None)},
        {"x": entry(["F32"])},
        {"x": entry(shape=2)},
        {"x": entry(shape=[-2])},
        {"x": entry(shape=[-1, -2])},
        {"x": entry(shape=[2.0])},
        {"x": entry(shape=["2"])},
        {"x": entry(shape=[2, True])},
        {"x": entry(shape=[3])},
        {"x": entry(shape=[2**63])},
        {"x": entry(shape=[2**62, 2**62, 2**62])},
        {"x": entry(shape=[0, 2**63], offsets=[0, 0])},
        {"x": entry(shape=[2] + [1] * 64)},
        {"x": entry(offsets=[8, 0])},
        {"x": entry(offsets=[-8, 0])},
        {"x": entry(offsets=[0.0, 8.0])},
        {"x": entry(offsets=[False, 8])},
        {"x": entry(offsets=[0, 8, 8])},
        {"x": entry(offsets=8)},
        {"x": entry(offsets=[0, 2**64 - 1])},
        {"x": entry(shape=[2**61 - 1], offsets=[0, 2**63 - 4])},
        {"x": entry(offsets=[1, 9])},
        {"x": entry(offsets=[4, 12])},
        {"x": entry(shape=[1], offsets=[0, 4])},
        {"x": entry(), "y": entry()},
        {"x": entry(), "y": entry(shape=[1], offsets=[4, 8])},
        {"x": entry(shape=[1], offsets=[0, 4]), "y": entry(shape=[0], offsets=[8, 8])},
        {"__metadata__": {"a": 1}, "x": entry()},
        {"__metadata__": [], "x": entry()},
        {"__metadata__": None, "x": entry()},
    ],
)
def test_headers_that_lie(header: Any) -> None:
    with pytest.raises(MalformedBody):
        decode_safetensors(file_with(header, bytes(8)))


@pytest.mark.parametrize("header", [{"x": entry()}, {"x": entry(), "__metadata__": {"a": "b"}}])
@pytest.mark.parametrize("more", [-8, -1, 1, 8])
def test_every_other_length(header: Any, more: int) -> None:
    assert decode_safetensors(file_with(header, bytes(8)))[0]["x"].shape == (2,)
    with pytest.raises(MalformedBody):
        decode_safetensors(file_with(header, bytes(8 + more)))


def test_truncated_anywhere() -> None:
    body = save({"x": np.ones(2, np.float32)})
    for length in range(len(body)):
        with pytest.raises(MalformedBody):
            decode_safetensors(body[:length])


def test_header_is_bounded() -> None:
    with pytest.raises(MalformedBody, match="too large"):
        decode_safetensors(file_with(b"{}" + b" " * (1 << 20)))
    for length in (2**32, 2**63, 2**64 - 1):
        with pytest.raises(MalformedBody):
            decode_safetensors(length.to_bytes(8, "little") + b"{}")


def test_long_headers_are_read_too() -> None:
    metadata = {"long": "x" * 10_000}
    tensors, read = decode_safetensors(save({"x": np.ones(2)}, metadata))
    assert read == metadata
    assert tensors["x"].numpy().tolist() == [1.0, 1.0]


def test_no_tensors() -> None:
    assert decode(SAFETENSORS, file_with(b"{}"), {"input": "float32"}) == {}
    assert decode_safetensors(b"".join(encode_safetensors({}))) == ({}, {})


def test_a_long_header_that_comes_again_belongs_to_its_own_data() -> None:
    names = [f"layer{number}.running_mean" for number in range(50)]
    for offset in (0.0, 1000.0):
        values = {name: np.arange(3) + offset + number for number, name in enumerate(names)}
        metadata = {"versions": "{}"}
        body = bytearray(save(values, metadata))
        tensors, found = decode_safetensors(body, repeated=True)
        assert tensors.keys() == load(bytes(body)).keys()
        for name, value in values.items():
            np.testing.assert_array_equal(tensors[name].numpy(), value)
        assert found == metadata
        found["versions"] = "changed by a caller"
    with pytest.raises(MalformedBody):
        decode_safetensors(body[:-1], repeated=True)
