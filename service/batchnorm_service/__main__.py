"""Entry point of the command `batchnorm-service` and of `python -m batchnorm_service`."""

import sys


def main() -> None:
    """Run the command line; exit with a hint if the service's optional dependencies are not installed."""
    try:
        from batchnorm_service.cli import app  # noqa: PLC0415 - to catch a missing dependency

        app()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("batchnorm_"):
            raise
        sys.exit(
            f"batchnorm-service: {error.name} is missing; install the service with:"
            " pip install 'batchnorm-service[service]'"
        )


if __name__ == "__main__":
    main()
