"""Targets for JSON documents, and for everything that a request has beside its body."""

from __future__ import annotations

from typing import Any

from batchnorm_client.kernels.digest import DIGEST_PATTERN
from batchnorm_client.wire.documents import LayerConfig, LayerUpdate, PinRequest, ResetRequest, RollbackRequest
from batchnorm_client.wire.errors import (
    InvalidRequest,
    MalformedBody,
    NotAcceptable,
    ProblemError,
    Unauthenticated,
    UnsupportedMediaType,
)
from batchnorm_client.wire.headers import KEY_PATTERN
from batchnorm_client.wire.names import LAYER_NAME_PATTERN, TAG_PATTERN
from batchnorm_client.wire.tensors import CODECS
from batchnorm_service.engine.posted import posted_moments
from batchnorm_service.engine.state import initial_state, update
from batchnorm_service.layers import MOMENT_DTYPES
from batchnorm_service.rest import documents, headers, moments, negotiation, queries
from batchnorm_service.rest.preconditions import if_match, matches_none
from batchnorm_service.rest.security import Guard, is_public
from batchnorm_service.rest.target import read_target, target_of
from batchnorm_service.tokens import Grant, Scope
from batchnorm_service.tokens.stored import TokenFileError, find_token, format_tokens, parse_tokens
from fuzz.promises import BrokenPromiseError, Refused, attempt, replaced, same
from fuzz.tensors import raw

MODELS = (LayerConfig, LayerUpdate, ResetRequest, RollbackRequest, PinRequest)
QUERIES = (
    queries.NoQuery,
    queries.StateQuery,
    queries.ExpectQuery,
    queries.EvalQuery,
    queries.MomentsQuery,
    queries.TrainQuery,
    queries.BackwardQuery,
)
TWO_CHANNELS = LayerConfig(num_features=2)
LARGE = 1 << 40


def read_document(data: bytes) -> None:
    """A document is refused, or reads back as it is written; a PATCH does the same whichever way its vectors go."""
    model, body = MODELS[data[0] % len(MODELS)], data[1:]
    found = _document(model, body, LARGE)
    if not isinstance(found, Refused):
        text = found.model_dump_json(exclude_unset=True)
        again = _document(model, text.encode(), LARGE)
        same(isinstance(again, Refused) or again.model_dump_json(exclude_unset=True), text, "written and read")
    if model is LayerUpdate:
        same(_patched(_document(model, body, -1)), _patched(found), "the layer that is patched with large vectors")
    elif model is LayerConfig and not isinstance(found, Refused) and found.num_features <= 64:
        same(initial_state(found).config, found, "the config of a new layer")


def _document(model: Any, body: bytes, large: int) -> Any:
    with replaced(documents, _LARGE_UPDATE=large):
        return attempt(documents.parse_document, model, body, refusals=(MalformedBody, InvalidRequest))


def _patched(change: Any) -> Any:
    """A layer after a PATCH, as text; `Refused` if it refuses."""
    if isinstance(change, Refused):
        return change
    changed = attempt(update, initial_state(TWO_CHANNELS), change)
    return changed if isinstance(changed, Refused) else repr(changed)


def read_moments(data: bytes) -> None:
    """Many layers at once, read layer by layer, are what they are when the whole is read, and each can be judged."""
    body = data[1:]
    if data[0] % 2:
        found = attempt(moments._many_from_safetensors, body)
    else:
        found = _many(body, LARGE)
        same(_comparable(_many(body, 0)), _comparable(found), "what is read layer by layer")
    if isinstance(found, Refused):
        return
    for tensors in found.values():
        if not isinstance(tensors, Exception):
            attempt(posted_moments, TWO_CHANNELS, tensors)
            same(tensors.keys() <= MOMENT_DTYPES.keys(), True, "the names of the moments")


def _many(body: bytes, large: int) -> Any:
    with replaced(moments, _LARGE=large):
        return attempt(moments._many_from_json, body, refusals=(MalformedBody, InvalidRequest))


def _comparable(found: Any) -> Any:
    if isinstance(found, Refused):
        return found
    return [(name, _moments_comparable(tensors)) for name, tensors in found.items()]


def _moments_comparable(tensors: Any) -> Any:
    if isinstance(tensors, ProblemError):
        return type(tensors)
    return {name: raw(tensor) for name, tensor in tensors.items()}


def read_head(data: bytes) -> None:
    """Path, query and headers, a line each. What is remembered is what is read anew."""
    lines = [*data.split(b"\n"), *[b""] * 8][:8]
    url, media, accept, match, none_match, key, name, token = lines
    _check_target(url)
    query = url.partition(b"?")[2]
    for model in QUERIES:
        _check_query(model, query)
    for known in (tuple(CODECS), tuple(CODECS)[:1]):
        given = {b"content-type": media, b"content-encoding": none_match[:8]}
        found = attempt(negotiation.content_type, given, known, refusals=(UnsupportedMediaType,))
        same(isinstance(found, Refused) or found in known, True, "the media type")
        _check_accept(accept, known)
    versions = attempt(if_match, match.decode("latin-1"), refusals=(InvalidRequest,))
    matches_none(none_match, 7)
    if isinstance(versions, frozenset) and versions:
        same(matches_none(match, next(iter(versions))), False, "If-None-Match of a version that If-Match names")
    found = attempt(headers.idempotency_key, {b"idempotency-key": key}, refusals=(InvalidRequest,))
    same(isinstance(found, str), KEY_PATTERN.fullmatch(key.decode("latin-1")) is not None, "whether the key is valid")
    same(
        bool(KEY_PATTERN.fullmatch(headers.request_id({b"x-request-id": name}))), True, "a request id that can be sent"
    )
    _check_guard(token, url)


def _check_target(url: bytes) -> None:
    path = url.partition(b"?")[0]
    target = read_target({"raw_path": path, "path": path.decode("latin-1")})
    if path:
        same(target_of.__wrapped__(path), target, "the target, read anew")
    same(target_of.__wrapped__(target.path.encode()), target, "the target of a path that was made normal")
    if target.layer is not None:
        same(target.named, LAYER_NAME_PATTERN.fullmatch(target.layer) is not None, "whether the layer's name is valid")
    if target.versioned and is_public(target.path):
        raise BrokenPromiseError(f"{target.path} is public")


def _check_query(model: type[queries.Query], query: bytes) -> None:
    found = attempt(queries.parse_query, model, query, refusals=(InvalidRequest,))
    same(attempt(queries._parse, model, query, refusals=(InvalidRequest,)), found, "the query, read anew")
    if isinstance(found, queries.StateQuery) and isinstance(at := found.state, str | int):
        known = at.bit_length() <= 64 if isinstance(at, int) else TAG_PATTERN.fullmatch(at) is not None
        same((known, len(str(at)) <= 200), (True, True), f"whether {at!r} may name a state")
    if isinstance(found, queries.ExpectQuery) and found.expect is not None:
        same(DIGEST_PATTERN.fullmatch(found.expect) is not None, True, "a digest that is compared")
    if isinstance(found, queries.GroupQuery):
        same((found.group is None, found.group_call is None), (found.size is None,) * 2, "whether there is a group")


def _check_accept(accept: bytes, offered: tuple[str, ...]) -> None:
    found = attempt(negotiation.accepted, accept, offered, refusals=(NotAcceptable,))
    if isinstance(found, Refused):
        return
    same(set(found) <= set(offered) and len(set(found)) == len(found) > 0, True, "the forms that are accepted")
    for dtype, several in (("bfloat16", False), ("float32", True)):
        form = attempt(negotiation.tensor_form, found, dtype, several, refusals=(NotAcceptable,))
        same(isinstance(form, Refused) or dtype in CODECS[form].dtypes, True, "a form that has the dtype")


def _check_guard(given: bytes, url: bytes) -> None:
    """Who has no token is let through to public paths only."""
    target = read_target({"raw_path": url or b"/", "path": "/"})
    guard = Guard(token="all", read_token="look")
    found = attempt(guard.authenticate, {b"authorization": given}, target, refusals=(Unauthenticated,))
    scheme, _, token = given.partition(b" ")
    known = token.strip(b" ") if scheme.lower() == b"bearer" else b""
    if is_public(target.path) and not target.versioned:
        same(found, None, "what a public path asks for")
    elif (scope := {b"all": Scope.ADMIN, b"look": Scope.READ}.get(known)) is not None:
        same(found, Grant(scope), "what the token grants")
    else:
        same(isinstance(found, Refused), True, "whether it is refused")


def read_tokens(data: bytes) -> None:
    """A token file is refused with the number of a line, or is what would be written of its tokens."""
    try:
        tokens = parse_tokens(data)
    except TokenFileError as refusal:
        same(len(str(refusal)) <= 200 and str(refusal).isascii(), True, "a reason that can be logged")
        return
    same(format_tokens(tokens.values()), data, "the file, written again")
    for name, token in tokens.items():
        same((token.id, token.grant.sees(f"{token.grant.prefix}x")), (name, True), "the token")
        same(find_token(tokens, f"bns_{name}_{'A' * 43}".encode()), None, "a token that somebody guessed")
