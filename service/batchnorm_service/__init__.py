"""Named batch-normalization layers over REST. `app.create_app` joins the parts; `docs/design.md` tells why."""

from importlib.metadata import version

__version__ = version("batchnorm-service")
