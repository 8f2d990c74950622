"""The codec table: what all forms share, and bodies of any bytes."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save as save_safetensors

from batchnorm_client.wire.errors import (
    InvalidRequest,
    MalformedBody,
    NotAcceptable,
    ProblemError,
    UnsupportedMediaType,
)
from batchnorm_client.wire.media_types import JSON, NPY, SAFETENSORS
from batchnorm_client.wire.tensors import (
    CODECS,
    Tensor,
    bytes_read,
    codec,
    decode,
    decode_safetensors_header,
    encode,
    itemsize,
    require,
)

ARRAY = np.array([[1.5, -2.0, 3.25], [0.0, 1e-30, 7.0]], np.float32)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


BODIES = {
    JSON: json.dumps({"input": ARRAY.tolist()}).encode(),
    NPY: npy(ARRAY),
    SAFETENSORS: save_safetensors({"input": ARRAY}),
}


def check(media_type: str, body: bytes, dtypes: dict[str, str]) -> None:
    """Either tensors whose sizes agree, or a problem that can be written down."""
    try:
        tensors = decode(media_type, body, dtypes)
    except ProblemError as problem:
        orjson.dumps({**problem.fields, "detail": problem.detail})
        return
    assert tensors.keys() <= dtypes.keys()
    for tensor in tensors.values():
        assert tensor.nbytes == math.prod(tensor.shape) * itemsize(tensor.dtype)
        if tensor.dtype != "bfloat16" and not tensor.dtype.startswith("float8"):
            assert tensor.numpy().shape == tensor.shape


@pytest.mark.parametrize("media_type", CODECS)
@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_reads_every_form(media_type: str, wrap: type) -> None:
    tensors = decode(media_type, wrap(BODIES[media_type]), {"input": "float32"})
    assert list(tensors) == ["input"]
    assert tensors["input"].dtype == "float32"
    np.testing.assert_array_equal(tensors["input"].numpy(), ARRAY)


@pytest.mark.parametrize("media_type", CODECS)
def test_reads_what_it_wrote(media_type: str) -> None:
    body = b"".join(encode(media_type, {"input": Tensor.of(ARRAY)}))
    np.testing.assert_array_equal(decode(media_type, body, {"input": "float32"})["input"].numpy(), ARRAY)


@pytest.mark.parametrize("media_type", [NPY, SAFETENSORS])
def test_big_buffers_are_sent_as_they_are(media_type: str) -> None:
    pieces = encode(media_type, {"output": Tensor.of(ARRAY)})
    assert np.shares_memory(np.frombuffer(pieces[-1], np.uint8), ARRAY)


@pytest.mark.parametrize("media_type", CODECS)
def test_empty_body(media_type: str) -> None:
    with pytest.raises(MalformedBody):
        decode(media_type, b"", {"input": "float32"})


@pytest.mark.parametrize("media_type", [JSON, SAFETENSORS])
def test_tensor_that_is_not_known(media_type: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(media_type, BODIES[media_type], {"weight": "float32", "bias": "float32"})
    assert type(caught.value) is InvalidRequest
    assert caught.value.fields == {"field": "input", "expected": ["weight", "bias"]}


def test_media_type_that_is_not_known() -> None:
    for call in (lambda: decode("text/plain", b"", {}), lambda: encode("text/plain", {})):
        with pytest.raises(UnsupportedMediaType) as caught:
            call()
        assert caught.value.fields == {"expected": list(CODECS), "got": "text/plain"}


def test_every_form_has_a_row() -> None:
    assert tuple(CODECS) == (JSON, NPY, SAFETENSORS)
    assert {form for form, row in CODECS.items() if row.several} == {JSON, SAFETENSORS}
    assert {form for form, row in CODECS.items() if row.text} == {JSON}


@pytest.mark.parametrize("form", CODECS)
@pytest.mark.parametrize("dtype", sorted(CODECS[SAFETENSORS].dtypes))
def test_a_row_says_what_its_form_can_carry(form: str, dtype: str) -> None:
    tensors = {"output": Tensor(dtype, (1,), bytes(itemsize(dtype)))}
    if dtype in codec(form).dtypes:
        assert encode(form, tensors)
    else:
        with pytest.raises(NotAcceptable) as caught:
            encode(form, tensors)
        assert all(dtype in codec(other).dtypes for other in caught.value.fields["expected"])


@pytest.mark.parametrize("form", CODECS)
def test_several_tensors_where_a_form_carries_one(form: str) -> None:
    several = {"a": Tensor.of(ARRAY), "b": Tensor.of(ARRAY)}
    if codec(form).several:
        return
    with pytest.raises(NotAcceptable) as caught:
        encode(form, several)
    assert caught.value.fields == {"expected": [JSON, SAFETENSORS], "got": form}
    with pytest.raises(UnsupportedMediaType) as refused:
        decode(form, BODIES[form], {"a": "float32", "b": "float32"})
    assert refused.value.fields == {"expected": [JSON, SAFETENSORS], "got": form}


def test_require() -> None:
    one, two = Tensor.of(ARRAY), Tensor.of(ARRAY[0])
    assert require({"a": one, "b": two}, "b", "a") == (two, one)
    with pytest.raises(InvalidRequest) as caught:
        require({"a": one}, "a", "b")
    assert caught.value.fields["field"] == "b"


@given(st.sampled_from(list(CODECS)), st.binary(max_size=200))
def test_any_bytes(media_type: str, body: bytes) -> None:
    check(media_type, body, {"input": "float32"})


@given(st.data())
def test_bodies_with_bytes_changed(data: st.DataObject) -> None:
    media_type = data.draw(st.sampled_from(list(CODECS)))
    body = bytearray(BODIES[media_type])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(body)))
        body[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    check(media_type, bytes(body), {"input": "float32"})


HEADER_TEXTS = st.text(st.sampled_from("{}[]()'\",: \\-+.0123456789eLTrueFalsNodtypshacf_iO<>|=x"), max_size=80)
NPY_HEADERS = st.builds(
    "{{'descr': {}, 'fortran_order': {}, 'shape': {}}}".format,
    st.sampled_from(["'<f4'", "'>f8'", "'|O'", "[('a', '<f4')]", "'<c16'", "1", "'|b1'", "''", "b'<f4'"]),
    st.sampled_from(["True", "False", "0", "None"]),
    st.sampled_from(
        ["()", "(2,)", "(2, 3)", "(-1,)", "(True,)", "(1.0,)", "[2]", "2", f"({2**70}, 0)", f"({2**62}, 4)"]
    ),
)


@given(st.one_of(HEADER_TEXTS, NPY_HEADERS), st.sampled_from([1, 2, 3]), st.binary(max_size=24))
@example("(" * 3000, 1, b"")
@example("-" * 4000 + "1", 1, b"")
@example("[" * 95 + "]" * 95, 1, b"")
@example("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 3900 + ",)}", 2, b"")
@example("\0", 1, b"")
@example("{'\\N{x}': '\\d'}", 3, b"")
def test_npy_headers_that_lie(header: str, major: int, data: bytes) -> None:
    text = header.encode("latin1")
    body = b"\x93NUMPY" + bytes([major, 0]) + len(text).to_bytes(2 if major == 1 else 4, "little") + text + data
    check(NPY, body, {"input": "float32"})


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["NaN", "nan", "F32", "F4", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["input", "dtype", "shape"]), inner),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F4", "BF16", "F8_E8M0", "X", 3]),
        "shape": JSON_VALUES | st.lists(st.sampled_from([0, 1, 2, 2**40, 2**63]), max_size=3),
        "data_offsets": JSON_VALUES
        | st.lists(st.sampled_from([0, 4, 8, 2**63 - 1, 2**64 - 1]), min_size=2, max_size=2),
    }
)


@given(
    JSON_VALUES | st.dictionaries(st.sampled_from(["input", "b", "__metadata__"]), ENTRIES | JSON_VALUES),
    st.binary(max_size=24),
)
def test_safetensors_headers_that_lie(header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    body = len(text).to_bytes(8, "little") + text + data
    check(SAFETENSORS, body, {"input": "float32", "b": "float32"})
    try:
        decode_safetensors_header(body)
    except ProblemError as problem:
        orjson.dumps(problem.fields)


@given(
    JSON_VALUES | st.dictionaries(st.sampled_from(["input", "b"]), JSON_VALUES),
    st.sampled_from(["float32", "float64", "int64"]),
)
def test_any_json(document: object, dtype: str) -> None:
    check(JSON, json.dumps(document).encode(), {"input": dtype, "b": dtype})


@pytest.mark.parametrize("askew", [0, 1, 2, 4, 7])
@pytest.mark.parametrize("form", [NPY, SAFETENSORS])
def test_what_decode_reads_or_copies_is_counted(form: str, askew: int) -> None:
    array = np.arange(6.0)
    pieces = encode(form, {"input": Tensor.of(array)})
    head, width, fixed = (bytes(pieces[0]), 8, 0) if form == SAFETENSORS else (bytes(pieces[0]), 2, 8)
    length = int.from_bytes(head[fixed : fixed + width], "little") + askew
    start = fixed + width
    text = head[start:].rstrip() + b" " * (len(head) - len(head.rstrip()) + askew)
    body = np.frombuffer(head[:fixed] + length.to_bytes(width, "little") + text + array.tobytes(), np.uint8).copy()
    read = decode(form, body.data, {"input": "float64"})["input"].numpy()
    np.testing.assert_array_equal(read, array)
    assert np.shares_memory(read, body) == (bytes_read(form, body.data) == 0) == (askew == 0)
    assert bytes_read(form, body.data) in {0, body.size}


def test_all_of_json_is_read() -> None:
    assert bytes_read(JSON, b'{"input": [1]}') == 14
