"""The command `batchnorm`. Needs the extra `cli`: typer and rich."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from batchnorm_client.cli.app import app  # noqa: PLC0415 - to say what is missing, if it is
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.exit("batchnorm: typer and rich are missing; install them with: pip install 'batchnorm-service[cli]'")
    app()


__all__ = ["main"]
