"""What schemathesis cannot know of this service: loaded by `SCHEMATHESIS_HOOKS`."""

from __future__ import annotations

import os
import zlib
from typing import Any

import schemathesis
from schemathesis.core.failures import Failure

STATE = {
    *("shape-mismatch", "dtype-mismatch", "too-few-values", "non-finite", "device-unavailable"),
    *("version-mismatch", "digest-mismatch", "idempotency-key-reused", "group-mismatch", "not-acceptable"),
}
"""Problems that a valid request can have, because of the layer's state, of other calls, or this machine's devices."""

MAX_FEATURES = 8
STATE_OF_FIELDS = {
    *(("update_layer", field) for field in ("weight", "bias", "momentum", "half_life", "track_running_stats")),
    *(("replace_state", field) for field in ("weight", "bias", "running_mean", "running_var")),
    *(("replace_state", field) for field in ("population_mean", "population_m2", "population_weights")),
    *(("replace_state", field) for field in ("num_batches_tracked", "samples_tracked")),
    ("inverse", "track_running_stats"),
    *(("get_state", "wait"), ("get_states", "names"), ("train", "normalize")),  # do not go with at, prefix, group
    ("replace_state", "state"),  # no tensor: only GET may have that
}
"""Operation and field of an `invalid-request` that depends on the layer's config or on other fields."""

LAYERS = {0: "moving", 1: "population"}
"""Layers that the test has created, instead of some of the names that are drawn."""

ON_LAYERS = {"get_layer", "update_layer", "reset_layer", "get_state", "replace_state"}
ON_LAYERS |= {"train", "eval", "inverse", "backward", "fold_moments"}
ON_LAYERS |= {"list_history", "rollback_layer", "list_pins", "get_pin", "pin_state", "delete_pin", "get_drift"}
NUMBER = {"type": "number"}
NAME = {"type": "string", "enum": ["NaN", "Infinity", "-Infinity"]}


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Say of nested arrays what the document cannot: generators of clients omit calls whose schemas are recursive."""
    schemas = raw_schema["components"]["schemas"]
    element = {"$ref": "#/components/schemas/BatchElement"}
    schemas["BatchElement"] = {"anyOf": [NUMBER, NAME, {"type": "array", "items": element}]}
    schemas["Batch"]["items"]["items"] = element
    if "PLANTED" in os.environ:  # a document that is wrong, to prove that this is found
        schemas["Layer"]["properties"]["version"]["type"] = "string"


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Change what would take too long, or say nothing about the service."""
    query, name = case.query, (case.path_parameters or {}).get("name")
    if "group" in (query or {}) and _is_valid(query.get("timeout", 30.0), 600):
        query["timeout"] = 0.01  # nobody else joins
    if (
        isinstance(case.body, dict)
        and _is_valid(case.body.get("num_features"), 1 << 20)
        and case.body["num_features"] > MAX_FEATURES
    ):
        case.body["num_features"] %= MAX_FEATURES  # a million channels fill the memory
    if case.meta is None or case.meta.phase.name.value == "stateful" or not case.meta.generation.mode.is_positive:
        return  # there the name is that of a link, or wrong on purpose
    if isinstance(name, str) and case.operation.definition.raw["operationId"] in ON_LAYERS:
        case.path_parameters["name"] = LAYERS.get(zlib.crc32(name.encode()) % 4, name)


def _is_valid(number: Any, maximum: int) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number <= maximum


@schemathesis.check
def valid_requests_are_accepted(ctx: Any, response: Any, case: Any) -> None:
    """A request that fits the document is refused only for reasons that no document can state."""
    positive = case.meta is not None and case.meta.generation.mode.is_positive
    if positive and response.status_code in (400, 406, 412, 413, 415, 422) and not _depends(case, response.json()):
        raise Failure(operation=case.operation.label, title="Valid request refused", message=response.text)


def _depends(case: Any, problem: dict[str, Any]) -> bool:
    """Whether a refusal depends on more than the request's schema."""
    if case.operation.path.startswith("/v2"):  # what an inference request declares has to be what it has, and fits
        return case.operation.path.endswith("/infer")
    name, field, expected = problem["type"].removeprefix("/problems/"), problem.get("field"), problem.get("expected")
    return (
        name in STATE
        or (case.operation.definition.raw["operationId"], field) in STATE_OF_FIELDS
        or field in ("size", "If-Match")  # goes with `group`; schemathesis sends an empty one, whatever the pattern
        or expected in ("float32", "float64")  # a number that does not fit the layer's dtype
        or expected in ("a valid integer", "integers that fit int64")  # 1.0 is one in JSON Schema
    )
