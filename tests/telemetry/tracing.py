"""Traces that are exported into memory."""

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from batchnorm_service.telemetry import Traces
from batchnorm_service.telemetry.otel import OpenTelemetryExporter

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


class Exported:
    """What a service exports.

    Args:
        sampler: of OpenTelemetry.
        per_second, parent_decides: of `Traces`.

    Attributes:
        traces: of the service.
    """

    def __init__(self, sampler=ALWAYS_ON, per_second=None, *, parent_decides=True):
        self._memory = InMemorySpanExporter()
        exporter = OpenTelemetryExporter([SimpleSpanProcessor(self._memory)], sampler, Resource({}))
        self.traces = Traces(exporter, per_second, parent_decides=parent_decides)

    @property
    def spans(self):
        return self._memory.get_finished_spans()

    def take(self):
        """The spans since the last time, by name; a name that is there twice fails."""
        spans = {span.name: span for span in self.spans}
        assert len(spans) == len(self.spans)
        self.clear()
        return spans

    def clear(self):
        """Forget the spans so far."""
        self._memory.clear()


def parents(spans):
    """{name of a span: name of its parent, or the parent's id if it is not among them}."""
    names = {span.context.span_id: span.name for span in spans.values()}
    return {
        name: span.parent and names.get(span.parent.span_id, f"{span.parent.span_id:016x}")
        for name, span in spans.items()
    }
