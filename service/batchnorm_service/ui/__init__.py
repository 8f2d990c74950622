"""The page under /ui: layers, their statistics and the service's figures, over the same operations as REST.

Pages are made here with Jinja2; scripts draw the charts and ask for changes. Nothing is kept between requests: the
login is a cookie with the token, so any replica can answer.
"""

from batchnorm_service.ui.interface import INTERFACE

__all__ = ["INTERFACE"]
