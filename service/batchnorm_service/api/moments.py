"""Calls of the contract that this version does not have yet: backward and moments."""

from __future__ import annotations

from typing import NoReturn

from fastapi import FastAPI
from starlette.requests import Request

from batchnorm_client.contract import IDEMPOTENCY_KEY
from batchnorm_client.errors import NotImplementedProblem

from .openapi import LayerNamePath, describe, empty_response
from .queries import BackwardQuery, NoQuery, parse_query

_NOT_YET = {200: empty_response("Not in this version")}


def add_moments_routes(app: FastAPI) -> None:
    """The calls that are missing, as routes of `app` that say so."""

    @app.post(
        "/v1/layers/{name}/backward",
        **describe(
            "backward",
            "Gradients of a normalization (not implemented yet)",
            tag="later",
            query=BackwardQuery,
            answers=_NOT_YET,
            problems=("not-implemented",),
        ),
    )
    async def backward(name: LayerNamePath, request: Request) -> NoReturn:
        """`input` and `grad_output` in; `grad_input`, `grad_weight` and `grad_bias` out."""
        parse_query(BackwardQuery, request.scope["query_string"])
        raise NotImplementedProblem("this version has no backward yet")

    @app.post(
        "/v1/layers/{name}/moments",
        **describe(
            "fold_moments",
            "Fold the moments of a batch that stays with the caller (not implemented yet)",
            tag="later",
            headers=(IDEMPOTENCY_KEY,),
            answers=_NOT_YET,
            problems=("not-implemented",),
        ),
    )
    async def fold_moments(name: LayerNamePath, request: Request) -> NoReturn:
        """`count`, `mean` and `var` (biased) in; JSON without tensors out."""
        parse_query(NoQuery, request.scope["query_string"])
        raise NotImplementedProblem("this version does not take moments yet")

    @app.post(
        "/v1/moments",
        **describe(
            "fold_many_moments",
            "Fold the moments of many layers (not implemented yet)",
            tag="later",
            headers=(IDEMPOTENCY_KEY,),
            answers=_NOT_YET,
            problems=("not-implemented",),
        ),
    )
    async def fold_many_moments(request: Request) -> NoReturn:
        """One result or problem for each layer."""
        parse_query(NoQuery, request.scope["query_string"])
        raise NotImplementedProblem("this version does not take moments yet")
