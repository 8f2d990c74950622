"""A batch before and after normalization, as histograms. It is evaluated: nothing changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
from fastapi import Query
from starlette.requests import Request

from batchnorm_client.wire.errors import InvalidRequest
from batchnorm_client.wire.headers import DIGEST
from batchnorm_client.wire.tensors import CODECS, Tensor, bytes_read, decode, widened
from batchnorm_service.layers import Normalized
from batchnorm_service.rest.bodies import read_body
from batchnorm_service.rest.headers import read_headers
from batchnorm_service.rest.negotiation import content_type
from batchnorm_service.rest.responses import Response, respond_json
from batchnorm_service.rest.routes import READ, LayerName, LayersDependency
from batchnorm_service.rest.sizes import check_elements

from .layer import At, _state
from .rendering import HEADERS, page_router
from .session import check_form_token

BINS: Final = 60
_BLOCK: Final = 1 << 18
_FORM_TOKEN: Final = b"x-form-token"

router = page_router()


@router.post("/ui/layers/{name}/histogram", dependencies=[READ])
async def batch_histogram(
    name: LayerName,
    request: Request,
    layers: LayersDependency,
    at: At = None,
    channel: Annotated[int | None, Query(ge=0, le=1 << 20)] = None,
) -> Response:
    """Evaluates a batch in any of the forms of `POST /v1/layers/{name}/eval`, and counts its values, before and after.

    With `channel`, only those of this channel.
    """
    headers, options = read_headers(request.scope["headers"]), request.app.state.options
    check_form_token(request, headers.get(_FORM_TOKEN, b"").decode("latin-1"))
    media = content_type(headers, tuple(CODECS))
    body = await read_body(headers, request.receive, options.max_body_bytes)
    given: list[Tensor] = []

    def read(dtypes: Mapping[str, str]) -> Mapping[str, Tensor]:
        tensors = decode(media, body, dtypes)
        if (batch := tensors.get("input")) is not None:
            check_elements(batch, options.max_elements, (media,), field="input")
            given.append(batch)
        return tensors

    config = (await layers.get(name, _state(at))).config
    if channel is not None and channel >= config.num_features:
        raise InvalidRequest(
            f"channel: the layer has {config.num_features} channels, counted from 0",
            field="channel",
            expected=f"0 to {config.num_features - 1}",
            got=channel,
        )
    done = await layers.batches.eval(name, read, nbytes=bytes_read(media, body), at=_state(at))
    size = 4 * len(done.output.buffer)
    document = await layers.encode(size, _document, given[0], done, config.channel_axis, channel)
    return respond_json(200, document, HEADERS)


def _document(batch: Tensor, done: Normalized, axis: int, channel: int | None) -> dict[str, Any]:
    return {
        "shape": done.output.shape,  # JSON's [] has got its other dimensions there
        "dtype": batch.dtype,
        "channel": channel,
        "version": done.version,
        DIGEST.lower(): done.digest,
        "before": histogram(batch, axis, channel),
        "after": histogram(done.output, axis, channel),
    }


def histogram(tensor: Tensor, axis: int, channel: int | None) -> dict[str, Any]:
    """The values of a batch, or of one of its channels, in bins of the same width; those that are not finite apart."""
    values = widened(tensor)
    if channel is not None and values.ndim > 1:
        values = np.take(values, channel, axis=axis)
    count, low, high = 0, math.inf, -math.inf
    for finite in _finite_blocks(values):
        count += finite.size
        low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    document: dict[str, Any] = {"values": values.size, "not_finite": values.size - count}
    if not count:
        return document | {"edges": [], "counts": [], "mean": None, "std": None, "low": None, "high": None}
    document |= {"low": low, "high": high}
    if high - low <= math.ulp(max(abs(low), abs(high))) * BINS:  # one value, or too close together for bins
        most = float(np.finfo(np.float64).max)
        low, high = max(low - 0.5 - abs(low) / 2, -most), min(high + 0.5 + abs(high) / 2, most)
    # By a power of 2 into -1 to 1, where neither the span nor a sum is infinite, and no bin is as small as a rounding.
    _, exponent = np.frexp(max(abs(low), abs(high)))
    span = np.ldexp(low, -exponent), np.ldexp(high, -exponent)
    counts, edges = np.zeros(BINS, np.int64), np.linspace(*span, BINS + 1)
    done, mean, squares = 0, 0.0, 0.0
    for finite in _finite_blocks(values):
        scaled = np.ldexp(finite, -exponent, out=finite)
        counts += np.histogram(scaled, BINS, span)[0]
        done += scaled.size
        share, apart = scaled.size / done, float(scaled.mean()) - mean
        squares += float(scaled.var()) * scaled.size + apart**2 * share * (done - scaled.size)  # Chan et al., 1979
        mean += apart * share
    numbers = {"mean": float(np.ldexp(mean, exponent)), "std": float(np.ldexp(math.sqrt(squares / done), exponent))}
    return document | {"edges": np.ldexp(edges, exponent).tolist(), "counts": counts.tolist(), **numbers}


def _finite_blocks(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[np.float64]]:
    """The finite values as float64, some at a time: all at once would take several times the memory of the batch."""
    flat = values.reshape(-1)
    for first in range(0, flat.size, _BLOCK):
        block = flat[first : first + _BLOCK]
        finite = block[np.isfinite(block)]
        if finite.size:
            yield finite.astype(np.float64)
