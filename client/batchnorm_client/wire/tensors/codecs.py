"""The codec table: for each media type of tensors, what it can represent, and how to decode and encode it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from batchnorm_client.wire.errors import InvalidRequest, NotAcceptable, UnsupportedMediaType
from batchnorm_client.wire.media_types import JSON, NPY, SAFETENSORS
from batchnorm_client.wire.tensors.json import decode_json, encode_json
from batchnorm_client.wire.tensors.json_writer import JSON_DTYPES
from batchnorm_client.wire.tensors.npy import NPY_DTYPES, decode_npy, encode_npy, npy_data_start
from batchnorm_client.wire.tensors.safetensors import (
    SAFETENSORS_DTYPES,
    decode_named,
    encode_named,
    safetensors_data_start,
)
from batchnorm_client.wire.tensors.tensor import Buffer, Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Codec:
    """A row of the codec table: one form in which tensors are sent.

    Attributes:
        description: what a body is, for the OpenAPI document.
        decode: a body and the known tensors' dtypes -> the tensors; see the function `decode`.
        encode: tensors and fields -> the body's pieces; see the function `encode`.
        several: whether a body can carry several tensors, by name.
        dtypes: those that can be written, by torch's names.
        text: whether numbers are text: they are parsed one by one, in a dtype that the reader chooses, and the body can
            contain `fields`. Otherwise the body contains the buffers unchanged, and their dtypes.
        data_start: a binary body -> the offset of its tensors' bytes. None for text.
    """

    description: str
    decode: Callable[[Buffer, Mapping[str, str]], dict[str, Tensor]]
    encode: Callable[[Mapping[str, Tensor], Mapping[str, Any]], list[Buffer]]
    several: bool
    dtypes: frozenset[str]
    text: bool
    data_start: Callable[[Buffer], int] | None = None


CODECS: Final[Mapping[str, Codec]] = MappingProxyType(
    {
        JSON: Codec("a JSON document", decode_json, encode_json, True, JSON_DTYPES, text=True),
        NPY: Codec("a .npy file", decode_npy, encode_npy, False, NPY_DTYPES, text=False, data_start=npy_data_start),
        SAFETENSORS: Codec(
            "a safetensors file",
            decode_named,
            encode_named,
            True,
            SAFETENSORS_DTYPES,
            text=False,
            data_start=safetensors_data_start,
        ),
    }
)
"""The tensor forms, by media type. A new form is a module and a row here."""

_NO_FIELDS: Final[Mapping[str, Any]] = MappingProxyType({})


def decode(media_type: str, body: Buffer, dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors in a body.

    Args:
        media_type: the body's form, without parameters such as charset.
        body: its bytes. The tensors of .npy and safetensors are views of them if they are aligned.
        dtypes: the names of the known tensors, and for each the dtype in which JSON numbers are read: "float32",
            "float64" or "int64". The binary forms contain their dtypes, which are kept.

    Returns:
        The tensors in the body. The caller checks which of them are required; see `require`.

    Raises:
        UnsupportedMediaType: not a form of tensors, or .npy if `dtypes` has more than one name.
        MalformedBody: the body is not what its media type says.
        InvalidRequest: a tensor that is not known, or an element that is not a number of its dtype.
        ShapeMismatch: ragged lists, or more than 64 dimensions.
        DtypeMismatch: a dtype that no layer takes and that cannot be viewed, such as big-endian.
    """
    row = codec(media_type)
    if not row.several and len(dtypes) != 1:
        raise UnsupportedMediaType(
            f"{media_type} carries one tensor; {', '.join(dtypes)} need another form",
            expected=[form for form, other in CODECS.items() if other.several],
            got=media_type,
        )
    return row.decode(body, dtypes)


def bytes_read(media_type: str, body: Buffer) -> int:
    """How many bytes of a body `decode` has to read or copy; 0 if its tensors are views."""
    data_start = codec(media_type).data_start
    aligned = data_start is not None and data_start(body) % 8 == 0
    return 0 if aligned else len(body)  # tensors that are not aligned are copied


def encode(media_type: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any] = _NO_FIELDS) -> list[Buffer]:
    """A body, in pieces to be sent one after the other; large buffers are not copied.

    Args:
        media_type: the body's form.
        tensors: by name; .npy contains exactly one.
        fields: further members of a JSON object. The binary forms cannot contain them: use headers.

    Raises:
        UnsupportedMediaType: not a form of tensors.
        NotAcceptable: .npy, and several tensors or one that is bfloat16.
    """
    row = codec(media_type)
    if not row.several and len(tensors) != 1:
        raise NotAcceptable(
            f"{media_type} carries one tensor, not {', '.join(tensors)}",
            expected=[form for form, other in CODECS.items() if other.several],
            got=media_type,
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in row.dtypes:
            raise NotAcceptable(
                f"{media_type} has no {tensor.dtype}, which {name} is",
                field=name,
                expected=[form for form, other in CODECS.items() if tensor.dtype in other.dtypes],
                got=media_type,
            )
    return row.encode(tensors, fields)


def require(tensors: Mapping[str, Tensor], *names: str) -> tuple[Tensor, ...]:
    """The tensors of these names, in this order.

    Raises:
        InvalidRequest: names the first that is missing.
    """
    for name in names:
        if name not in tensors:
            raise InvalidRequest(f"the tensor {name} is missing", field=name, expected=list(names))
    return tuple(tensors[name] for name in names)


def codec(media_type: str) -> Codec:
    """The row of a media type, which is given without parameters such as charset.

    Raises:
        UnsupportedMediaType: no form of tensors.
    """
    if row := CODECS.get(media_type):
        return row
    raise UnsupportedMediaType(
        f"tensors cannot be sent as {media_type[:100]}", expected=list(CODECS), got=media_type[:100]
    )
