"""Answers as results. What an answer lacks, or has in another form than the contract says, is a ValueError."""

from __future__ import annotations

from batchnorm_client.arrays import A, from_wire
from batchnorm_client.contract import (
    IDEMPOTENT_REPLAY,
    JSON,
    NUM_BATCHES_TRACKED,
    SAFETENSORS,
    VERSION,
    Layer,
    LayerPage,
)
from batchnorm_client.core.exchange import Answer
from batchnorm_client.errors import ProblemError
from batchnorm_client.results import BatchStatistics, EvalResult, TrainResult
from batchnorm_client.tensors import Tensor, decode_safetensors

_STATISTICS = ("batch_mean", "batch_var", "batch_invstd")


def nothing(_answer: Answer) -> None:
    """There is nothing to read."""


def layer(answer: Answer) -> Layer:
    """A `Layer` document. Fields that a newer service added are passed over."""
    _check_form(answer, JSON)
    return Layer.model_validate_json(bytes(answer.body), extra="ignore")


def page(answer: Answer) -> LayerPage:
    """A page of a listing."""
    _check_form(answer, JSON)
    return LayerPage.model_validate_json(bytes(answer.body), extra="ignore")


def tensors(answer: Answer) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as views of the answer's body."""
    _check_form(answer, SAFETENSORS)
    try:
        return decode_safetensors(answer.body)[0]
    except ProblemError as error:  # it is the answer that is malformed, not the request
        raise ValueError(str(error)) from error


def trained(shape: tuple[int, ...], batch: A, answer: Answer) -> TrainResult[A]:
    """The answer to train."""
    output, statistics = _normalized(shape, batch, answer)
    return TrainResult(
        output,
        version=int(answer.headers[VERSION.lower()]),
        num_batches_tracked=int(answer.headers[NUM_BATCHES_TRACKED.lower()]),
        replayed=answer.headers.get(IDEMPOTENT_REPLAY.lower()) == "true",
        statistics=statistics,
    )


def evaluated(shape: tuple[int, ...], batch: A, answer: Answer) -> EvalResult[A]:
    """The answer to eval."""
    output, statistics = _normalized(shape, batch, answer)
    return EvalResult(
        output,
        version=int(answer.headers[VERSION.lower()]),
        num_batches_tracked=int(answer.headers[NUM_BATCHES_TRACKED.lower()]),
        statistics=statistics,
    )


def _normalized(shape: tuple[int, ...], batch: A, answer: Answer) -> tuple[A, BatchStatistics[A] | None]:
    found = tensors(answer)
    output = found["output"]
    if output.shape != shape:
        raise ValueError(f"the output has shape {output.shape}, the input {shape}")
    statistics = None
    if all(name in found for name in _STATISTICS):
        statistics = BatchStatistics(*(from_wire(found[name], batch) for name in _STATISTICS))
    return from_wire(output, batch), statistics


def _check_form(answer: Answer, expected: str) -> None:
    if answer.media_type != expected:
        raise ValueError(f"it is {answer.media_type or 'of no type'}, not {expected}")
