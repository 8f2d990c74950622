"""Makes the calls of kserve's InferenceRESTClient: run by the test in the clients' own environment.

Argument: the service's URL. Prints as JSON what came back; an error as its text.
"""

import asyncio
import json
import sys

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput

TYPES = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}
ROWS = [[1.0, 2.0], [3.0, 6.0], [5.5, -7.25]]


def request(datatype, *, binary, parameters=None, outputs=None, rows=ROWS):
    array = np.array(rows, TYPES.get(datatype, np.float32)).reshape(-1, 2)
    data = None if binary else array.astype(float).tolist()
    given = InferInput("input", list(array.shape), datatype, data=data)
    if binary:
        given.set_data_from_numpy(array)
    return InferRequest("a transformer's name", [given], parameters=parameters, request_outputs=outputs)


def told(response):
    (output,) = response.outputs
    # kserve has no numpy type for BF16
    array = np.array(output.data).reshape(output.shape) if output.datatype == "BF16" else output.as_numpy()
    return {"model": response.model_name, "datatype": output.datatype, "output": array.astype(float).tolist()}


async def main(url):
    found = {}

    async def tell(name, call):
        try:
            result = await call
            found[name] = result if isinstance(result, bool) else told(result)
        except httpx.HTTPStatusError as error:
            found[name] = str(error)

    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        await tell("live", client.is_server_live(url))
        await tell("ready", client.is_server_ready(url))
        await tell("model ready", client.is_model_ready(url, "bn"))
        await tell("no model ready", client.is_model_ready(url, "none"))
        for datatype in ("FP16", "BF16", "FP32", "FP64"):
            name = "wide" if datatype == "FP64" else "bn"
            for of_input in (True, False):
                if of_input if datatype == "BF16" else datatype == "FP16" and not of_input:
                    continue  # which the client refuses
                for of_output in (True, False) if datatype != "BF16" else (False,):
                    forms = f"{'bytes' if of_input else 'json'} {'bytes' if of_output else 'json'}"
                    given = request(datatype, binary=of_input, parameters={"binary_data_output": of_output})
                    await tell(f"{datatype} {forms}", client.infer(url, given, model_name=name))
        wanted = [RequestedOutput("output", {"binary_data": True})]
        await tell("output", client.infer(url, request("FP32", binary=True, outputs=wanted), model_name="bn"))
        at = request("FP32", binary=True, parameters={"at": "ckpt"})
        await tell("at", client.infer(url, at, model_name="bn"))
        for name in ("train", "again"):
            train = request("FP32", binary=True, parameters={"mode": "train"})
            await tell(name, client.infer(url, train, model_name="by-kserve", headers={"Idempotency-Key": "once"}))
        for binary in (True, False):
            await tell(f"empty {binary}", client.infer(url, request("FP32", binary=binary, rows=[]), model_name="bn"))
        await tell("no model", client.infer(url, request("FP32", binary=True), model_name="none"))
        wrong = request("FP32", binary=True, parameters={"moed": "train"})
        await tell("a parameter", client.infer(url, wrong, model_name="bn"))
    print(json.dumps(found))


asyncio.run(main(sys.argv[1]))
