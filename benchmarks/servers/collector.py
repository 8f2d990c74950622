"""A collector of traces that takes everything and keeps nothing."""

from __future__ import annotations

from typing import Any

from benchmarks.servers.knobs import serve


async def collect(_scope: Any, receive: Any, send: Any) -> None:
    """Read the body; an empty answer is an empty message of OTLP, which means success."""
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/x-protobuf"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    serve(collect)
