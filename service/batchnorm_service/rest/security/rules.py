"""What a call needs. Each route names its scope (`needs`); a route that neither does nor is public is a mistake."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from fastapi import APIRouter, Security, params
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from batchnorm_client.wire.errors import Forbidden, NotFound
from batchnorm_service.layers import layer_not_found
from batchnorm_service.tokens import Grant, Scope

from ..target import LAYER, Target

PUBLIC_PATHS: Final = frozenset(
    {
        "/",
        "/docs",
        "/docs/start.js",
        "/docs/swagger-ui-bundle.js",
        "/docs/swagger-ui.css",
        "/healthz",
        "/metrics",
        "/openapi.json",
        "/problems",
        "/readyz",
        "/ui/login",
        "/v2",
    }
)
"""Paths that need no token, normalized as in `Target.path`."""

PUBLIC_PARENTS: Final = ("/problems", "/ui/static", "/v2/health")
"""Paths of one of these plus exactly one segment need no token either."""

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="token",
    description="Needed if the service has tokens. Each operation names the scope that the token must have at least:"
    " `read`, `train` or `admin`.",
)


def is_public(path: str) -> bool:
    """Whether a path needs no token even when there are some. All unlisted paths need one."""
    if path in PUBLIC_PATHS:
        return True
    parent, _, last = path.rpartition("/")
    return last != "" and parent in PUBLIC_PARENTS


def needs(scope: Scope) -> Any:
    """A dependency that declares which scope a route needs: `@router.get(path, dependencies=[needs(Scope.READ)])`.

    OpenAPI shows it. The gateway enforces it, because not every request reaches FastAPI.
    """
    return Security(_bearer, scopes=[str(scope)])


def needed_scope(route: APIRoute) -> Scope | None:
    """The scope that a route declares; None if it is public.

    Raises:
        RuntimeError: it declares none and is not public, or both.
    """
    declared = [
        Scope.parse(scope)
        for dependency in route.dependencies
        if isinstance(dependency, params.Security) and dependency.dependency is _bearer
        for scope in dependency.scopes or ()
    ]
    if len(declared) + is_public(route.path) != 1:
        raise RuntimeError(f"{route.path} needs one `needs(Scope...)` among its dependencies, unless it is public")
    return declared[0] if declared else None


class Rules:
    """The scope of each call, from the routes. Paths without a route are answered by FastAPI: 404 or 405.

    Args:
        routers: all routers.

    Raises:
        RuntimeError: a route has no rule.
    """

    def __init__(self, routers: Iterable[APIRouter]) -> None:
        self._calls: dict[tuple[str, str], Scope] = {}
        self._paths: dict[tuple[str, str], Scope] = {}
        self._patterns: list[tuple[str, re.Pattern[str], Scope]] = []
        for route in (route for router in routers for route in router.routes):
            if not isinstance(route, APIRoute):
                raise RuntimeError(f"{route} is not an APIRoute, so it cannot say which scope it needs")
            scope = needed_scope(route)
            if scope is not None:
                for method in route.methods or ():
                    self._add(method, route, scope)

    def _add(self, method: str, route: APIRoute, scope: Scope) -> None:
        if "{" not in route.path:
            self._paths[method, route.path] = scope
        else:
            self._calls[method, route.path] = scope  # found there if it is `Target.call`
            self._patterns.append((method, route.path_regex, scope))

    def check(self, grant: Grant, method: str, target: Target) -> None:
        """Return if the call's scope is within the grant's, whatever the layer.

        Raises:
            Forbidden: it is not.
            NotFound: the path has no rule, and the grant is for some layers only: nobody said which layers it shows.
        """
        if method == "HEAD":
            method = "GET"
        scope = self._find(method, target)
        if scope is None:
            # No route of this service: 404 or 405, or a route that an application has added to it.
            require(grant, Scope.READ if method == "GET" else Scope.ADMIN)
            if grant.prefix:
                raise NotFound("there is nothing at this path for a token that is bound to a prefix")
        else:
            require(grant, scope)

    def _find(self, method: str, target: Target) -> Scope | None:
        scope = (
            self._paths.get((method, target.path)) if target.layer is None else self._calls.get((method, target.call))
        )
        if scope is None:
            for of_method, pattern, of_pattern in self._patterns:
                if method == of_method and pattern.fullmatch(target.path):
                    return of_pattern
        return scope


def require(grant: Grant, scope: Scope) -> None:
    """Return if the grant has at least this scope; raises `Forbidden` if not."""
    if grant.scope < scope:
        raise Forbidden(
            f"this call needs a token with the scope {scope}; this one has {grant.scope}",
            field="Authorization",
            expected=str(scope),
            got=str(grant.scope),
        )


def check_layer(grant: Grant, method: str, target: Target) -> None:
    """Return if the layer that a call names exists for this caller.

    Raises:
        Forbidden: it does not, and the call would create it.
        LayerNotFound: it does not. The problem is that of a layer which does not exist for anybody.
    """
    name = target.layer
    if name is None or grant.sees(name):
        return
    if method == "PUT" and target.call == LAYER:
        raise Forbidden(
            f"this token is for layers whose names start with {grant.prefix!r}",
            field="Authorization",
            expected=grant.prefix,
            got=name,
        )
    raise layer_not_found(name)
