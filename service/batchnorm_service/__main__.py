"""`python -m batchnorm_service` is the command `batchnorm-service`."""

from batchnorm_service.cli import main

if __name__ == "__main__":
    main()
