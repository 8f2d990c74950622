"""Which token and which certificates a client uses."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import httpx


def find_token(token: str | None, file: str | os.PathLike[str] | None, *, use_environment: bool) -> str | None:
    """The token to send, or None.

    Args:
        token: the token.
        file: a file that contains it.
        use_environment: if neither is given, whether to use the first of BATCHNORM_CLIENT_TOKEN,
            BATCHNORM_CLIENT_TOKEN_FILE and BATCHNORM_TOKEN that is set and not empty.

    Raises:
        ValueError: both are given, or it has characters that cannot be sent; the message does not contain it.
        OSError: the file cannot be read.
    """
    if token is not None and file is not None:
        raise ValueError("a token and a token file: give one of them")
    if use_environment and token is None and file is None:
        token = os.environ.get("BATCHNORM_CLIENT_TOKEN") or None
        file = None if token else os.environ.get("BATCHNORM_CLIENT_TOKEN_FILE") or None
        if token is None and file is None:
            token = os.environ.get("BATCHNORM_TOKEN") or None
    if file is not None:
        token = Path(file).read_text("latin-1").strip()
    if token is not None and (not token or not token.isascii() or not token.isprintable() or " " in token):
        where = f" in {os.fspath(file)}" if file is not None else ""
        raise ValueError(f"the token{where} must be printable ASCII without spaces")
    return token


def with_ssl_context(options: Mapping[str, Any]) -> dict[str, Any]:
    """httpx's options, with an SSL context instead of files: httpx deprecates those.

    Raises:
        ValueError: a certificate or key cannot be read; the message names the file.
    """
    verify, cert = options.get("verify", True), options.get("cert")
    others = {name: value for name, value in options.items() if name not in {"verify", "cert"}}
    if verify is True and cert is None:
        variables = (os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"))
        return others | {"verify": _default_context(options.get("trust_env", True), *variables)}
    if isinstance(verify, bool | ssl.SSLContext) and cert is None:
        return others | {"verify": verify}
    if isinstance(verify, str | os.PathLike):
        context = _trusting(verify)
    elif isinstance(verify, ssl.SSLContext):
        context = verify
    else:
        context = httpx.create_ssl_context(verify, trust_env=options.get("trust_env", True))
    if cert is not None:
        files = cert if isinstance(cert, tuple) else (cert,)
        try:
            context.load_cert_chain(*files)
        except OSError as error:
            raise ValueError(f"{' and '.join(map(os.fspath, files[:2]))}: {_reason(error)}") from error
    return others | {"verify": context}


@cache
def _default_context(trust_env: bool, *_variables: str | None) -> ssl.SSLContext:
    """httpx's, made once: reading all authorities takes 50 ms, also for a client of an http:// URL."""
    return httpx.create_ssl_context(trust_env=trust_env)


def _trusting(authorities: str | os.PathLike[str]) -> ssl.SSLContext:
    path = os.fspath(authorities)
    try:
        if os.path.isdir(path):
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        raise ValueError(f"{path}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return error.reason or "not a certificate" if isinstance(error, ssl.SSLError) else error.strerror or str(error)
