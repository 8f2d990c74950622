"""The bare echo: an ASGI function that sends back the body it got. Nothing in Python can be faster on this server."""

from __future__ import annotations

from typing import Any

from benchmarks.servers.knobs import serve


async def echo(_scope: Any, receive: Any, send: Any) -> None:
    """Answer with the request's body."""
    message = await receive()
    body = message["body"]
    if message["more_body"]:
        chunks = [body]
        while message["more_body"]:
            message = await receive()
            chunks.append(message["body"])
        body = b"".join(chunks)
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    serve(echo)
