"""Functions that read responses. A ValueError means that a response is not as specified."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import numpy as np
import orjson

from batchnorm_client.arrays import A, from_wire
from batchnorm_client.core.messages import Response
from batchnorm_client.core.problems import may_have_taken_effect, problem_of
from batchnorm_client.core.state_choice import StateChoice
from batchnorm_client.kernels.state import LocalState
from batchnorm_client.results import (
    BatchStatistics,
    EvalResult,
    FoldResult,
    Gradients,
    LayerStates,
    Replaced,
    TrainResult,
)
from batchnorm_client.wire.documents import (
    Drift,
    FoldedDocument,
    HistoryPage,
    Layer,
    LayerConfig,
    LayerPage,
    Pin,
    Pins,
    ReplacedDocument,
)
from batchnorm_client.wire.errors import ProblemError
from batchnorm_client.wire.figures import Figures, read_figures
from batchnorm_client.wire.headers import DIGEST, IDEMPOTENT_REPLAY, NUM_BATCHES_TRACKED, REQUEST_ID, VERSION
from batchnorm_client.wire.media_types import JSON, SAFETENSORS, TEXT
from batchnorm_client.wire.tensors import MANY_LAYERS_HEADER, Tensor, decode_safetensors

R = TypeVar("R")

_STATISTICS = ("batch_mean", "batch_var", "batch_invstd")


def nothing(_response: Response) -> None:
    """There is nothing to read."""


def layer(response: Response) -> Layer:
    """A `Layer` document. Fields that a newer service added are ignored."""
    _check_form(response, JSON)
    return Layer.model_validate_json(bytes(response.body), extra="ignore")


def figures(response: Response) -> Figures:
    """The metrics in Prometheus's text format."""
    _check_form(response, TEXT)
    return read_figures(bytes(response.body).decode())


def page(response: Response) -> LayerPage:
    """A page of a listing."""
    _check_form(response, JSON)
    return LayerPage.model_validate_json(bytes(response.body), extra="ignore")


def drift(response: Response) -> Drift:
    """The drift of a layer."""
    _check_form(response, JSON)
    return Drift.model_validate_json(bytes(response.body), extra="ignore")


def history(response: Response) -> HistoryPage:
    """A page of a layer's history."""
    _check_form(response, JSON)
    return HistoryPage.model_validate_json(bytes(response.body), extra="ignore")


def pin(response: Response) -> Pin:
    """A pin."""
    _check_form(response, JSON)
    return Pin.model_validate_json(bytes(response.body), extra="ignore")


def pins(response: Response) -> list[Pin]:
    """The pins of a layer."""
    _check_form(response, JSON)
    return Pins.model_validate_json(bytes(response.body), extra="ignore").pins


def chosen_layer(choice: StateChoice, response: Response) -> Layer:
    """A `Layer` document. Raises `DigestMismatch` if its numbers do not have the expected digest."""
    found = layer(response)
    _check_numbers(choice, found.name, LocalState.of(found))
    return found


def chosen_tensors(choice: StateChoice, name: str, response: Response) -> dict[str, Tensor]:
    """The tensors of a state of layer `name`. Raises `DigestMismatch` if it has another digest than expected."""
    choice.check_digest(name, response.headers[DIGEST.lower()])
    return tensors(response)


def tensors(response: Response) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as views of the response's body."""
    _check_form(response, SAFETENSORS)
    try:
        return decode_safetensors(response.body)[0]
    except ProblemError as error:  # it is the response that is malformed, not the request
        raise ValueError(str(error)) from error


def trained(shape: tuple[int, ...], batch: A, response: Response) -> TrainResult[A]:
    """The response to train."""
    output, statistics = _normalized(shape, batch, response)
    return TrainResult(
        output,
        version=int(response.headers[VERSION.lower()]),
        num_batches_tracked=int(response.headers[NUM_BATCHES_TRACKED.lower()]),
        replayed=_is_replay(response),
        statistics=statistics,
    )


def evaluated(shape: tuple[int, ...], batch: A, response: Response) -> EvalResult[A]:
    """The response to eval."""
    output, statistics = _normalized(shape, batch, response)
    return EvalResult(
        output,
        version=int(response.headers[VERSION.lower()]),
        num_batches_tracked=int(response.headers[NUM_BATCHES_TRACKED.lower()]),
        digest=response.headers[DIGEST.lower()],
        statistics=statistics,
    )


def differentiated(shape: tuple[int, ...], batch: A, response: Response) -> Gradients[A]:
    """The response to backward."""
    found = {name: from_wire(tensor, batch) for name, tensor in tensors(response).items()}
    if tuple(found["grad_input"].shape) != shape:
        raise ValueError(f"grad_input has shape {tuple(found['grad_input'].shape)}, the input {shape}")
    return Gradients(
        found["grad_input"],
        found.get("grad_weight"),
        found.get("grad_bias"),
        version=int(response.headers[VERSION.lower()]),
        replayed=_is_replay(response),
    )


def folded(response: Response) -> FoldResult:
    """The response to moments."""
    _check_form(response, JSON)
    return _folded(orjson.loads(response.body) | {"replayed": _is_replay(response)})


def many_folded(names: Collection[str], response: Response) -> dict[str, FoldResult | ProblemError]:
    """The response to moments of many layers, which has a result for each of them."""
    return _results(names, response, _folded)


def _results(
    names: Collection[str], response: Response, read: Callable[[dict[str, Any]], R]
) -> dict[str, R | ProblemError]:
    _check_form(response, JSON)
    request_id = response.headers.get(REQUEST_ID.lower())
    results: dict[str, R | ProblemError] = {}
    for name, document in orjson.loads(response.body)["layers"].items():
        if "type" in document:
            error = problem_of(document, request_id)
            if error is None:
                raise ValueError(f"{document['type']} is no known problem")
            error.outcome_unknown = may_have_taken_effect(error)
            results[name] = error
        else:
            results[name] = read(document)
    if results.keys() != set(names):
        raise ValueError(f"layers {sorted(names)} were sent, and the results are those of {sorted(results)}")
    return results


def many_replaced(names: Collection[str], response: Response) -> dict[str, Replaced | ProblemError]:
    """The response to tensors of many layers, which has a result for each of them."""
    return _results(names, response, _replaced)


def layer_states(known: LayerStates | None, response: Response) -> LayerStates:
    """The states of several layers; the known ones if the service says that they are current."""
    if response.status == 304:
        if known is None:
            raise ValueError("a 304 to a call without a condition")
        return known
    _check_form(response, SAFETENSORS)
    try:
        tensors, metadata = decode_safetensors(response.body, max_header=MANY_LAYERS_HEADER)
    except ProblemError as error:  # it is the response that is malformed, not the request
        raise ValueError(str(error)) from error
    versions: dict[str, int] = orjson.loads(metadata["versions"])
    configs = {
        name: LayerConfig.model_validate(config, extra="ignore")
        for name, config in orjson.loads(metadata["configs"]).items()
    }
    by_layer: dict[str, dict[str, Any]] = {name: {} for name in versions}
    for path, tensor in tensors.items():
        name, _, tensor_name = path.rpartition(".")
        by_layer[name][tensor_name] = tensor.numpy()
    return LayerStates(by_layer, configs, versions, response.headers["etag"])


def local_state(choice: StateChoice, cached: LocalState | None, response: Response) -> LocalState:
    """The layer's state for normalizing in the client; the cached one if the service says that it is current.

    Raises:
        DigestMismatch: its numbers do not have the expected digest.
    """
    if response.status == 304:
        if cached is None:
            raise ValueError("a 304 to a call without a condition")
        return cached
    found = layer(response)
    state = LocalState.of(found)
    _check_numbers(choice, found.name, state)
    return state


def _check_numbers(choice: StateChoice, name: str, state: LocalState) -> None:
    if choice.expect is not None:
        choice.check_digest(name, state.computed_digest())


def _folded(document: dict[str, Any]) -> FoldResult:
    found = FoldedDocument.model_validate(document, extra="ignore")
    mean, var = (None if one is None else np.array(one) for one in (found.mean, found.var))
    return FoldResult(
        found.version, found.num_batches_tracked, found.replayed, found.count, mean, var, found.folded or 1
    )


def _replaced(document: dict[str, Any]) -> Replaced:
    found = ReplacedDocument.model_validate(document, extra="ignore")
    return Replaced(found.version, found.num_batches_tracked)


def _is_replay(response: Response) -> bool:
    return response.headers.get(IDEMPOTENT_REPLAY.lower()) == "true"


def _normalized(shape: tuple[int, ...], batch: A, response: Response) -> tuple[A, BatchStatistics[A] | None]:
    found = tensors(response)
    output = found["output"]
    if output.shape != shape:
        raise ValueError(f"the output has shape {output.shape}, the input {shape}")
    statistics = None
    if all(name in found for name in _STATISTICS):
        statistics = BatchStatistics(*(from_wire(found[name], batch) for name in _STATISTICS))
    return from_wire(output, batch), statistics


def _check_form(response: Response, expected: str) -> None:
    if response.media_type != expected:
        raise ValueError(f"it is {response.media_type or 'of no type'}, not {expected}")
