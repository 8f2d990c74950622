"""The examples of the protocol's documents, with the names and data types that a layer has.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/tree/main/docs/protocol: binary data, parameters, model repository,
statistics
"""

import json
import struct

import pytest

from fast_path.running import answer

pytestmark = pytest.mark.anyio

by_socket = pytest.mark.parametrize("way", ["fast path"], indirect=True)


@pytest.fixture
async def mymodel(client):
    (await client.put("/v1/layers/mymodel", json={"num_features": 2, "affine": False, "eps": 1e-30})).raise_for_status()


async def exchanged(service, text, content=b""):
    """What a request as the documents print it is answered; `<xx>` stands for the length of the JSON object."""
    head, _, document = text.partition("\n\n")
    length = len(document)
    lines = head.replace("<xx+n>", str(length + len(content))).replace("<xx>", str(length)).split("\n")
    reader, writer = await service.connect()
    writer.write("\r\n".join([*lines, "", document]).encode() + content)
    found = await answer(reader)
    writer.close()
    return found


@by_socket
async def test_an_inference_request(service, mymodel):
    """The example "Inference Request Examples"."""
    status, headers, body = await exchanged(
        service,
        """POST /v2/models/mymodel/infer HTTP/1.1
Host: localhost:8000
Content-Type: application/json
Content-Length: <xx>

{
  "id" : "42",
  "inputs" : [
    {
      "name" : "input",
      "shape" : [ 2, 2 ],
      "datatype" : "FP32",
      "data" : [ 1, 2, 3, 4 ]
    }
  ],
  "outputs" : [
    {
      "name" : "output"
    }
  ]
}""",
    )
    assert (status, headers["content-type"]) == (200, "application/json")
    document = json.loads(body)
    assert document["id"] == "42"
    assert document["outputs"] == [{"name": "output", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4]}]


@by_socket
async def test_a_binary_request(service, mymodel):
    """The example "Binary Tensor Request"."""
    status, headers, body = await exchanged(
        service,
        """POST /v2/models/mymodel/infer HTTP/1.1
Host: localhost:8000
Content-Type: application/octet-stream
Inference-Header-Content-Length: <xx>
Content-Length: <xx+n>

{
  "model_name" : "mymodel",
  "inputs" : [
    {
      "name" : "input",
      "shape" : [ 2, 2 ],
      "datatype" : "FP32",
      "parameters" : {
        "binary_data_size" : 16
      }
    }
  ],
  "outputs" : [
    {
      "name" : "output",
      "parameters" : {
        "binary_data" : true
      }
    }
  ]
}""",
        struct.pack("<4f", 1, 2, 3, 4),
    )
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    length = int(headers["inference-header-content-length"])
    assert int(headers["content-length"]) == length + 16 == len(body)
    (output,) = json.loads(body[:length])["outputs"]
    assert output == {
        "name": "output",
        "shape": [2, 2],
        "datatype": "FP32",
        "parameters": {"binary_data_size": 16},
    }
    assert body[length:] == struct.pack("<4f", 1, 2, 3, 4)


@by_socket
async def test_a_raw_binary_request(service, mymodel):
    """The example "Raw Binary Request": the output is requested in binary form."""
    status, headers, body = await exchanged(
        service,
        """POST /v2/models/mymodel/infer HTTP/1.1
Host: localhost:8000
Content-Type: application/octet-stream
Inference-Header-Content-Length: 0
Content-Length: 16

""",
        struct.pack("<4f", 1, 2, 3, 4),
    )
    assert status == 200
    length = int(headers["inference-header-content-length"])
    (output,) = json.loads(body[:length])["outputs"]
    assert (output["shape"], output["parameters"]) == ([2, 2], {"binary_data_size": 16})
    assert body[length:] == struct.pack("<4f", 1, 2, 3, 4)


@by_socket
async def test_a_request_with_parameters(service, mymodel):
    """The example "Parameters Extension"; of custom parameters, those that a layer knows are accepted."""
    text = """POST /v2/models/mymodel/infer HTTP/1.1
Host: localhost:8000
Content-Type: application/json
Content-Length: <xx>

{
  "parameters" : { "%s" : 42 },
  "inputs" : [
    {
      "name" : "input",
      "shape" : [ 2, 2 ],
      "datatype" : "FP32",
      "data" : [ 1, 2, 3, 4 ]
    }
  ],
  "outputs" : [
    {
      "name" : "output"
    }
  ]
}"""
    status, _, body = await exchanged(service, text % "my_custom_parameter")
    assert (status, list(json.loads(body))) == (422, ["error"])
    status, _, _ = await exchanged(service, text % "sequence_id")
    assert status == 200


async def test_tensor_data(client, mymodel):
    """The example "Tensor Data": the matrix in its natural format, and flattened."""
    for data in ([[1, 2], [4, 5]], [1, 2, 4, 5]):
        given = {"name": "input", "shape": [2, 2], "datatype": "FP32", "data": data}
        found = await client.post("/v2/models/mymodel/infer", json={"inputs": [given]})
        assert found.json()["outputs"][0]["data"] == [1, 2, 4, 5]


async def test_the_objects_have_the_members_that_the_documents_require(client, mymodel):
    """And each member that they do not name is one of ours on purpose."""
    metadata = (await client.get("/v2/models/mymodel")).json()
    for found, required, own in (
        ((await client.get("/v2")).json(), {"name", "version", "extensions"}, set()),
        ((await client.get("/v2/health/live")).json(), {"live"}, set()),
        ((await client.get("/v2/health/ready")).json(), {"live"}, {"ready"}),
        ((await client.get("/v2/models/mymodel/ready")).json(), {"name", "ready"}, set()),
        (metadata, {"name", "versions", "platform", "inputs", "outputs"}, set()),
        (metadata["inputs"][0], {"name", "datatype", "shape"}, set()),
        ((await client.post("/v2/repository/index")).json()[0], {"name", "version", "state", "reason"}, set()),
        ((await client.get("/v2/models/none")).json(), {"error"}, set()),
        ((await client.get("/v2/models/mymodel/stats")).json(), {"model_stats"}, set()),
        (
            (await client.get("/v2/models/mymodel/stats")).json()["model_stats"][0],
            {"name", "version", "last_inference", "inference_count", "execution_count", "inference_stats"}
            | {"response_stats", "batch_stats", "memory_usage"},
            set(),
        ),
    ):
        assert found.keys() == required | own
