"""The JSON form. Every case runs the way with simdjson, where it takes the body, and the way without."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from batchnorm_client.wire.errors import InvalidRequest, MalformedBody, ProblemError, ShapeMismatch
from batchnorm_client.wire.media_types import JSON
from batchnorm_client.wire.tensors import Tensor, decode, encode, json_pieces, json_writer, regular_json, widened
from batchnorm_client.wire.tensors import json as codec

Read = Callable[..., np.ndarray]
BOTH_WAYS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FINITE_32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.fixture(params=["simdjson", "orjson", "simdjson, in pieces", "orjson, in pieces"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small bodies take the fast way as big ones do, or simdjson is not installed, as with the light client."""
    monkeypatch.setattr(codec, "_FAST_FROM", 0)
    if "orjson" in request.param:
        monkeypatch.setattr(regular_json, "simdjson", None)
    if "pieces" in request.param:
        monkeypatch.setattr(regular_json, "PIECE_BYTES", 5)
        monkeypatch.setattr(json_writer, "_PIECE_ELEMENTS", 3)
    return request.param


def read(body: str | bytes, dtype: str = "float32") -> np.ndarray:
    raw = body.encode() if isinstance(body, str) else body
    return decode(JSON, raw, {"input": dtype})["input"].numpy()


def read_input(text: str, dtype: str = "float32") -> np.ndarray:
    return read(f'{{"input": {text}}}', dtype)


def written(array: np.ndarray, **fields: Any) -> bytes:
    return b"".join(encode(JSON, {"input": Tensor.of(array)}, fields))


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("3", ()),
        ("-0.0", ()),
        ("[]", (0,)),
        ("[[], []]", (2, 0)),
        ("[[[]]]", (1, 1, 0)),
        ("[[[], []], [[], []], [[], []]]", (3, 2, 0)),
        ("[1]", (1,)),
        ("[[1, 2.5, -3e2]]", (1, 3)),
        ("[[[1], [2]], [[3], [4]], [[5], [6]]]", (3, 2, 1)),
        ("[" * 64 + "1" + "]" * 64, (1,) * 64),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shapes(text: str, shape: tuple[int, ...], dtype: str) -> None:
    array = read_input(text, dtype)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    np.testing.assert_array_equal(array, np.array(json.loads(text), dtype).reshape(shape))


@BOTH_WAYS
@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=0), elements=st.floats(width=32)))
@example(np.array([1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, 3.4028235e38, -3.4028235e38, -0.0, 0.1], np.float32))
@example(np.array([[np.nan, np.inf], [-np.inf, 0.1]], np.float32))
@example(np.array(np.inf, np.float32))
@example(np.array(np.nan, np.float32))
def test_float32_reads_back_exactly(array: np.ndarray) -> None:
    back = read(written(array))
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, array)
    np.testing.assert_array_equal(np.signbit(back[array == 0]), np.signbit(array[array == 0]))


@settings(BOTH_WAYS, max_examples=200)
@given(st.lists(st.sampled_from([1, 1, 1, 2, 3, 0]), max_size=9), st.booleans())
@example([1] * 64, False)
@example([2, 1, 1, 3, 1, 2, 1], False)
@example([12, 1], True)
@example([4, 1, 0, 1, 5], False)
def test_dimensions_of_one_and_of_zero_are_written_as_lists(shape: list[int], broken: bool) -> None:
    flat = np.arange(np.prod(shape, dtype=int), dtype=np.float32) - 1.5
    array = np.where(broken & (flat % 3 == 0.5), np.float32(np.nan), flat).reshape(shape)
    text = written(array, version=1)
    assert text == json.dumps({"input": _named(array.tolist()), "version": 1}, separators=(",", ":")).encode()


def _named(nested: Any) -> Any:
    if isinstance(nested, list):
        return [_named(inner) for inner in nested]
    return "NaN" if np.isnan(nested) else nested


@pytest.mark.parametrize("shape", [(2**14, *[1] * 63), (2**16, *[1] * 30, 0), (2**18, 1)])
def test_a_list_that_holds_one_thing_takes_no_memory_but_its_text(shape: tuple[int, ...]) -> None:
    """orjson takes 100 to 600 bytes for each list of an array."""
    tensor = Tensor("float32", shape, bytes(4 * np.prod(shape, dtype=int)))
    before = _peak_memory()
    (body,) = encode(JSON, {"input": tensor})
    assert _peak_memory() - before < 8 * len(body) + (16 << 20)


def _peak_memory() -> int:
    """The most bytes that this process has had in memory so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@BOTH_WAYS
@given(arrays.arrays(np.float64, arrays.array_shapes(min_dims=0), elements=st.floats()))
@example(np.array([5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 0.1]))
def test_float64_reads_back_exactly(array: np.ndarray) -> None:
    back = read(written(array), "float64")
    assert back.dtype == np.float64
    np.testing.assert_array_equal(back, array)


@pytest.mark.slow
@BOTH_WAYS
@given(st.integers(0, 2**32 - 2**16))
def test_runs_of_float32_read_back_exactly(start: int) -> None:
    array = np.arange(start, start + 2**12, dtype=np.uint32).view(np.float32)
    array = array[np.isfinite(array)]
    np.testing.assert_array_equal(read(written(array)).view(np.uint32), array.view(np.uint32))


@pytest.mark.parametrize("bits", [0x15AE43FC, 0x15AE43FD, 0x15AE43FE, 0x95AE43FC, 0x95AE43FD, 0x95AE43FE])
def test_the_float32_that_rounding_twice_would_change(bits: int) -> None:
    """7.038531e-26 came back as its neighbour: the only one among all 2**32, by trying each."""
    array = np.array([bits], np.uint32).view(np.float32)
    assert read(written(array)).view(np.uint32)[0] == bits


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (str(10**30), 1e30),
        (f"-{10**30}", -1e30),
        (str(2**63), 2.0**63),
        (str(2**64 - 1), 2.0**64),
        (str(2**64), 2.0**64),
        ("9007199254740993", 9007199254740992.0),
        ("1e-400", 0.0),
        ("1E+5", 1e5),
        ("-0", 0.0),
        ("5e-324", 5e-324),
    ],
)
def test_numbers_of_any_size(text: str, value: float) -> None:
    assert read_input(f"[{text}]", "float64").tolist() == [value]
    assert read_input(text, "float64").tolist() == value


def test_names_of_what_is_not_finite() -> None:
    array = read_input('[["NaN", 1], ["Infinity", "-Infinity"]]')
    np.testing.assert_array_equal(array, np.array([[np.nan, 1], [np.inf, -np.inf]], np.float32))
    assert read_input('"-Infinity"') == -np.inf


@pytest.mark.parametrize(
    "element",
    [
        "true",
        "false",
        "null",
        "{}",
        '{"a": 1}',
        '"1.5"',
        '"nan"',
        '"inf"',
        '"-inf"',
        '"infinity"',
        '"+Infinity"',
        '" NaN"',
        '""',
    ],
)
@pytest.mark.parametrize("place", ["{}", "[{}]", "[1, {}]", "[[1.5], [{}]]", '["NaN", {}]'])
def test_elements_that_are_no_numbers(element: str, place: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_input(place.replace("{}", element, 1))
    assert type(caught.value) is InvalidRequest
    assert caught.value.fields["field"] == "input"


@pytest.mark.parametrize(
    "text",
    [
        "[[1, 2], [3]]",
        "[[1], [2, 3]]",
        "[[], [1]]",
        "[1, [2]]",
        "[[1], 2]",
        "[[1, [2, 3]], [[], 4]]",
        "[[1, [2]], [[3], 4]]",
        "[[[1, 2], [3, 4]], [[5, 6]]]",
        "[[[1, 2], [3, 4]], [[5, 6], 7]]",
        "[[[1], [2]], [[3, 4]]]",
        "[[], [[]]]",
        '[["NaN"], [1, 2]]',
        "[" * 65 + "1" + "]" * 65,
        "[" * 500 + "]" * 500,
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_ragged_or_too_deep(text: str, dtype: str) -> None:
    with pytest.raises(ShapeMismatch) as caught:
        read_input(text, dtype)
    assert caught.value.fields["field"] == "input"


@pytest.mark.parametrize("text", ["3.4028236e38", "-3.4028236e38", "1e39", "1e308", str(10**39)])
def test_numbers_that_do_not_fit_float32(text: str) -> None:
    with pytest.raises(InvalidRequest, match="does not fit float32") as caught:
        read_input(f"[1, {text}]")
    assert type(caught.value) is InvalidRequest
    assert caught.value.fields == {"field": "input", "expected": "float32", "got": float(text)}
    assert read_input(f"[1, {text}]", "float64")[1] == float(text)


def test_overflow_beside_an_infinity() -> None:
    with pytest.raises(InvalidRequest, match="does not fit float32"):
        read_input('["Infinity", 1e39]')


@pytest.mark.parametrize("text", ["1e400", "-1e309", f"1{'0' * 400}"])
def test_numbers_that_do_not_fit_float64(text: str) -> None:
    with pytest.raises(InvalidRequest, match="does not fit float64"):
        read_input(f"[{text}]", "float64")


def test_integers() -> None:
    assert read_input("7", "int64").dtype == np.int64
    assert read_input(f"[{-(2**63)}, {2**63 - 1}]", "int64").tolist() == [-(2**63), 2**63 - 1]
    assert read_input("[[], []]", "int64").shape == (2, 0)


@pytest.mark.parametrize(
    "text", ["3.0", "1e3", str(2**63), str(-(2**63) - 1), str(10**30), "true", "null", '"NaN"', '"1"']
)
@pytest.mark.parametrize("place", ["{}", "[1, {}]"])
def test_integers_are_integers(text: str, place: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_input(place.format(text), "int64")
    assert caught.value.fields["field"] == "input"


@pytest.mark.parametrize(
    "body",
    [
        b" ",
        b"{",
        b'{"input": [1,]}',
        b'{"input": [1 2]}',
        b'{"input": [01]}',
        b'{"input": [+1]}',
        b'{"input": [1.]}',
        b'{"input": [.5]}',
        b'{"input": [NaN]}',
        b'{"input": [Infinity]}',
        b'{"input": [1]]',
        b'{"input": [1]} x',
        b'{"input": [1]}{"input": [1]}',
        b'{"input": [1]}\x00',
        b"{'input': [1]}",
        b'{"input": [1], }',
        b'{"input": [1, 2,]}',
        b'{"input": [1, [2, 3]}',
        b'{"input": [[1, 2], [, 3]]}',
        b'{"input": [[1, 2][3, 4]]}',
        b'{"input": [[1, 2], 3[, 4]]}',
        b'{"input": [1"NaN", 2]}',
        b'{"input": ["NaN""NaN", 2]}',
        b'{"input": ["NaN"NaN"NaN", 2]}',
        b'{"input": 1, 2}',
        b'{"input": [1], [2]}',
        b'{"input": }',
        b'{"input"' + b" " * 300 + b"x: [1]}",
        b'{"\xff": [1]}',
        b'{"\\ud800": [1]}',
        b'\xef\xbb\xbf{"input": [1]}',
        '{"input": [1]}'.encode("utf-16"),
        b"[1]",
        b"[[1, 2]]",
        b"1",
        b'"input"',
        b"null",
        b"[" * 100_000,
        b'{"input":' * 100_000,
        b'{"input":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:30]),
)
def test_what_is_no_json_object(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        read(body)


def test_last_of_two_keys_counts() -> None:
    assert read('{"input": [1], "input": [2, 3]}').tolist() == [2.0, 3.0]


@pytest.mark.parametrize("name", ["other", "", "inp", "input\\u0000", "a[b", "INPUT"])
def test_tensor_that_is_not_known(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(f'{{"input": [1], "{name}": [2]}}')
    assert caught.value.fields == {"field": json.loads(f'"{name}"'), "expected": ["input"]}


def test_names_may_be_escaped_and_odd() -> None:
    assert read('{"\\u0069nput": [1, 2]}').tolist() == [1.0, 2.0]
    tensors = decode(JSON, b'{"a[": [1], "[": [[2]], "": 3}', {"a[": "float32", "[": "float64", "": "float32"})
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a[": (1,), "[": (1, 1), "": ()}


def test_several_tensors() -> None:
    dtypes = {"mean": "float64", "count": "int64", "input": "float32"}
    tensors = decode(JSON, b'{"input": [[1, 2]], "mean": [0.1], "count": 5}', dtypes)
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        "input": ("float32", (1, 2)),
        "mean": ("float64", (1,)),
        "count": ("int64", ()),
    }
    assert decode(JSON, b"{}", dtypes) == {}


def test_buffers_do_not_hang_on_the_body() -> None:
    body = bytearray(b'{"input": [[1, 2], [3, 4]]}')
    array = decode(JSON, body, {"input": "float64"})["input"].numpy()
    body[:] = bytes(len(body))
    assert array.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_big_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way takes it, so that its speed is not lost unnoticed."""
    monkeypatch.setattr(codec, "load_json", None)
    array = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(read(written(array)), array)
    wide = np.random.default_rng(1).standard_normal((40, 30))
    body = b"".join(encode(JSON, {"input": Tensor.of(wide), "grad_output": Tensor.of(array[0])}))
    tensors = decode(JSON, body, {"input": "float64", "grad_output": "float32"})
    np.testing.assert_array_equal(tensors["input"].numpy(), wide)
    np.testing.assert_array_equal(tensors["grad_output"].numpy(), array[0])


@pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_not_finite_is_read_the_fast_way(share: float, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One NaN made reading a body eight times, and writing it six times as slow."""
    monkeypatch.setattr(codec, "load_json", None)
    rng = np.random.default_rng(0)
    array = rng.standard_normal((30, 4, 20)).astype(dtype)
    lost = rng.random(array.shape) < share
    array[lost] = rng.choice([np.nan, np.inf, -np.inf], lost.sum())
    assert lost.any()
    np.testing.assert_array_equal(read(written(array), dtype), array)
    for text in ('[["NaN" ,1.5],[\n"Infinity", "-Infinity"\t]]', '"NaN"', ' [ "-Infinity" ] '):
        np.testing.assert_array_equal(read_input(text, dtype), np.array(json.loads(text.replace('"', "")), dtype))


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (3, 1), (1, 7), (2, 5), (3, 2, 2), (1, 1, 9), (2, 0), (0, 4), (4, 1, 4)]
)
@pytest.mark.parametrize("finite", [True, False])
def test_text_is_the_same_in_pieces(shape: tuple[int, ...], finite: bool) -> None:
    array = np.random.default_rng(0).standard_normal(shape)
    array = np.where(array > 0.3, array if finite else np.nan, array)

    def named(value: Any) -> Any:
        return [named(one) for one in value] if isinstance(value, list) else "NaN" if np.isnan(value) else value

    expected = {"input": named(array.tolist()), "version": 3}
    assert written(array, version=3) == json.dumps(expected, separators=(",", ":")).encode()


def test_no_call_reads_or_writes_more_than_a_piece(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such calls hold Python's lock: an event loop waits for them, in whichever thread they are."""
    read_one, write_one = regular_json._parse_numbers, json_writer._list_text
    sizes: list[int] = []

    def parse(text: bytes) -> np.ndarray:
        sizes.append(len(text))
        return read_one(text)

    def write(array: np.ndarray) -> bytes:
        sizes.append(array.size)
        return write_one(array)

    monkeypatch.setattr(regular_json, "_parse_numbers", parse)
    monkeypatch.setattr(json_writer, "_list_text", write)
    array = np.arange(60.0).reshape(3, 20)
    np.testing.assert_array_equal(read(written(array), "float64"), array)
    if "pieces" in way:
        assert max(sizes) <= 16  # a piece, the number that it ends in, and brackets


NESTED = st.recursive(
    st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([True, None, "NaN", "x", {}]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=10,
)


def _both_ways(raw: bytes, dtypes: dict[str, str]) -> tuple[Any, Any]:
    """What the fast way reads, None if it does not take the body; and then what the other reads."""
    try:
        fast = regular_json.read_regular(raw, dtypes)
    except regular_json.UnusualError:
        return None, None
    return fast, codec._read_document(codec.load_json(raw), dtypes)


@BOTH_WAYS
@given(NESTED | arrays.arrays(np.float64, arrays.array_shapes(min_side=0), elements=st.floats()).map(np.ndarray.tolist))
def test_both_ways_agree(nested: Any) -> None:
    """Whatever the fast way takes, the other reads alike; what the other refuses, the fast way does not take."""
    raw = json.dumps({"input": nested}).replace("NaN", '"NaN"').replace('""NaN""', '"NaN"').encode()
    fast, slow = _both_ways(raw, {"input": "float64"})
    if fast is None:
        return
    assert fast["input"].shape == slow["input"].shape
    np.testing.assert_array_equal(fast["input"].flat, slow["input"].flat)


@BOTH_WAYS
@given(st.data())
def test_both_ways_agree_on_changed_bytes(data: st.DataObject) -> None:
    """simdjson and orjson are two parsers: what the first takes, the second has to take, and alike."""
    raw = bytearray(b'{"input": [[1.5, -2], [3e4, 0.25]], "b": [[[1], [2]], [[3], [4]]]}')
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw)))
        piece = st.binary(max_size=2) | st.text('[]{},:"\\0123456789.eE+- tn', max_size=4).map(str.encode)
        raw[start : start + data.draw(st.integers(0, 4))] = data.draw(piece)
    dtypes = {"input": "float64", "b": "float32"}
    fast, slow = _both_ways(raw, dtypes)
    if fast is None:
        return
    assert fast.keys() == slow.keys()
    for name in fast:
        assert fast[name].shape == slow[name].shape
        np.testing.assert_array_equal(fast[name].flat, slow[name].flat)


EMPTY = {"[]": (0,), "[[], []]": (2, 0), "[[[], []],\n[[], []] , [[],[]]]": (3, 2, 0)}


@pytest.mark.parametrize("text", EMPTY)
def test_empty_lists_are_read_the_fast_way(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "load_json", None)
    assert read_input(text, "float32").shape == EMPTY[text]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[[1], [2, 3]]", ShapeMismatch),
        ("[[1, 2], [], [3, 4]]", InvalidRequest),
        ("[[[]], []]", ShapeMismatch),
        ("[[1, null, 2]]", InvalidRequest),
        ('[{"a": 1}, 2, 3]', InvalidRequest),
    ],
)
def test_what_is_wrong_in_many_values_is_refused_without_reading_them_at_once(
    text: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 MiB of `[],` took 2 GiB and the event loop for five seconds, before they were refused."""
    monkeypatch.setattr(codec, "_MOST_VALUES", 4)
    monkeypatch.setattr(codec, "orjson", None)
    monkeypatch.setattr(regular_json, "orjson", None)
    monkeypatch.setattr(regular_json, "_parse_numbers", lambda text: np.array(re.findall(rb"[0-9]+", text), np.float64))
    with pytest.raises(error):
        read_input(text, "float64")


def test_a_tensor_that_is_not_known_is_named_among_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_MOST_VALUES", 4)
    with pytest.raises(InvalidRequest, match="'x'"):
        decode(JSON, b'{"input": [[1]], "x": [[],[],[],[],[]]}', {"input": "float64"})


def test_many_values_that_are_regular_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_MOST_VALUES", 4)
    assert read_input("[[1, 2, 3], [4, 5, 6]]", "float64").shape == (2, 3)


def test_written_document() -> None:
    array = np.array([[0.1, np.nan], [-np.inf, np.inf]], np.float32)
    body = written(array, version=3, note={"a": None})
    assert body == b'{"input":[[0.1,"NaN"],["-Infinity","Infinity"]],"version":3,"note":{"a":null}}'
    assert written(np.array([[0.1, 16777216.0]], np.float32)) == b'{"input":[[0.1,16777216.0]]}'


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array(0.1, np.float32), b"0.1"),
        (np.array(np.nan, np.float32), b'"NaN"'),
        (np.array(7, np.int64), b"7"),
        (np.array([True, False]), b"[true,false]"),
        (np.zeros((2, 0), np.float32), b"[[],[]]"),
        (np.zeros((0, 3), np.float32), b"[]"),
        (np.array([[2**63 - 1]]), b"[[9223372036854775807]]"),
        (np.array([0.5, 65504, 6e-8], np.float16), b"[0.5,65504.0,5.9604645e-8]"),
        (np.array([[[np.inf, 1.0]]], np.float16), b'[[["Infinity",1.0]]]'),
    ],
)
def test_written_lists(array: np.ndarray, text: bytes) -> None:
    assert b"".join(json_pieces({"x": Tensor.of(array)})) == b'{"x":%b}' % text


def test_bfloat16_is_widened() -> None:
    """1.0, -2.0, the largest, the smallest and the special ones, by their bits."""
    bits = np.array([0x3F80, 0xC000, 0x7F7F, 0x0001, 0x7F80, 0xFF80, 0x7FC0], "<u2")
    tensor = Tensor("bfloat16", (7,), bits.tobytes())
    written = {"x": tensor, "y": Tensor("bfloat16", (), bits[:1].tobytes())}
    found = orjson.loads(b"".join(json_pieces(written)))
    numbers = np.float32([1.0, -2.0, (2 - 2**-7) * 2.0**127, 2.0**-133]).tolist()
    assert np.float32(found["x"][:4]).tolist() == numbers
    assert found["x"][4:] == ["Infinity", "-Infinity", "NaN"]
    assert found["y"] == 1.0


def test_finite_arrays_are_not_unpacked() -> None:
    array = np.ones((2, 3), np.float32)
    assert np.shares_memory(widened(Tensor.of(array)), array)


def test_problems_carry_fields_that_json_can_write() -> None:
    for text in ("[1e39]", '["x"]', "[[1], []]", "true"):
        with pytest.raises(ProblemError) as caught:
            read_input(text)
        orjson.dumps(caught.value.fields)


def test_numbers_after_the_end_of_their_lists() -> None:
    """A piece that began after that was parsed on its own, as a number, which gave 500."""
    almost_a_piece = "1," * (regular_json.PIECE_BYTES // 2 - 1)
    with pytest.raises(MalformedBody):
        read_input(almost_a_piece + "1        ], 2")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_single_nan_is_written_as_its_name(dtype: str) -> None:
    """That of bfloat16 was written as null."""
    bits = {
        "float16": b"\x00\x7e",
        "bfloat16": b"\xc0\x7f",
        "float32": b"\0\0\xc0\x7f",
        "float64": b"\0" * 6 + b"\xf8\x7f",
    }
    assert b"".join(encode(JSON, {"output": Tensor(dtype, (), bits[dtype])})) == b'{"output":"NaN"}'
