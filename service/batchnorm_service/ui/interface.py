"""What the application needs of this package."""

from __future__ import annotations

from typing import Final

from batchnorm_service.rest.interface import Interface
from batchnorm_service.rest.target import PAGE

from .actions import router as action_routes
from .batch import router as batch_routes
from .drift import router as drift_routes
from .errors import error_page
from .home import router as home_routes
from .layer import router as layer_routes
from .operations import router as operation_routes
from .session import router as session_routes
from .static import router as static_routes

INTERFACE: Final = Interface(
    routers=(
        home_routes,
        layer_routes,
        drift_routes,
        action_routes,
        batch_routes,
        operation_routes,
        session_routes,
        static_routes,
    ),
    models=(),
    endpoints=lambda _layers, _options: {},
    error_page=error_page,
    home=PAGE.removeprefix("/"),
)
