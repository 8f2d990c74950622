"""Exports spans with OpenTelemetry's SDK, configured by its environment variables. Imported only if traces are on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from batchnorm_service import __version__

from .trace_context import TraceContext
from .traces import MAX_LINKS, Span, Traces, TracesRefusedError

_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_KINDS: Final = {"server": SpanKind.SERVER, "internal": SpanKind.INTERNAL}
_SCOPE: Final = InstrumentationScope("batchnorm_service", __version__)
_FAILED, _UNSET = Status(StatusCode.ERROR), Status()


class OpenTelemetryExporter:
    """Converts spans, and hands them to OpenTelemetry's processors.

    Args:
        processors: such as `BatchSpanProcessor`, whose `on_end` does not block.
        sampler: decides which traces are exported.
        resource: describes this process.
    """

    def __init__(self, processors: Iterable[SpanProcessor], sampler: Sampler, resource: Resource) -> None:
        self._processors = list(processors)
        self._sampler = sampler
        self._resource = resource

    def samples(self, parent: TraceContext | None, trace_id: int, name: str) -> bool:
        """See `Exporter`."""
        context = None if parent is None else _remote(parent)
        result = self._sampler.should_sample(context, trace_id, name, SpanKind.SERVER)
        return result.decision is Decision.RECORD_AND_SAMPLE

    def export(self, span: Span, ended: int) -> None:
        """See `Exporter`."""
        state = TraceState.from_header([span.state]) if span.state else None
        parent = None
        if span.parent is not None:
            parent = SpanContext(span.trace_id, span.parent, span.remote, _SAMPLED, state)
        readable = ReadableSpan(
            span.name,
            SpanContext(span.trace_id, span.span_id, False, _SAMPLED, state),
            parent,
            self._resource,
            span.attributes,
            (),
            [Link(SpanContext(each.trace_id, each.span_id, False, _SAMPLED)) for each in span.links[:MAX_LINKS]],
            _KINDS[span.kind],
            None,
            _FAILED if span.failed else _UNSET,
            ended - (time.perf_counter_ns() - span.began),
            ended,
            _SCOPE,
        )
        for processor in self._processors:
            processor.on_end(readable)

    def close(self) -> None:
        """See `Exporter`."""
        for processor in self._processors:
            processor.shutdown()


def traces_from_environment() -> Traces | None:
    """Traces as the standard OTEL_* variables configure them; None if those turn them off.

    Raises:
        TracesRefusedError: an exporter is not known or not installed, or cannot be configured.
    """
    names = [name.strip() for name in (os.environ.get("OTEL_TRACES_EXPORTER") or "otlp").split(",")]
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or names == ["none"]:
        return None
    processors = [_processor(name) for name in names]
    provider = TracerProvider(shutdown_on_exit=False)  # reads the variables for samplers
    exporter = OpenTelemetryExporter(processors, provider.sampler, _resource())
    if sampler := os.environ.get("OTEL_TRACES_SAMPLER"):
        return Traces(exporter, None, parent_decides=sampler.strip().lower().startswith("parentbased_"))
    return Traces(exporter)


def _processor(name: str) -> SpanProcessor:
    if name == "otlp":
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        name = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}.get(protocol or "http/protobuf", name)
    found = [*entry_points(group="opentelemetry_traces_exporter", name=name)]
    if not found:
        known = sorted({each.name for each in entry_points(group="opentelemetry_traces_exporter")})
        raise TracesRefusedError(f"OTEL_TRACES_EXPORTER: no exporter {name!r} is installed; there are {known}")
    try:
        return BatchSpanProcessor(found[0].load()())
    except Exception as error:  # of whatever kind the exporter raises
        raise TracesRefusedError(f"the exporter {name!r} of traces cannot start: {error}") from error


def _resource() -> Resource:
    ours = Resource({"service.name": "batchnorm-service", "service.version": __version__, "process.pid": os.getpid()})
    return Resource.create().merge(ours).merge(OTELResourceDetector().detect())


def _remote(parent: TraceContext) -> Context:
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    state = TraceState.from_header([parent.state]) if parent.state else None
    return set_span_in_context(NonRecordingSpan(SpanContext(parent.trace_id, parent.span_id, True, flags, state)))
