"""Liveness and readiness probes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from .openapi import describe_responses
from .routes import LayersDependency, document_router

router = document_router("health")


class Health(BaseModel):
    """The body of a successful probe."""

    status: Literal["ok"] = "ok"


@router.get("/healthz", summary="The process is alive", responses=describe_responses("It is", guarded=False))
async def healthz() -> Health:
    """Does not check the store: restarting the process would not repair it."""
    return Health()


@router.get("/readyz", summary="The store can be reached", responses=describe_responses("It can", guarded=False))
async def readyz(layers: LayersDependency) -> Health:
    """503 `store-unavailable` while it cannot."""
    await layers.ping()
    return Health()
