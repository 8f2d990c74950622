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


@app.post("/eval")
async def evaluate(batch: Batch) -> Normalized:
    """Normalize with the running statistics."""
    x = torch.tensor(batch.input)
    if x.shape[1] not in norms:
        norms[x.shape[1]] = torch.nn.BatchNorm1d(x.shape[1]).eval()
    with torch.inference_mode():
        return Normalized(output=norms[x.shape[1]](x).tolist())


if __name__ == "__main__":
    serve(app)
