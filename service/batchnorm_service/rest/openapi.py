"""The OpenAPI document: adds tensors, headers and problem types to what FastAPI generates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from batchnorm_client.wire import documents
from batchnorm_client.wire import headers as wire_headers
from batchnorm_client.wire import media_types as forms
from batchnorm_client.wire.errors import PROBLEMS
from batchnorm_client.wire.tensors import CODECS

from .problems import is_open_inference

Json = dict[str, Any]

# FastAPI does not list models of tensors and problems, and drops null defaults from the others.
_MODELS: Final[tuple[type[BaseModel], ...]] = (
    documents.Drift,
    documents.Layer,
    documents.LayerConfig,
    documents.LayerPage,
    documents.LayerUpdate,
    documents.HistoryPage,
    documents.Pin,
    documents.PinRequest,
    documents.Pins,
    documents.RollbackRequest,
    documents.FoldedDocument,
    documents.ManyFolded,
    documents.ManyMoments,
    documents.ManyReplaced,
    documents.MomentsDocument,
    documents.ProblemDocument,
    documents.ResetRequest,
)
_GUARDED: Final = ("unauthenticated", "forbidden")
_ALWAYS: Final = (
    "invalid-request",
    "internal-error",
    "overloaded",
    "request-timeout",
    "store-unavailable",
)
_TEXT: Final[Json] = {"type": "string"}
BINARY: Final[Json] = {"type": "string", "format": "binary"}

_REQUEST_ID: Final[Json] = {
    "name": wire_headers.REQUEST_ID,
    "in": "header",
    "required": False,
    "description": "returned in the response and written to the service's log; one that does not match "
    f"`{wire_headers.KEY_PATTERN.pattern}` is replaced by a new one",
    "schema": _TEXT,
}
_RESPONSE_HEADERS: Final[dict[str, Json]] = {
    wire_headers.REQUEST_ID: {"description": "the caller's, or a new one", "schema": _TEXT},
    "ETag": {"description": "the layer's version in quotes; of states, a text that identifies them", "schema": _TEXT},
    wire_headers.VERSION: {"description": "the layer's version", "schema": {"type": "integer"}},
    wire_headers.NUM_BATCHES_TRACKED: {"description": "batches folded so far", "schema": {"type": "integer"}},
    wire_headers.DIGEST: {"description": "the digest of the state that was used", "schema": _TEXT},
    wire_headers.IDEMPOTENT_REPLAY: {
        "description": "present, and `true`, if the key had been used before",
        "schema": {"type": "string", "enum": ["true"]},
    },
    "Location": {"description": "the new layer", "schema": _TEXT},
    "Allow": {"description": "the methods that this path has", "schema": _TEXT},
    "Retry-After": {"description": "seconds to wait before retrying", "schema": {"type": "integer"}},
    "WWW-Authenticate": {"description": "Bearer", "schema": _TEXT},
}
_PROBLEM_HEADERS: Final[dict[int, tuple[str, ...]]] = {401: ("WWW-Authenticate",), 503: ("Retry-After",)}

# openapi-python-client does not support recursive schemas and omits every operation that uses one. Without recursion,
# only a fixed nesting can be typed: the first two levels, which every batch has. The description states the rest.
_BATCH: Final[Json] = {
    "description": "Nested arrays, one level per axis, at least two; the innermost hold numbers, and the strings NaN, "
    "Infinity and -Infinity where JSON has no number.",
    "type": "array",
    "items": {"type": "array", "items": {}},
    "examples": [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]],
}
_VECTOR: Final[Json] = {
    "description": "One number per channel; three strings for the numbers that JSON lacks.",
    "type": "array",
    "items": {"anyOf": [{"type": "number"}, {"type": "string", "enum": ["NaN", "Infinity", "-Infinity"]}]},
}
# Placed under `components`, because FastAPI drops null values elsewhere in the document.
CONFIG_EXAMPLES: Final[Json] = {
    "moving": {"summary": "Moving statistics, as torch has them", "value": {"num_features": 3}},
    "population": {
        "summary": "Population statistics, whose momentum is null",
        "value": {"num_features": 3, "statistics": "population", "momentum": None},
    },
}
_COUNT: Final[Json] = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}


def describe_responses(
    description: str,
    *headers: str,
    status: int = 200,
    content: Json | None = None,
    unchanged: bool = False,
    problems: Sequence[str] = (),
    guarded: bool = True,
) -> dict[int | str, Json]:
    """The `responses` argument of a FastAPI route: headers, problem types, and content of the successful response.

    Args:
        description: of the successful response.
        headers: its headers besides X-Request-ID.
        status: its status.
        content: its content by media type; None if FastAPI derives it from the return type.
        unchanged: whether 304 is possible.
        problems: names of problem types besides those that every operation may return.
        guarded: whether a token may be required, as below /v1.
    """
    success = _with_headers({"description": description} | ({"content": content} if content else {}), headers)
    responses: dict[int | str, Json] = {status: success}
    if unchanged:
        responses[304] = _with_headers({"description": "The state is one of those in If-None-Match"}, ("ETag",))
    return responses | problem_responses((*problems, *_ALWAYS, *(_GUARDED if guarded else ())))


def problem_responses(names: Sequence[str]) -> dict[int | str, Json]:
    """OpenAPI responses for these problem types, by status."""
    responses: dict[int | str, Json] = {}
    for name in sorted(set(names), key=lambda name: (PROBLEMS[name].status, name)):
        problem = PROBLEMS[name]
        response = responses.setdefault(
            problem.status,
            _with_headers(
                {
                    "description": "",
                    "content": {forms.PROBLEM_JSON: {"schema": ref("ProblemDocument"), "examples": {}}},
                },
                _PROBLEM_HEADERS.get(problem.status, ()),
            ),
        )
        response["description"] += f"{', ' if response['description'] else ''}`{name}`"
        response["content"][forms.PROBLEM_JSON]["examples"][name] = {
            "summary": problem.title,
            "value": {
                "type": f"/problems/{name}",
                "title": problem.title,
                "status": problem.status,
                "detail": (problem.__doc__ or "").partition("\n")[0],
                "instance": "/v1/layers/layer1.0.bn1",
            },
        }
    return responses


def ref(model: str) -> Json:
    """A JSON reference to a schema of the document's components."""
    return {"$ref": f"#/components/schemas/{model}"}


def tensor_content(media_types: Sequence[str], document: Json, names: str) -> Json:
    """OpenAPI `content` of a body with tensors, by media type.

    Args:
        media_types: in which the tensors can be encoded.
        document: the schema of the JSON encoding.
        names: the tensors' names, for the description of the others.
    """
    content: Json = {}
    for media in media_types:
        row = CODECS[media]
        description = f"{row.description}: {names}" if row.several else row.description
        content[media] = {"schema": document if media == forms.JSON else {**BINARY, "description": description}}
    return content


def tensor_body(media_types: Sequence[str], model: str, names: str) -> Json:
    """The `openapi_extra` argument of a route whose body has the tensors `names`; in JSON, it is a `model`."""
    return {"requestBody": {"required": True, "content": tensor_content(media_types, ref(model), names)}}


def _tensor_documents() -> dict[str, Json]:
    """Schemas of JSON documents with tensors, which are parsed and written without pydantic."""
    batch, vector, count = ref("Batch"), ref("Vector"), _COUNT
    state = dict.fromkeys(("running_mean", "running_var", "weight", "bias"), vector)
    population = dict.fromkeys(("population_mean", "population_m2", "population_weights"), vector)
    counters = dict.fromkeys(("num_batches_tracked", "samples_tracked"), count)
    closed = {"additionalProperties": False}
    return {
        "Batch": _BATCH,
        "Vector": _VECTOR,
        "InputBatch": _object({"input": batch}) | closed,
        "NormalizedBatch": _object(
            {"output": batch, "version": count, "num_batches_tracked": count},
            dict.fromkeys(("batch_mean", "batch_var", "batch_invstd"), vector),
        ),
        "GradientInput": _object({"input": batch, "grad_output": batch}) | closed,
        "Gradients": _object({"grad_input": batch, "version": count}, {"grad_weight": vector, "grad_bias": vector}),
        "LayerState": _object({}, {**state, **population, **counters}) | closed,
    }


def _object(required: Json, optional: Json | None = None) -> Json:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def openapi_document(app: FastAPI, others: Sequence[type[BaseModel]] = ()) -> Json:
    """The complete OpenAPI document of `app`, with the models `others` besides those of the REST interface."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        separate_input_output_schemas=False,
    )
    _, models = models_json_schema(
        [(model, "validation") for model in (*_MODELS, *others)], ref_template="#/components/schemas/{model}"
    )
    components = document["components"]
    schemas: Json = components["schemas"]
    schemas |= {**models["$defs"], **_tensor_documents()}
    schemas["ProblemDocument"]["properties"]["type"]["enum"] = [f"/problems/{name}" for name in PROBLEMS]
    components["examples"] = CONFIG_EXAMPLES
    _add_links(document["paths"])
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if "security" in operation:
                operation["security"].insert(0, {})  # optional: a service without tokens needs none
            parameters = operation.setdefault("parameters", [])
            for parameter in parameters:
                parameter["schema"] = _without_null(parameter["schema"])
            parameters.append(_REQUEST_ID)
            operation["responses"]["default"] = {
                "description": "Any other problem, such as `not-found` and `method-not-allowed`",
                "headers": {"Allow": _RESPONSE_HEADERS["Allow"]},
                "content": {forms.PROBLEM_JSON: {"schema": ref("ProblemDocument")}},
            }
            if is_open_inference(path):
                _use_inference_errors(operation["responses"])
    return document


def _use_inference_errors(responses: Json) -> None:
    """Replace problem documents by the errors of the Open Inference Protocol."""
    for response in responses.values():
        problem = response.get("content", {}).get(forms.PROBLEM_JSON)
        if problem is not None:
            examples = {
                name: {"summary": example["summary"], "value": {"error": example["value"]["detail"]}}
                for name, example in problem.get("examples", {}).items()
            }
            error = {"schema": ref("InferenceError")} | ({"examples": examples} if examples else {})
            response["content"] = {forms.JSON: error}


def _add_links(paths: Json) -> None:
    """Links from a created layer to every operation on it."""
    layer = "/v1/layers/{name}"
    named = [operations for path, operations in paths.items() if f"{path}/".startswith(f"{layer}/")]
    targets = [operation["operationId"] for operations in named for operation in operations.values()]
    links = {name: {"operationId": name, "parameters": {"name": "$request.path.name"}} for name in targets}
    for status in ("200", "201"):
        paths[layer]["put"]["responses"][status]["links"] = links


def _with_headers(response: Json, names: Sequence[str]) -> Json:
    return {**response, "headers": {name: _RESPONSE_HEADERS[name] for name in (wire_headers.REQUEST_ID, *names)}}


def _without_null(schema: Json) -> Json:
    """The schema of an optional parameter without `null`, which query strings and headers cannot express."""
    if "anyOf" not in schema:
        return schema
    (not_null,) = (choice for choice in schema["anyOf"] if choice != {"type": "null"})
    kept = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
    return {**kept, **not_null}
