"""What the service tells about itself: metrics for Prometheus, a log, and traces for OpenTelemetry.

    metrics.py    the table of all metrics
    registry.py   what reports to them, and what reads them: `Metrics`, or `NoMetrics` when they are off
    values.py     the numbers of all processes of a service
    layout.py     the place of each series among these numbers
    requests.py   one report per request
    layers.py     reports of folds, commits and receipts
    logs.py       the log, and which requests are written to it
    traces.py     spans of requests and their stages; otel.py exports them, trace_context.py reads a caller's headers
    budget.py     how often something may happen in a second

Every package may import this one, which imports none of them.
"""

from batchnorm_service.telemetry.logs import RequestLog
from batchnorm_service.telemetry.registry import Metrics, NoMetrics, Reporter
from batchnorm_service.telemetry.traces import CURRENT_SPAN, Span, Traces

__all__ = ["CURRENT_SPAN", "Metrics", "NoMetrics", "Reporter", "RequestLog", "Span", "Traces"]
