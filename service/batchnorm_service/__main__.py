"""The command `batchnorm-service`, which is `python -m batchnorm_service` as well."""

import sys


def main() -> None:
    """Run the command line, or say what is missing for it: the package installs without the service, too."""
    try:
        from batchnorm_service.cli import app  # noqa: PLC0415 - to say what is missing, if it is

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
