"""What the service tells about itself: metrics for Prometheus.

    metrics.py    the table of all metrics
    registry.py   what reports to them, and what reads them: `Metrics`, or `NoMetrics` when they are off
    values.py     the numbers of all processes of a service
    layout.py     the place of each series among these numbers
    requests.py   one report per request
    layers.py     reports of folds, commits and receipts

Every package may import this one, which imports none of them.
"""

from batchnorm_service.telemetry.registry import Metrics, NoMetrics, Reporter

__all__ = ["Metrics", "NoMetrics", "Reporter"]
