"""The calls of the contract, each as a function that makes its `Request`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from uuid import uuid4

import numpy as np
import orjson

from batchnorm_client.arrays import A, to_wire
from batchnorm_client.contract import (
    IDEMPOTENCY_KEY,
    JSON,
    KEY_PATTERN,
    LAYER_NAME_PATTERN,
    SAFETENSORS,
    Layer,
    LayerPage,
)
from batchnorm_client.core import readers
from batchnorm_client.core.doubt import is_deleted, is_replaced, is_updated
from batchnorm_client.core.exchange import Request
from batchnorm_client.errors import InvalidRequest
from batchnorm_client.options import LayerChanges, LayerOptions, What
from batchnorm_client.results import EvalResult, TrainResult
from batchnorm_client.tensors import Tensor, encode, json_list

if TYPE_CHECKING:
    from batchnorm_client.options import Numbers, StateDict

_PAGE = 1000
_WRITE = orjson.OPT_SERIALIZE_NUMPY


def ready() -> Request[bool]:
    """Can the service work?"""
    return Request("GET", "/readyz", lambda answer: answer.status == 200, (200, 502, 503, 504), reads=True)


def create(name: str, num_features: int, options: LayerOptions) -> Request[Layer]:
    """Create a layer. Fields that are left out get their defaults from the service."""
    document = {"num_features": num_features, **options}
    return Request("PUT", layer_path(name), readers.layer, (200, 201), _JSON, [orjson.dumps(document, option=_WRITE)])


def page(prefix: str, after: str | None) -> Request[LayerPage]:
    """One page of the listing."""
    query = {"limit": str(_PAGE)} | ({"prefix": prefix} if prefix else {}) | ({"after": after} if after else {})
    return Request("GET", f"/v1/layers?{urlencode(query)}", readers.page, reads=True)


def inspect(name: str) -> Request[Layer]:
    """A layer's config and state."""
    return Request("GET", layer_path(name), readers.layer, reads=True)


def update(name: str, changes: LayerChanges, if_match: int | None) -> Request[Layer]:
    """Set options and parameters.

    Repeated also without If-Match: it sets values, which are the same the second time, and touches no statistics. Only
    another caller's PATCH between two tries is overwritten.
    """
    document: dict[str, Any] = dict(changes)
    for parameter in ("weight", "bias"):
        if parameter in document:
            document[parameter] = json_list(_vector(document[parameter]))
    return Request(
        "PATCH",
        layer_path(name),
        readers.layer,
        headers=_JSON | _if_match(if_match),
        pieces=[orjson.dumps(document, option=_WRITE)],
        settle=None if if_match is None else partial(is_updated, layer_path(name), document, if_match),
    )


def delete(name: str, if_match: int | None) -> Request[None]:
    """Delete a layer.

    Without If-Match it is not sent again once it may have taken effect: by then another layer may have the name. A
    look tells whether the layer is gone.
    """
    return Request(
        "DELETE",
        layer_path(name),
        readers.nothing,
        (204,),
        headers=_if_match(if_match),
        repeat_in_doubt=if_match is not None,
        settle=partial(is_deleted, layer_path(name), if_match),
    )


def reset(name: str, what: What, key: str | None, if_match: int | None) -> Request[Layer]:
    """Set running statistics or parameters back. A key makes every repeat safe."""
    return Request(
        "POST",
        f"{layer_path(name)}/reset",
        readers.layer,
        headers=_JSON | _key(key) | _if_match(if_match),
        pieces=[orjson.dumps({"what": what})],
    )


def state(name: str) -> Request[dict[str, Tensor]]:
    """A layer's tensors."""
    return Request("GET", f"{layer_path(name)}/state", readers.tensors, headers={"Accept": SAFETENSORS}, reads=True)


def replace_state(name: str, state_dict: StateDict, if_match: int | None) -> Request[Layer]:
    """Replace a layer's tensors.

    Without If-Match it is not sent again once it may have taken effect: it would undo the batches that others
    trained in between.
    """
    arrays = {key: np.asarray(value) if isinstance(value, int) else value for key, value in state_dict.items()}
    tensors = {key: to_wire(array) for key, array in arrays.items()}
    return Request(
        "PUT",
        f"{layer_path(name)}/state",
        readers.layer,
        headers={"Content-Type": SAFETENSORS} | _if_match(if_match),
        pieces=encode(SAFETENSORS, tensors),
        repeat_in_doubt=if_match is not None,
        settle=None if if_match is None else partial(is_replaced, layer_path(name), tensors, if_match),
    )


def train(name: str, batch: A, *, key: str | None, statistics: bool) -> Request[TrainResult[A]]:
    """Normalize with the batch's statistics, and fold them. A key makes every repeat safe."""
    tensor = to_wire(batch)
    return Request(
        "POST",
        _target(name, "train", statistics),
        partial(readers.trained, tensor.shape, batch),
        headers=_TENSORS | _key(key),
        pieces=encode(SAFETENSORS, {"input": tensor}),
    )


def evaluate(name: str, batch: A, *, statistics: bool) -> Request[EvalResult[A]]:
    """Normalize with the running statistics."""
    tensor = to_wire(batch)
    return Request(
        "POST",
        _target(name, "eval", statistics),
        partial(readers.evaluated, tensor.shape, batch),
        headers=_TENSORS,
        pieces=encode(SAFETENSORS, {"input": tensor}),
        reads=True,
    )


def layer_path(name: str) -> str:
    """The path of a layer.

    Raises:
        InvalidRequest: no layer can be called that. Found here, because `.` and `..` would lead elsewhere.
    """
    if not LAYER_NAME_PATTERN.fullmatch(name):
        raise InvalidRequest(
            "a layer name is 1 to 200 letters, digits, dots, underscores and hyphens, the first a letter or digit",
            field="name",
            expected=LAYER_NAME_PATTERN.pattern,
            got=name[:200],
        )
    return f"/v1/layers/{name}"


_JSON = {"Content-Type": JSON}
_TENSORS = {"Content-Type": SAFETENSORS, "Accept": SAFETENSORS}


def _target(name: str, call: str, statistics: bool) -> str:
    return f"{layer_path(name)}/{call}{'?statistics=true' if statistics else ''}"


def _key(key: str | None) -> dict[str, str]:
    if key is None:
        key = uuid4().hex
    elif not KEY_PATTERN.fullmatch(key):
        raise InvalidRequest(
            "a key is 1 to 200 characters of ASCII 0x21 to 0x7E", field=IDEMPOTENCY_KEY, expected=KEY_PATTERN.pattern
        )
    return {IDEMPOTENCY_KEY: key}


def _if_match(version: int | None) -> dict[str, str]:
    return {} if version is None else {"If-Match": f'"{version:d}"'}


def _vector(values: Numbers) -> Tensor:
    if isinstance(values, list | tuple):
        values = np.asarray(values, np.float64)
    return to_wire(values)
