"""The calls of the HTTP interface: each function returns a `Request`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np
import orjson

from batchnorm_client.arrays import A, to_wire
from batchnorm_client.core import readers
from batchnorm_client.core.group_member import GroupMember, group_wait
from batchnorm_client.core.messages import Request
from batchnorm_client.core.state_choice import NEWEST, StateChoice
from batchnorm_client.core.unknown_outcome import confirm_deleted, confirm_replaced, confirm_updated
from batchnorm_client.kernels.state import LocalState
from batchnorm_client.options import LayerChanges, LayerOptions, Mode, Normalize, What
from batchnorm_client.results import EvalResult, FoldResult, Gradients, TrainResult
from batchnorm_client.wire.documents import Drift, Layer, LayerPage
from batchnorm_client.wire.errors import InvalidRequest, ProblemError
from batchnorm_client.wire.figures import Figures
from batchnorm_client.wire.headers import IDEMPOTENCY_KEY, KEY_PATTERN
from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_client.wire.names import check_layer_name
from batchnorm_client.wire.tensors import Tensor, encode, json_pieces

if TYPE_CHECKING:
    from batchnorm_client.options import Moments, Rows, StateDict

_PAGE = 1000
_WRITE = orjson.OPT_SERIALIZE_NUMPY


def ready() -> Request[bool]:
    """Whether the service is ready."""
    return Request("GET", "/readyz", lambda response: response.status == 200, (200, 502, 503, 504), reads=True)


def figures() -> Request[Figures]:
    """The service's metrics."""
    return Request("GET", "/metrics", readers.figures, headers={"Accept": "text/plain"}, reads=True)


def create(name: str, num_features: int, options: LayerOptions) -> Request[Layer]:
    """Create a layer. Fields that are left out get their defaults from the service."""
    document = {"num_features": num_features, **options}
    return Request(
        "PUT", layer_path(name), readers.layer, (200, 201), JSON_BODY, [orjson.dumps(document, option=_WRITE)]
    )


def page(prefix: str, after: str | None) -> Request[LayerPage]:
    """One page of the listing."""
    query = {"limit": str(_PAGE)} | ({"prefix": prefix} if prefix else {}) | ({"after": after} if after else {})
    return Request("GET", f"/v1/layers?{urlencode(query)}", readers.page, reads=True)


def inspect(name: str, choice: StateChoice = NEWEST) -> Request[Layer]:
    """A layer's config and state."""
    return Request("GET", _at(layer_path(name), choice), partial(readers.chosen_layer, choice), reads=True)


def drift(name: str) -> Request[Drift]:
    """How far the batches that come in are from a layer's running statistics."""
    return Request("GET", f"{layer_path(name)}/drift", readers.drift, reads=True)


def update(name: str, changes: LayerChanges, if_match: int | None) -> Request[Layer]:
    """Set options and parameters.

    Retried also without If-Match, because setting the same values twice changes nothing more, and no statistics are
    involved. It can only overwrite another caller's PATCH between two attempts.
    """
    document: dict[str, Any] = dict(changes)
    for parameter in ("weight", "bias"):
        if parameter in document:
            document[parameter] = _vector(document[parameter])
    return Request(
        "PATCH",
        layer_path(name),
        readers.layer,
        headers=JSON_BODY | if_match_header(if_match),
        pieces=json_pieces(document),
        confirm=None if if_match is None else partial(confirm_updated, layer_path(name), document, if_match),
    )


def delete(name: str, if_match: int | None, *, with_pins: bool = False) -> Request[None]:
    """Delete a layer; one that has pins only `with_pins`.

    Without If-Match it is not sent again once it may have taken effect, because another layer may have the name by
    then. Instead, a GET finds out whether the layer is gone.
    """
    return Request(
        "DELETE",
        f"{layer_path(name)}{'?pins=delete' if with_pins else ''}",
        readers.nothing,
        (204,),
        headers=if_match_header(if_match),
        repeat_if_unknown=if_match is not None,
        confirm=partial(confirm_deleted, layer_path(name), if_match),
    )


def reset(name: str, what: What, key: str, if_match: int | None) -> Request[Layer]:
    """Reset running statistics or parameters. With the key, every repeat is safe."""
    return Request(
        "POST",
        f"{layer_path(name)}/reset",
        readers.layer,
        headers=JSON_BODY | key_header(key) | if_match_header(if_match),
        pieces=[orjson.dumps({"what": what})],
    )


def state(name: str, choice: StateChoice = NEWEST) -> Request[dict[str, Tensor]]:
    """A layer's tensors."""
    return Request(
        "GET",
        _at(f"{layer_path(name)}/state", choice),
        partial(readers.chosen_tensors, choice, name),
        headers={"Accept": SAFETENSORS},
        reads=True,
    )


def replace_state(name: str, state_dict: StateDict, if_match: int | None) -> Request[Layer]:
    """Replace a layer's tensors.

    Without If-Match it is not sent again once it may have taken effect, because that would undo batches that others
    trained in between.
    """
    arrays = {key: np.asarray(value) if isinstance(value, int) else value for key, value in state_dict.items()}
    tensors = {key: to_wire(array) for key, array in arrays.items()}
    return Request(
        "PUT",
        f"{layer_path(name)}/state",
        readers.layer,
        headers={"Content-Type": SAFETENSORS} | if_match_header(if_match),
        pieces=encode(SAFETENSORS, tensors),
        repeat_if_unknown=if_match is not None,
        confirm=None if if_match is None else partial(confirm_replaced, layer_path(name), tensors, if_match),
    )


def train(
    name: str,
    batch: A,
    *,
    key: str,
    statistics: bool = False,
    normalize: Normalize = "batch",
    member: GroupMember | None = None,
) -> Request[TrainResult[A]]:
    """Fold the batch's statistics, and normalize with them or with the running ones. With the key, a repeat is safe."""
    tensor = to_wire(batch)
    return Request(
        "POST",
        _target(name, "train", statistics=statistics, normalize=normalize, member=member),
        partial(readers.trained, tensor.shape, batch),
        headers=_TENSORS | key_header(key),
        pieces=encode(SAFETENSORS, {"input": tensor}),
        waits=group_wait(member),
    )


def evaluate(
    name: str, batch: A, *, statistics: bool = False, call: str = "eval", choice: StateChoice = NEWEST
) -> Request[EvalResult[A]]:
    """Normalize with the running statistics."""
    tensor = to_wire(batch)
    return Request(
        "POST",
        _target(name, call, statistics=statistics, choice=choice),
        partial(readers.evaluated, tensor.shape, batch),
        headers=_TENSORS,
        pieces=encode(SAFETENSORS, {"input": tensor}),
        reads=True,
    )


def inverse(name: str, batch: A, choice: StateChoice = NEWEST) -> Request[EvalResult[A]]:
    """Undo what eval does."""
    return evaluate(name, batch, call="inverse", choice=choice)


def backward(
    name: str, batch: A, grad_output: A, *, mode: Mode, key: str, member: GroupMember | None
) -> Request[Gradients[A]]:
    """The gradients of a normalization. In a group it carries a key, by which the group recognizes a repeat."""
    tensors = {"input": to_wire(batch), "grad_output": to_wire(grad_output)}
    return Request(
        "POST",
        _target(name, "backward", mode=mode, member=member),
        partial(readers.differentiated, tensors["input"].shape, batch),
        headers=_TENSORS | (key_header(key) if member else {}),
        pieces=encode(SAFETENSORS, tensors),
        reads=True,
        waits=group_wait(member),
    )


def fold_moments(name: str, moments: Moments, *, key: str, member: GroupMember | None = None) -> Request[FoldResult]:
    """Fold the moments of a batch, or of a stack of batches, which are not sent. With the key, every repeat is safe."""
    return Request(
        "POST",
        _target(name, "moments", member=member),
        readers.folded,
        headers={"Content-Type": SAFETENSORS} | key_header(key),
        pieces=encode(SAFETENSORS, _moments(moments)),
        waits=group_wait(member),
    )


def fold_many(
    layers: Mapping[str, Moments], *, key: str | Mapping[str, str]
) -> list[Request[dict[str, FoldResult | ProblemError]]]:
    """The same for many layers: one request, or one for each key, since a request carries one key.

    Raises:
        ValueError: the keys are for other layers.
    """
    if not isinstance(key, Mapping):
        return [_fold_together(layers, key)]
    if key.keys() != layers.keys():
        raise ValueError(f"keys and moments of different layers: {sorted(key.keys() ^ layers.keys())}")
    by_key: dict[str, dict[str, Moments]] = {}
    for name, moments in layers.items():
        by_key.setdefault(key[name], {})[name] = moments
    return [_fold_together(group, shared) for shared, group in by_key.items()]


def _fold_together(layers: Mapping[str, Moments], key: str) -> Request[dict[str, FoldResult | ProblemError]]:
    tensors = {f"{name}/{part}": one for name, given in layers.items() for part, one in _moments(given).items()}
    return Request(
        "POST",
        "/v1/moments",
        partial(readers.many_folded, list(layers)),
        headers={"Content-Type": SAFETENSORS} | key_header(key),
        pieces=encode(SAFETENSORS, tensors),
    )


def revalidate(name: str, cached: LocalState | None, choice: StateChoice = NEWEST) -> Request[LocalState]:
    """The layer's state for normalizing in the client, read again only if it changed."""
    unless = {} if cached is None else {"If-None-Match": f'"{cached.version}"'}
    read = partial(readers.local_state, choice, cached)
    return Request("GET", _at(layer_path(name), choice), read, (200, 304), unless, reads=True)


def layer_path(name: str) -> str:
    """The path of a layer.

    Raises:
        InvalidRequest: not a valid layer name. Checked here, because `.` and `..` would lead to another path.
    """
    check_layer_name(name)
    return f"/v1/layers/{name}"


JSON_BODY = {"Content-Type": JSON}
_TENSORS = {"Content-Type": SAFETENSORS, "Accept": SAFETENSORS}


def _target(
    name: str,
    call: str,
    *,
    statistics: bool = False,
    mode: Mode | None = None,
    normalize: Normalize = "batch",
    member: GroupMember | None = None,
    choice: StateChoice = NEWEST,
) -> str:
    query: dict[str, Any] = {"normalize": normalize} if normalize != "batch" else {}
    query |= {"statistics": "true"} if statistics else {}
    chosen = {"mode": mode, "at": choice.at, "expect": choice.expect}
    query |= {name: value for name, value in chosen.items() if value is not None}
    if member is not None:
        query |= {"group": member.group, "size": member.size}
        query |= {} if member.timeout is None else {"timeout": member.timeout}
    return f"{layer_path(name)}/{call}{'?' if query else ''}{urlencode(query)}"


def _at(path: str, choice: StateChoice) -> str:
    return path if choice.at is None else f"{path}?{urlencode({'at': choice.at})}"


def _moments(moments: Moments) -> dict[str, Tensor]:
    count, mean, var = moments
    tensors = {"mean": _vector(mean), "var": _vector(var)}
    counts: Any = np.asarray(count)
    if counts.ndim == 0:
        return {"count": Tensor.of(np.array(int(counts), np.int64))} | tensors
    if counts.size and not np.issubdtype(counts.dtype, np.integer):
        raise TypeError(f"the counts of a stack are integers, not {counts.dtype}")
    if counts.size and counts.max() > np.iinfo(np.int64).max:
        raise TypeError(f"the counts of a stack are 64-bit integers, not {counts.max()}")
    return {"count": Tensor.of(counts.astype(np.int64))} | tensors


def key_header(key: str) -> dict[str, str]:
    """The header for a key.

    Raises:
        InvalidRequest: it is not a valid key.
    """
    if not KEY_PATTERN.fullmatch(key):
        raise InvalidRequest(
            "a key is 1 to 200 characters of ASCII 0x21 to 0x7E", field=IDEMPOTENCY_KEY, expected=KEY_PATTERN.pattern
        )
    return {IDEMPOTENCY_KEY: key}


def if_match_header(version: int | None) -> dict[str, str]:
    """The header for a precondition on the version; none without one."""
    return {} if version is None else {"If-Match": f'"{version:d}"'}


def _vector(values: Rows) -> Tensor:
    if isinstance(values, list | tuple):
        values = np.asarray(values, np.float64)
    return to_wire(values)
