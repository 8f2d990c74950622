"""The handler that everybody writes first: FastAPI, nested lists in pydantic models, torch in between."""

from __future__ import annotations

import torch
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.servers.knobs import serve

torch.set_num_threads(1)
app = FastAPI()
norms: dict[int, torch.nn.BatchNorm1d] = {}


class Batch(BaseModel):
    """What comes in."""

    input: list[list[float]]


class Normalized(BaseModel):
    """What goes out."""

    output: list[list[float]]


@app.post("/eval", response_model=None)
async def evaluate(batch: Batch) -> dict[str, list[list[float]]]:
    """Normalize with the running statistics, and let FastAPI find out how a dict becomes JSON."""
    return {"output": _normalize(batch)}


@app.post("/eval-typed")
async def evaluate_typed(batch: Batch) -> Normalized:
    """The same with a model for the answer, which pydantic writes in Rust."""
    return Normalized(output=_normalize(batch))


def _normalize(batch: Batch) -> list[list[float]]:
    x = torch.tensor(batch.input)
    if x.shape[1] not in norms:
        norms[x.shape[1]] = torch.nn.BatchNorm1d(x.shape[1]).eval()
    with torch.inference_mode():
        output: list[list[float]] = norms[x.shape[1]](x).tolist()
    return output


if __name__ == "__main__":
    serve(app)
