"""The calls on the states of several layers: each function returns a `Request`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import numpy as np
import orjson

from batchnorm_client.arrays import to_wire
from batchnorm_client.core import readers
from batchnorm_client.core.messages import Request
from batchnorm_client.results import LayerStates, Replaced
from batchnorm_client.wire.errors import ProblemError
from batchnorm_client.wire.media_types import SAFETENSORS
from batchnorm_client.wire.names import check_layer_name
from batchnorm_client.wire.tensors import Tensor, encode_safetensors, itemsize

if TYPE_CHECKING:
    from batchnorm_client.options import StateDict

PATH = "/v1/state"
_PARAMETERS = {"weight", "bias"}


def states(
    names: Collection[str] | None, prefix: str | None, known: LayerStates | None, wait: float
) -> Request[LayerStates]:
    """The states of several layers, read again only if they are not the known ones.

    Raises:
        ValueError: neither names nor a prefix are given, or both; or `wait` without `known`.
        InvalidRequest: not a valid layer name.
    """
    if (names is None) == (prefix is None):
        raise ValueError("either names or prefix must be given")
    if wait and known is None:
        raise ValueError("wait needs known=, the states that it waits for others than")
    if isinstance(names, str):
        raise TypeError("names must be several names, not one string")
    query = {"prefix": prefix or ""}
    if names is not None:
        for name in names:
            check_layer_name(name)
        query = {"names": ",".join(names)}
    target = f"{PATH}?{urlencode(query | ({'wait': f'{wait:g}'} if wait else {}), safe=',')}"
    headers = {"Accept": SAFETENSORS} | ({} if known is None else {"If-None-Match": known.etag})
    return Request("GET", target, partial(readers.layer_states, known), (200, 304), headers, reads=True, waits=wait)


def replace_states(
    state_dicts: Mapping[str, StateDict], versions: Mapping[str, int]
) -> Request[dict[str, Replaced | ProblemError]]:
    """Replace tensors of several layers.

    Sent again after an unknown outcome only if it sets weight and bias alone, without versions: this changes nothing
    more. Anything else would undo batches that others trained in between, or fail by its own version.

    Raises:
        ValueError: there is a version of a layer without tensors.
        InvalidRequest: not a valid layer name.
    """
    if unknown := versions.keys() - state_dicts.keys():
        raise ValueError(f"versions of layers without tensors: {sorted(unknown)}")
    tensors: dict[str, Tensor] = {}
    for name, state_dict in state_dicts.items():
        check_layer_name(name)
        for key, value in state_dict.items():
            tensors[f"{name}.{key}"] = to_wire(np.asarray(value) if isinstance(value, int) else value)
    wide_first = dict(sorted(tensors.items(), key=lambda item: -itemsize(item[1].dtype)))
    metadata = {"versions": orjson.dumps(dict(versions)).decode()} if versions else None
    return Request(
        "PUT",
        PATH,
        partial(readers.many_replaced, list(state_dicts)),
        headers={"Content-Type": SAFETENSORS},
        pieces=encode_safetensors(wide_first, metadata),
        repeat_if_unknown=not versions and all(given.keys() <= _PARAMETERS for given in state_dicts.values()),
    )
