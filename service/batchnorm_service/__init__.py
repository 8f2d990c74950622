"""A service for named batch-normalization layers. Start at `app.create_app`; `docs/design.md` explains the design."""

from importlib.metadata import version

__version__ = version("batchnorm-service")
