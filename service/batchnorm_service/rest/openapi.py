"""The OpenAPI document: what FastAPI cannot know of bodies, headers and problems, said once per call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from fastapi import FastAPI, Path
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.responses import Response as StarletteResponse

from batchnorm_client.wire import documents
from batchnorm_client.wire import headers as wire_headers
from batchnorm_client.wire import media_types as forms
from batchnorm_client.wire.errors import PROBLEMS
from batchnorm_client.wire.names import LAYER_NAME_PATTERN

from .queries import NoQuery, Query

Json = dict[str, Any]

LayerNamePath = Annotated[str, Path(pattern=f"^{LAYER_NAME_PATTERN.pattern}$", description="the layer's name")]
"""The `{name}` of a route; `Gateway` has checked it, the pattern is there to be read."""

_MODELS: Final = (
    documents.Layer,
    documents.LayerConfig,
    documents.LayerPage,
    documents.LayerUpdate,
    documents.FoldedDocument,
    documents.ManyFolded,
    documents.ManyMoments,
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
_BINARY: Final[Json] = {"type": "string", "format": "binary"}

_REQUEST_HEADERS: Final[dict[str, Json]] = {
    wire_headers.IDEMPOTENCY_KEY: {
        "description": "makes a repeat of the same call harmless, as long as its receipt is kept",
        "schema": {"type": "string", "pattern": f"^{wire_headers.KEY_PATTERN.pattern}$"},
    },
    "If-Match": {"description": 'only at these versions, such as `"7"`', "schema": _TEXT},
    "If-None-Match": {"description": "304 at these versions", "schema": _TEXT},
    wire_headers.REQUEST_ID: {
        "description": "comes back in the answer, and is in the service's log",
        "schema": {"type": "string", "pattern": f"^{wire_headers.KEY_PATTERN.pattern}$"},
    },
}
_ANSWER_HEADERS: Final[dict[str, Json]] = {
    wire_headers.REQUEST_ID: {"description": "the caller's, or a new one", "schema": _TEXT},
    "ETag": {"description": "the layer's version in quotes", "schema": _TEXT},
    wire_headers.VERSION: {"description": "the layer's version", "schema": {"type": "integer"}},
    wire_headers.NUM_BATCHES_TRACKED: {"description": "batches folded so far", "schema": {"type": "integer"}},
    wire_headers.IDEMPOTENT_REPLAY: {
        "description": "there, and `true`, when the key had been used before",
        "schema": {"type": "string", "enum": ["true"]},
    },
    "Location": {"description": "the new layer", "schema": _TEXT},
    "Allow": {"description": "the methods that this path has", "schema": _TEXT},
    "Retry-After": {"description": "seconds after which another try makes sense", "schema": {"type": "integer"}},
    "WWW-Authenticate": {"description": "Bearer", "schema": _TEXT},
}
_PROBLEM_HEADERS: Final[dict[int, tuple[str, ...]]] = {401: ("WWW-Authenticate",), 503: ("Retry-After",)}

# openapi-python-client takes no schema that refers to itself, and leaves out every call that uses one. Lists in lists
# to any depth cannot be said without; so the first two levels, which every batch has, are typed, and the rest is text.
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
# Among the components, because FastAPI drops what is null from the rest of the document.
CONFIG_EXAMPLES: Final[Json] = {
    "moving": {"summary": "Moving statistics, as torch has them", "value": {"num_features": 3}},
    "population": {
        "summary": "Population statistics, whose momentum is null",
        "value": {"num_features": 3, "statistics": "population", "momentum": None},
    },
}
_COUNT: Final[Json] = {"type": "integer", "minimum": 0}


def describe(
    operation_id: str,
    summary: str,
    *,
    tag: str = "layers",
    query: type[Query] = NoQuery,
    headers: Sequence[str] = (),
    body: Json | None = None,
    answers: Mapping[int, Json],
    problems: Sequence[str] = (),
    guarded: bool = True,
) -> dict[str, Any]:
    """The arguments of a FastAPI route that say what FastAPI cannot see in its function.

    Args:
        operation_id: a name for generated clients.
        summary: one line.
        tag: the group that the documentation shows it in.
        query: its query parameters.
        headers: its request headers.
        body: its request body.
        answers: by status.
        problems: names of problem types besides those that every call may answer.
        guarded: whether it may ask for a token, as all calls below /v1 do.
    """
    extra: Json = {"parameters": [*_query_parameters(query), *_header_parameters((*headers, wire_headers.REQUEST_ID))]}
    if body is not None:
        extra["requestBody"] = body
    described: dict[int | str, Json] = {status: _with_headers(answer, ()) for status, answer in answers.items()}
    return {
        "operation_id": operation_id,
        "summary": summary,
        "tags": [tag],
        "status_code": min(answers),
        "response_model": None,
        "response_class": StarletteResponse,  # without a media type, which would be listed before those of `answers`
        "responses": {**described, **problem_responses((*problems, *_ALWAYS, *(_GUARDED if guarded else ())))},
        "openapi_extra": extra,
    }


def problem_responses(names: Sequence[str]) -> dict[int | str, Json]:
    """Those problem types as OpenAPI responses, by status."""
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
    """A reference to a schema."""
    return {"$ref": f"#/components/schemas/{model}"}


def json_body(
    model: str, media_types: Sequence[str] = (forms.JSON,), *, required: bool = True, examples: Sequence[str] = ()
) -> Json:
    """A request body that is a JSON document; `examples` are names in the document's components."""
    content = {"schema": ref(model)}
    if examples:
        content["examples"] = {name: {"$ref": f"#/components/examples/{name}"} for name in examples}
    return {"required": required, "content": dict.fromkeys(media_types, content)}


def json_response(model: str, description: str, headers: Sequence[str] = ()) -> Json:
    """An answer that is a JSON document."""
    return _with_headers({"description": description, "content": {forms.JSON: {"schema": ref(model)}}}, headers)


def empty_response(description: str, headers: Sequence[str] = ()) -> Json:
    """An answer without a body."""
    return _with_headers({"description": description}, headers)


def tensor_content(media_types: Sequence[str], document: Json, names: str) -> Json:
    """Tensors in each of the forms that they have on the wire."""
    schemas: dict[str, Json] = {
        forms.JSON: document,
        forms.NPY: {**_BINARY, "description": "the bytes of a .npy file"},
        forms.SAFETENSORS: {**_BINARY, "description": f"a safetensors file: {names}"},
    }
    return {media: {"schema": schemas[media]} for media in media_types}


def tensor_body(media_types: Sequence[str], model: str, names: str) -> Json:
    """A request body of the tensors `names`, in JSON a `model`."""
    return {"required": True, "content": tensor_content(media_types, ref(model), names)}


def tensors_response(description: str, content: Json, headers: Sequence[str]) -> Json:
    """An answer that is tensors."""
    return _with_headers({"description": description, "content": content}, headers)


def tensor_response(media_types: Sequence[str], *, replay: bool = False) -> Json:
    """A normalized batch."""
    names = "output, and with statistics=true batch_mean, batch_var, batch_invstd"
    headers = ["ETag", wire_headers.VERSION, wire_headers.NUM_BATCHES_TRACKED]
    return _with_headers(
        {
            "description": "The normalized batch, in the form that Accept names; by default in the request's",
            "content": tensor_content(media_types, ref("NormalizedBatch"), names),
        },
        [*headers, wire_headers.IDEMPOTENT_REPLAY] if replay else headers,
    )


def folded_response() -> Json:
    """Moments that were folded."""
    headers = ("ETag", wire_headers.IDEMPOTENT_REPLAY)
    return json_response("FoldedDocument", "Folded; count, mean and var only for a group", headers)


def _tensor_documents() -> dict[str, Json]:
    """The JSON documents that have tensors, which are read and written without pydantic."""
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


def openapi_document(app: FastAPI) -> Json:
    """The whole document of `app`."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, models = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    schemas: Json = models["$defs"]
    schemas["ProblemDocument"]["properties"]["type"]["enum"] = [f"/problems/{name}" for name in PROBLEMS]
    components = document.setdefault("components", {})
    components["schemas"] = {**schemas, **_tensor_documents()}
    components["examples"] = CONFIG_EXAMPLES
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path.startswith("/v1/"):
                operation["security"] = [{}, {"token": []}]
            operation["responses"]["default"] = {
                "description": "Any other problem, such as `not-found` and `method-not-allowed`",
                "headers": {"Allow": _ANSWER_HEADERS["Allow"]},
                "content": {forms.PROBLEM_JSON: {"schema": ref("ProblemDocument")}},
            }
    return document


def _with_headers(answer: Json, names: Sequence[str]) -> Json:
    headers = {name: _ANSWER_HEADERS[name] for name in (wire_headers.REQUEST_ID, *names)}
    return {**answer, "headers": {**headers, **answer.get("headers", {})}}


def _query_parameters(model: type[Query]) -> list[Json]:
    properties: dict[str, Json] = model.model_json_schema()["properties"] if model.model_fields else {}
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": schema.pop("description", ""),
            "schema": _without_null(schema),
        }
        for name, schema in properties.items()
    ]


def _without_null(schema: Json) -> Json:
    """What a parameter is that may be left out: a query has no null."""
    if "anyOf" not in schema:
        return schema
    (given,) = (choice for choice in schema["anyOf"] if choice != {"type": "null"})
    kept = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
    return {**kept, **given}


def _header_parameters(names: Sequence[str]) -> list[Json]:
    return [{"name": name, "in": "header", "required": False, **_REQUEST_HEADERS[name]} for name in names]
