"""Files of deploy/ are read by what reads them in earnest: nginx, Valkey, kubectl, Prometheus's tool."""

from service.conftest import http, start

__all__ = ["http", "start"]
