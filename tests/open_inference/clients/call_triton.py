"""Makes every call of tritonclient.http and of its aio: run by the test in the clients' own environment.

Arguments: the service's host and port. Prints as JSON what came back; an error as its text.
"""

import asyncio
import itertools
import json
import sys

import ml_dtypes
import numpy as np
import tritonclient.http as triton
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

TYPES = {"FP16": np.float16, "BF16": ml_dtypes.bfloat16, "FP32": np.float32, "FP64": np.float64}
ROWS = [[1.0, 2.0], [3.0, 6.0], [5.5, -7.25]]


def batch(datatype="FP32", rows=ROWS, *, binary=True):
    array = np.array(rows, TYPES[datatype]).reshape(-1, 2)
    return [triton.InferInput("input", array.shape, datatype).set_data_from_numpy(array, binary_data=binary)]


def output(*, binary=True, class_count=0):
    return [triton.InferRequestedOutput("output", binary_data=binary, class_count=class_count)]


def told(result):
    """An inference's result as JSON has it."""
    array = result.as_numpy("output")
    return {"dtype": array.dtype.name, "output": array.astype(float).tolist(), **result.get_response()} | {"outputs": 1}


def shared(of):
    """An input or output in a region that the service does not know."""
    (tensor,) = of
    tensor.set_shared_memory("region", 24)
    return of


INFERENCES = {
    f"{datatype} {'bytes' if of_input else 'json'} {'bytes' if of_output else 'json'}": {
        "model_name": "wide" if datatype == "FP64" else "bn",
        "inputs": (datatype, of_input),
        "outputs": of_output,
    }
    for datatype, of_input, of_output in itertools.product(TYPES, (True, False), (True, False))
    if datatype != "BF16" or of_input  # the client refuses BF16 as JSON
}

CALLS = {
    "live": lambda client: client.is_server_live(),
    "ready": lambda client: client.is_server_ready(),
    "model ready": lambda client: client.is_model_ready("bn"),
    "version ready": lambda client: client.is_model_ready("bn", "ckpt"),
    "no model ready": lambda client: client.is_model_ready("none"),
    "no version ready": lambda client: client.is_model_ready("bn", "99"),
    "server": lambda client: client.get_server_metadata(),
    "model": lambda client: client.get_model_metadata("bn"),
    "version": lambda client: client.get_model_metadata("bn", "ckpt"),
    "no model": lambda client: client.get_model_metadata("none"),
    "index": lambda client: client.get_model_repository_index(),
    "statistics": lambda client: client.get_inference_statistics("bn"),
    "all statistics": lambda client: client.get_inference_statistics(),
    "statistics of a version": lambda client: client.get_inference_statistics("bn", "1"),
    "plain": lambda client: client.infer("bn", batch()),
    "id": lambda client: client.infer("bn", batch(), request_id="42"),
    "tag": lambda client: client.infer("bn", batch(), model_version="ckpt"),
    "at": lambda client: client.infer("bn", batch(), parameters={"at": "ckpt"}),
    "no tag": lambda client: client.infer("bn", batch(), model_version="none"),
    "train": lambda client: client.infer(
        "trained", batch(), parameters={"mode": "train"}, headers={"Idempotency-Key": "once"}
    ),
    "again": lambda client: client.infer(
        "trained", batch(), parameters={"mode": "train"}, headers={"Idempotency-Key": "once"}
    ),
    "ignored": lambda client: client.infer("bn", batch(), sequence_id=7, sequence_start=True, priority=2, timeout=1000),
    "empty": lambda client: client.infer("bn", batch(rows=[])),
    "empty as json": lambda client: client.infer("bn", batch(rows=[], binary=False), outputs=output(binary=False)),
    "a parameter": lambda client: client.infer("bn", batch(), parameters={"moed": "train"}),
    "a query": lambda client: client.infer("bn", batch(), query_params={"at": "1"}),
    "compressed": lambda client: client.infer("bn", batch(), request_compression_algorithm="gzip"),
    "compressed response": lambda client: client.infer("bn", batch(), response_compression_algorithm="gzip"),
    "classes": lambda client: client.infer("bn", batch(), outputs=output(class_count=2)),
    "shared input": lambda client: client.infer("bn", shared(batch())),
    "shared output": lambda client: client.infer("bn", batch(), outputs=shared(output())),
    "another dtype": lambda client: client.infer("bn", batch("FP64")),
    "config": lambda client: client.get_model_config("bn"),
    "load": lambda client: client.load_model("bn"),
    "unload": lambda client: client.unload_model("bn"),
    "trace": lambda client: client.get_trace_settings(),
    "update trace": lambda client: client.update_trace_settings(settings={"trace_level": "OFF"}),
    "log": lambda client: client.get_log_settings(),
    "update log": lambda client: client.update_log_settings({"log_info": True}),
    "system memory": lambda client: client.get_system_shared_memory_status(),
    "register system memory": lambda client: client.register_system_shared_memory("region", "/region", 24),
    "unregister system memory": lambda client: client.unregister_system_shared_memory(),
    "cuda memory": lambda client: client.get_cuda_shared_memory_status(),
    "register cuda memory": lambda client: client.register_cuda_shared_memory("region", b"handle", 0, 24),
    "unregister cuda memory": lambda client: client.unregister_cuda_shared_memory(),
} | {
    name: lambda client, call=call: client.infer(
        call["model_name"],
        batch(call["inputs"][0], binary=call["inputs"][1]),
        outputs=output(binary=call["outputs"]),
    )
    for name, call in INFERENCES.items()
}


def plain(result):
    return told(result) if isinstance(result, triton.InferResult) else result


def by_sync(address):
    found = {}
    with triton.InferenceServerClient(address, concurrency=4) as client:
        for name, call in CALLS.items():
            try:
                found[name] = plain(call(client))
            except InferenceServerException as error:
                found[name] = str(error)
        pending = [client.async_infer("bn", batch(rows=[[n, n]]), request_id=str(n)) for n in range(8)]
        found["async"] = [told(each.get_result())["id"] for each in pending]
    found["methods"] = sorted(
        {name for kind in (triton, aio) for name in vars(kind.InferenceServerClient) if not name.startswith("_")}
    )
    body, length = triton.InferenceServerClient.generate_request_body(batch(), request_id="7")
    found["body"] = [len(body) - length, json.loads(body[:length])["id"]]
    return found


async def by_aio(address):
    found = {}
    async with aio.InferenceServerClient(address) as client:
        for name, call in CALLS.items():
            try:
                found[name] = plain(await call(client))
            except InferenceServerException as error:
                found[name] = str(error)
        several = [client.infer("bn", batch(rows=[[n, n]]), request_id=str(n)) for n in range(8)]
        found["async"] = [told(result)["id"] for result in await asyncio.gather(*several)]
    return found


print(json.dumps({"sync": by_sync(sys.argv[1]), "aio": asyncio.run(by_aio(sys.argv[1]))}))
