"""Is the process alive, and can it work?"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from .openapi import answers
from .routes import LayersDependency, document_router

router = document_router("health", guarded=False)


class Health(BaseModel):
    """What a probe says when all is well."""

    status: Literal["ok"] = "ok"


@router.get("/healthz", summary="The process is alive", responses=answers("It is", guarded=False))
async def healthz() -> Health:
    """Asks nothing of the store: restarting the process would not help a store that is gone."""
    return Health()


@router.get("/readyz", summary="The store can be reached", responses=answers("It can", guarded=False))
async def readyz(layers: LayersDependency) -> Health:
    """503 `store-unavailable` as long as it cannot."""
    await layers.ping()
    return Health()
