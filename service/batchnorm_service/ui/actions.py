"""What the page's forms change: the same operations as the calls of REST, and then back to the layer's page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from batchnorm_client.wire.documents import PinRequest, ResetRequest, RollbackRequest
from batchnorm_client.wire.errors import InvalidRequest
from batchnorm_client.wire.headers import IDEMPOTENCY_KEY, KEY_PATTERN
from batchnorm_client.wire.names import check_tag
from batchnorm_service.rest.documents import invalid_request
from batchnorm_service.rest.responses import Response
from batchnorm_service.rest.routes import ADMIN, TRAIN, LayerName, LayersDependency

from .rendering import page_router, redirect
from .session import Form

_KEY: Final = "key"
_NUMBER: Final = re.compile("[0-9]{1,19}")
"""Longer ones are no versions, nor numbers of JSON."""

Model = TypeVar("Model", bound=BaseModel)

router = page_router()


@router.post("/ui/layers/{name}/reset", dependencies=[ADMIN])
async def reset(name: LayerName, request: Request, layers: LayersDependency, form: Form) -> Response:
    """As `POST /v1/layers/{name}/reset`."""
    key, fields = _key(form), _only(form, "what")
    what = _validated(ResetRequest, fields).what
    await layers.reset(name, what, key, None)
    return redirect(request, f"/layers/{name}?done=reset-{what}")


@router.post("/ui/layers/{name}/rollback", dependencies=[ADMIN])
async def rollback(name: LayerName, request: Request, layers: LayersDependency, form: Form) -> Response:
    """As `POST /v1/layers/{name}/rollback`."""
    key, fields = _key(form), _only(form, "version", "tag")
    wanted = _validated(RollbackRequest, _with_number(fields))
    to = wanted.tag if wanted.version is None else wanted.version
    assert to is not None  # noqa: S101 - the model has one of them
    await layers.rollback(name, to, key, None)
    return redirect(request, f"/layers/{name}?done=rollback")


@router.post("/ui/layers/{name}/pin", dependencies=[TRAIN])
async def pin(name: LayerName, request: Request, layers: LayersDependency, form: Form) -> Response:
    """As `PUT /v1/layers/{name}/pins/{tag}`."""
    key, fields = _key(form), _only(form, "tag", "version")
    tag = fields.pop("tag", "").strip()
    check_tag(tag)
    version = _validated(PinRequest, _with_number(fields)).version
    await layers.history.pin(name, tag, version, key)
    return redirect(request, f"/layers/{name}?done=pin")


@router.post("/ui/layers/{name}/unpin", dependencies=[ADMIN])
async def unpin(name: LayerName, request: Request, layers: LayersDependency, form: Form) -> Response:
    """As `DELETE /v1/layers/{name}/pins/{tag}`."""
    tag = _only(form, "tag").get("tag", "")
    check_tag(tag)
    await layers.history.unpin(name, tag)
    return redirect(request, f"/layers/{name}?done=unpin")


def _key(form: dict[str, str]) -> str | None:
    """The form's Idempotency-Key, so that a second click changes nothing; scripts make one when they open the form."""
    key = form.pop(_KEY, "")
    if key and not KEY_PATTERN.fullmatch(key):
        raise InvalidRequest("the key is no Idempotency-Key", field=IDEMPOTENCY_KEY, expected=KEY_PATTERN.pattern)
    return key or None


def _only(form: dict[str, str], *known: str) -> dict[str, str]:
    form.pop(_KEY, None)
    for name in form:
        if name not in known:
            raise InvalidRequest(f"{name[:200]}: is not known", field=name[:200], expected=list(known))
    return form


def _with_number(fields: Mapping[str, str]) -> dict[str, int | str]:
    """The fields with the version as a number, as in JSON; an empty one is left out."""
    given = {name: value for name, value in fields.items() if value != ""}
    return {name: int(text) if name == "version" and _NUMBER.fullmatch(text) else text for name, text in given.items()}


def _validated(model: type[Model], fields: Mapping[str, int | str]) -> Model:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False), list(model.model_fields)) from None
