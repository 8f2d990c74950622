"""The handler of someone who knows the way around: FastAPI on the raw body, orjson for the numbers, numpy between."""

from __future__ import annotations

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response

from benchmarks.servers.knobs import serve

app = FastAPI()


@app.post("/eval")
async def evaluate(request: Request) -> Response:
    """Normalize with the running statistics, which are those of a new layer."""
    x = np.array(orjson.loads(await request.body())["input"], np.float32)
    channels = x.shape[1]
    mean, var = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    weight, bias = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    y = (x - mean) / np.sqrt(var + np.float32(1e-5)) * weight + bias
    return Response(orjson.dumps({"output": y}, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


if __name__ == "__main__":
    serve(app)
