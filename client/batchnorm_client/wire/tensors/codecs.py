"""The codec table: each media type that carries tensors, with its two directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from batchnorm_client.wire.errors import InvalidRequest, UnsupportedMediaType
from batchnorm_client.wire.media_types import JSON, NPY, SAFETENSORS
from batchnorm_client.wire.tensors.json import decode_json, encode_json
from batchnorm_client.wire.tensors.npy import decode_npy, encode_npy
from batchnorm_client.wire.tensors.safetensors import decode_named, encode_named
from batchnorm_client.wire.tensors.tensor import Buffer, Tensor


class _Codec(NamedTuple):
    decode: Callable[[Buffer, Mapping[str, str]], dict[str, Tensor]]
    encode: Callable[[Mapping[str, Tensor], Mapping[str, Any]], list[Buffer]]


_CODECS: Final = {
    JSON: _Codec(decode_json, encode_json),
    NPY: _Codec(decode_npy, encode_npy),
    SAFETENSORS: _Codec(decode_named, encode_named),
}
_NO_FIELDS: Final[Mapping[str, Any]] = MappingProxyType({})


def decode(media_type: str, body: Buffer, dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors in a body.

    Args:
        media_type: the body's form, without parameters such as charset.
        body: its bytes. The tensors of .npy and safetensors are views of them, where they lie aligned.
        dtypes: the tensors that are known here, and the dtype in which JSON numbers are read: "float32", "float64"
            or "int64". The binary forms say their dtypes themselves; these are reported as they are.

    Returns:
        The tensors that the body has. Which of them must be there is the caller's business; see `require`.

    Raises:
        UnsupportedMediaType: not a form of tensors, or .npy where more than one tensor is known.
        MalformedBody: the body is not what its media type says.
        InvalidRequest: a tensor that is not known, or an element that is not a number of its dtype.
        ShapeMismatch: ragged lists, or more than 64 dimensions.
        DtypeMismatch: a dtype that no layer takes and that cannot be viewed, such as big-endian.
    """
    return _codec(media_type).decode(body, dtypes)


def bytes_read(media_type: str, body: Buffer) -> int:
    """How many bytes of a body `decode` has to look at or to copy; 0 where its tensors are views."""
    if media_type == NPY:
        start = 10 + int.from_bytes(body[8:10], "little")
    elif media_type == SAFETENSORS:
        start = 8 + int.from_bytes(body[:8], "little")
    else:
        return len(body)
    return len(body) if start % 8 else 0  # tensors that lie askew are copied


def encode(media_type: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any] = _NO_FIELDS) -> list[Buffer]:
    """A body, in pieces to be sent one after the other; big buffers are among them as they are, not copied.

    Args:
        media_type: the body's form.
        tensors: what it carries; .npy carries exactly one.
        fields: what JSON says beside the tensors. The binary forms have no place for it: put it into headers.

    Raises:
        UnsupportedMediaType: not a form of tensors.
        NotAcceptable: .npy, and several tensors or one that is bfloat16.
    """
    return _codec(media_type).encode(tensors, fields)


def require(tensors: Mapping[str, Tensor], *names: str) -> tuple[Tensor, ...]:
    """The tensors of these names, in this order.

    Raises:
        InvalidRequest: names the first that is missing.
    """
    for name in names:
        if name not in tensors:
            raise InvalidRequest(f"the tensor {name} is missing", field=name, expected=list(names))
    return tuple(tensors[name] for name in names)


def _codec(media_type: str) -> _Codec:
    if codec := _CODECS.get(media_type):
        return codec
    raise UnsupportedMediaType(
        f"tensors do not travel as {media_type[:100]}", expected=list(_CODECS), got=media_type[:100]
    )
