"""What the application consists of: the REST interface, and others to the same layers beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel

from batchnorm_service.layers import Layers
from batchnorm_service.telemetry.metrics import OTHER

from .layer_request import Endpoint
from .problems import ErrorPage

if TYPE_CHECKING:
    from .application import ApiOptions


@dataclass(frozen=True, slots=True)
class Interface:
    """Another interface to the same layers, beside REST.

    Attributes:
        routers: its routes.
        models: of bodies that FastAPI does not know, for the OpenAPI document.
        endpoints: makes the endpoints that are called without FastAPI, by method and path's template.
        error_page: makes pages of problems, where a request wants one.
        home: where `/` leads a browser, relative to it; None if this interface has no pages.
    """

    routers: tuple[APIRouter, ...]
    models: tuple[type[BaseModel], ...]
    endpoints: Callable[[Layers, ApiOptions], Mapping[tuple[str, str], Endpoint]]
    error_page: ErrorPage | None = None
    home: str | None = None


class RouteTable:
    """The routes of all interfaces.

    Args:
        routers: that they are in.
    """

    def __init__(self, routers: tuple[APIRouter, ...]) -> None:
        self._routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]

    def template_of(self, path: str) -> str:
        """The template of the route with this path, such as `/v1/layers/{name}`, or `other`."""
        return next((route.path for route in self._matching(path)), OTHER)

    def templates(self) -> list[str]:
        """Everything that `template_of` returns."""
        return [*{route.path: None for route in self._routes}, OTHER]

    def methods_of(self, path: str) -> list[str]:
        """The methods of all routes with this path (starlette lists those of the first)."""
        methods = {method for route in self._matching(path) for method in route.methods or ()}
        return sorted(methods | {"HEAD"} if "GET" in methods else methods)

    def _matching(self, path: str) -> Iterator[APIRoute]:
        return (route for route in self._routes if route.path_regex.fullmatch(path))
