"""Style sheets, scripts and the font, from files of this package."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request

from batchnorm_client.wire.errors import NotFound
from batchnorm_service.rest.headers import read_headers
from batchnorm_service.rest.responses import RawHeader, Response, respond_empty

from .rendering import FOLDER, entity_tag, page_router

_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
_HEADERS: Final[tuple[RawHeader, ...]] = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-cache"))


def _load() -> dict[str, tuple[str, bytes, bytes]]:
    files = [path for path in (FOLDER / "static").iterdir() if path.suffix in _TYPES]
    return {path.name: (_TYPES[path.suffix], data := path.read_bytes(), entity_tag(data)) for path in files}


_FILES: Final = _load()
"""Media type, bytes and ETag by name. Only these names exist, so a path cannot lead anywhere else."""

router = page_router()


@router.get("/ui/static/{file}")
async def read_static(file: str, request: Request) -> Response:
    """A file. Browsers ask each time whether it is still the same, so a page never meets those of another release."""
    if file not in _FILES:
        raise NotFound("the page has no such file", expected=sorted(_FILES))
    media_type, data, tag = _FILES[file]
    headers = [(b"etag", tag), *_HEADERS]
    if read_headers(request.scope["headers"]).get(b"if-none-match") == tag:
        return respond_empty(304, headers)
    return Response(200, media_type, [data], headers)
