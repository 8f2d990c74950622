"""The OpenAPI document has every call of the contract, and says what an answer can be."""

import json
import re
from contextlib import nullcontext
from itertools import product

import jsonschema_rs
import pytest
from pydantic import ValidationError

from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_client.wire.errors import PROBLEMS, InvalidRequest
from batchnorm_client.wire.media_types import JSON, NPY, PROBLEM_JSON, SAFETENSORS
from batchnorm_service.rest.preconditions import if_match

pytestmark = pytest.mark.anyio

CALLS = {
    "/v1/layers": {"get"},
    "/v1/layers/{name}": {"put", "get", "patch", "delete"},
    "/v1/layers/{name}/reset": {"post"},
    "/v1/layers/{name}/drift": {"get"},
    "/v1/layers/{name}/history": {"get"},
    "/v1/layers/{name}/rollback": {"post"},
    "/v1/layers/{name}/pins": {"get"},
    "/v1/layers/{name}/pins/{tag}": {"get", "put", "delete"},
    "/v1/layers/{name}/state": {"get", "put"},
    "/v1/layers/{name}/train": {"post"},
    "/v1/layers/{name}/eval": {"post"},
    "/v1/layers/{name}/inverse": {"post"},
    "/v1/layers/{name}/backward": {"post"},
    "/v1/layers/{name}/moments": {"post"},
    "/v1/moments": {"post"},
    "/v1/state": {"get", "put"},
    "/v2": {"get"},
    "/v2/health/live": {"get"},
    "/v2/health/ready": {"get"},
    "/v2/models/{name}": {"get"},
    "/v2/models/{name}/infer": {"post"},
    "/v2/models/{name}/ready": {"get"},
    "/v2/models/{name}/stats": {"get"},
    "/v2/models/{name}/versions/{version}": {"get"},
    "/v2/models/{name}/versions/{version}/infer": {"post"},
    "/v2/models/{name}/versions/{version}/ready": {"get"},
    "/v2/repository/index": {"post"},
    "/": {"get"},
    "/healthz": {"get"},
    "/metrics": {"get"},
    "/readyz": {"get"},
    "/problems": {"get"},
    "/problems/{problem}": {"get"},
}


@pytest.fixture
def way():
    """The document is the same whoever asks for it; `test_pages.py` asks both ways."""
    return "asgi"


@pytest.fixture
async def document(client):
    return (await client.get("/openapi.json")).json()


def operations(document):
    return [operation for operations in document["paths"].values() for operation in operations.values()]


async def test_every_call_is_there(document):
    assert {path: set(operations) for path, operations in document["paths"].items()} == CALLS


async def test_every_operation_is_described(document):
    identifiers = [operation["operationId"] for operation in operations(document)]
    assert len(set(identifiers)) == len(identifiers)
    for operation in operations(document):
        assert operation["summary"]
        assert operation["tags"]
        assert {"500", "503", "default"} <= set(operation["responses"])


async def test_every_problem_is_there(document):
    examples = set()
    for operation in operations(document):
        for status, response in operation["responses"].items():
            for name, example in response.get("content", {}).get(PROBLEM_JSON, {}).get("examples", {}).items():
                examples.add(name)
                assert status == str(PROBLEMS[name].status) == str(example["value"]["status"])
    # A document of paths that exist has no place for those two, besides the schema and each `default` answer.
    assert examples | {"not-found", "method-not-allowed"} == set(PROBLEMS)
    assert set(document["components"]["schemas"]["ProblemDocument"]["properties"]["type"]["enum"]) == {
        f"/problems/{name}" for name in PROBLEMS
    }


@pytest.mark.parametrize("call", ["train", "eval"])
async def test_the_hot_calls_have_all_three_forms(document, call):
    operation = document["paths"][f"/v1/layers/{{name}}/{call}"]["post"]
    assert set(operation["requestBody"]["content"]) == {JSON, NPY, SAFETENSORS}
    answer = operation["responses"]["200"]
    assert set(answer["content"]) == {JSON, NPY, SAFETENSORS}
    assert all(form["schema"] for form in answer["content"].values())
    headers = {"X-Request-ID", "ETag", "Batchnorm-Version", "Num-Batches-Tracked"}
    assert set(answer["headers"]) == headers | {"Idempotent-Replay" if call == "train" else "Batchnorm-Digest"}
    parameters = {parameter["name"] for parameter in operation["parameters"]}
    own = {"Idempotency-Key", "group", "size", "timeout", "normalize"} if call == "train" else {"at", "expect"}
    assert parameters == {"name", "statistics", "X-Request-ID"} | own


async def test_every_reference_leads_somewhere(document):
    def walk(node):
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                _, components, kind, name = node["$ref"].split("/")
                assert name in document[components][kind]
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                walk(child)

    walk(document)


async def test_a_default_is_what_the_service_takes_for_an_absent_field(document):
    """`momentum` had none: clients made from the document sent null, and got a cumulative average in silence."""
    config = document["components"]["schemas"]["LayerConfig"]
    for name, field in config["properties"].items():
        assert ("default" in field) == (name not in config["required"])
        if "default" in field:
            assert field["default"] == getattr(LayerConfig(num_features=1), name)


async def test_creating_a_layer_is_shown_for_both_kinds_of_statistics(document):
    """A population layer takes no momentum but null, and a client that sends the default has to say so."""
    body = document["paths"]["/v1/layers/{name}"]["put"]["requestBody"]["content"][JSON]
    examples = document["components"]["examples"]
    assert body["examples"] == {name: {"$ref": f"#/components/examples/{name}"} for name in examples}
    for name in ("moving", "population"):
        assert LayerConfig.model_validate(examples[name]["value"]).statistics == name
    assert examples["population"]["value"]["momentum"] is None


async def test_an_update_has_no_defaults_and_null_only_where_it_is_taken(document):
    fields = document["components"]["schemas"]["LayerUpdate"]["properties"]
    for name, field in fields.items():
        assert "default" not in field
        if {"type": "null"} in field.get("anyOf", []):
            LayerUpdate.model_validate({name: None})
        else:
            with pytest.raises(ValidationError, match="must not be null"):
                LayerUpdate.model_validate({name: None})


async def test_a_query_parameter_is_never_null(document):
    for operation in operations(document):
        for parameter in operation.get("parameters", []):
            assert "null" not in json.dumps(parameter)


async def test_no_schema_refers_to_itself(document):
    """openapi-python-client leaves out every call that uses such a schema."""
    schemas = document["components"]["schemas"]

    def walk(node, above):
        if isinstance(node, dict):
            if name := node.get("$ref", "").removeprefix("#/components/schemas/"):
                assert name not in above
                walk(schemas[name], {*above, name})
            for child in node.values():
                walk(child, above)
        if isinstance(node, list):
            for child in node:
                walk(child, above)

    for name, schema in schemas.items():
        walk(schema, {name})


@pytest.mark.parametrize("call", ["train", "eval", "inverse", "backward", "moments", "state"])
async def test_a_call_with_tensors_lists_the_form_that_it_answers_in_by_default_first(document, call):
    """A generated client reads the first form that it can; of GET state that is safetensors."""
    method = "get" if call == "state" else "post"
    content = document["paths"][f"/v1/layers/{{name}}/{call}"][method]["responses"]["200"]["content"]
    assert next(iter(content)) == (SAFETENSORS if call == "state" else JSON)


async def test_a_created_layer_links_to_every_call_on_it(document):
    on_layers = [one for path, one in document["paths"].items() if path.startswith("/v1/layers/{name}")]
    expected = {operation["operationId"] for each in on_layers for operation in each.values()}
    assert len(expected) == 19
    for status in ("200", "201"):
        links = document["paths"]["/v1/layers/{name}"]["put"]["responses"][status]["links"]
        assert {link["operationId"] for link in links.values()} == expected
        assert all(link["parameters"] == {"name": "$request.path.name"} for link in links.values())


async def test_the_schema_of_a_config_accepts_what_the_service_does():
    valid = jsonschema_rs.Draft202012Validator(LayerConfig.model_json_schema()).is_valid
    axes = [-63, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 63]
    for statistics, field, dimensions, axis in product(
        [{}, {"statistics": "moving"}, {"statistics": "population"}],
        [{}, {"momentum": 0.5}, {"half_life": 0.5}],
        [None, 1, 2, 3],
        axes,
    ):
        config = {"num_features": 2, "channel_axis": axis, "dimensions": dimensions, **statistics, **field}
        with nullcontext() if valid(config) else pytest.raises(ValidationError):
            LayerConfig.model_validate(config)


@pytest.mark.parametrize(
    ("header", "valid"),
    [
        ("*", True),
        ('"7"', True),
        ('"7", W/"8"', True),
        ("", False),
        ("7", False),
        ('"7" "8"', False),
        ('*, "7"', False),
    ],
)
async def test_the_pattern_of_if_match_is_what_the_service_takes(document, header, valid):
    parameters = document["paths"]["/v1/layers/{name}"]["delete"]["parameters"]
    (pattern,) = (one["schema"]["pattern"] for one in parameters if one["name"] == "If-Match")
    assert bool(re.search(pattern, header)) == valid
    with nullcontext() if valid else pytest.raises(InvalidRequest):
        if_match(header)


async def test_any_request_id_is_accepted(document):
    """The service replaces those that it cannot write to its log."""
    for operation in operations(document):
        (schema,) = (one["schema"] for one in operation["parameters"] if one["name"] == "X-Request-ID")
        assert schema == {"type": "string"}
