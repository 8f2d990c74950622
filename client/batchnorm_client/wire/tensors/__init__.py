"""Tensors on the wire: JSON, .npy and safetensors <-> `Tensor`, which numpy and torch view without a copy.

    body --decode(media_type, body, dtypes)--> {name: Tensor} --encode(media_type, tensors, fields)--> pieces

One table, `CODECS`, has a row for each media type: its two directions, and what it can carry. Whatever the bytes,
`decode` either returns tensors whose buffers are as long as their shapes say, or raises a `ProblemError`; it allocates
nothing on the word of a header.
"""

from batchnorm_client.wire.tensors.codecs import CODECS, Codec, bytes_read, codec, decode, encode, require
from batchnorm_client.wire.tensors.json import json_tensors, load_json, split_vectors
from batchnorm_client.wire.tensors.json_writer import json_pieces, widened
from batchnorm_client.wire.tensors.safetensors import (
    MANY_LAYERS_HEADER,
    decode_safetensors,
    decode_safetensors_header,
    encode_safetensors,
)
from batchnorm_client.wire.tensors.tensor import Tensor, itemsize

__all__ = [
    "CODECS",
    "MANY_LAYERS_HEADER",
    "Codec",
    "Tensor",
    "bytes_read",
    "codec",
    "decode",
    "decode_safetensors",
    "decode_safetensors_header",
    "encode",
    "encode_safetensors",
    "itemsize",
    "json_pieces",
    "json_tensors",
    "load_json",
    "require",
    "split_vectors",
    "widened",
]
