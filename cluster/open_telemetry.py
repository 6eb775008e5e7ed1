"""Spans as OpenTelemetry has them, sent to a collector.

Owns: the way from our spans to OTLP over HTTP: sampling, a client's `traceparent`, and a bounded queue in front of the
collector. Imported only where `tracing.endpoint` is set. Knows nothing of turns and of what is measured.

A collector that is away costs nothing but the spans: they are queued by a thread of OpenTelemetry's own, and what does
not fit is dropped. Nothing global is set: Ray, or whoever else uses OpenTelemetry in this process, is not touched.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from phi_cluster.cluster.config import TracingConfig
from phi_cluster.cluster.span import NO_ATTRIBUTES, UNTRACED, Attributes, Span

logger = logging.getLogger(__name__)

SCOPE = "phi_cluster"
_BATCH_SPANS = 512
_NO_CONTEXT = trace.set_span_in_context(trace.INVALID_SPAN)


class OpenTelemetryTracer:
    """Implements span.Tracer. `processor` gets the spans that are over; `resource` says where they come from.

    `follow_clients`: a client that says whether its trace is recorded is followed; else its request is in its trace,
    but recorded only as often as all others.
    """

    def __init__(
        self, processor: SpanProcessor, resource: Resource, *, sample_ratio: float = 1.0, follow_clients: bool = True
    ):
        ratio = TraceIdRatioBased(sample_ratio)
        sampler: Sampler = ParentBased(ratio) if follow_clients else ratio
        # Serve ends a replica in its own way; `close` is called there.
        self._provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(SCOPE)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, parent: str | None, attributes: Attributes) -> Span:
        """See span.Tracer.begin. A `parent` that is none (the standard's form) begins a trace of our own."""
        context = _NO_CONTEXT
        if parent is not None:
            context = self._propagator.extract({"traceparent": parent}, context=context)
        span = self._tracer.start_span(name, context, kind=trace.SpanKind.SERVER, attributes=dict(attributes))
        return _Recorded(self._tracer, span) if span.is_recording() else UNTRACED

    def close(self) -> None:
        """Sends what is queued, for a moment."""
        self._provider.shutdown()


class _Recorded:
    """Implements span.Span."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span):
        self._tracer = tracer
        self._span = span

    @property
    def traceparent(self) -> str | None:
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def begin(self, name: str, attributes: Attributes = NO_ATTRIBUTES, *, at: float | None = None) -> Span:
        context = trace.set_span_in_context(self._span)
        span = self._tracer.start_span(name, context, attributes=dict(attributes), start_time=_nanoseconds(at))
        return _Recorded(self._tracer, span)

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes(dict(attributes))

    def event(self, name: str, attributes: Attributes = NO_ATTRIBUTES) -> None:
        self._span.add_event(name, dict(attributes))

    def end(self, error: str | None = None, *, at: float | None = None) -> None:
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(trace.Status(trace.StatusCode.ERROR, error))
        self._span.end(_nanoseconds(at))


class _Told(SpanExporter):
    """An exporter whose collector's going and coming is logged, once each."""

    def __init__(self, exporter: SpanExporter, endpoint: str):
        self._exporter = exporter
        self._endpoint = endpoint
        self._is_away = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        is_away = result is not SpanExportResult.SUCCESS
        if is_away and not self._is_away:
            logger.warning("tracing.endpoint: %s takes no spans; they are dropped until it does", self._endpoint)
        if self._is_away and not is_away:
            logger.warning("tracing.endpoint: %s takes spans again", self._endpoint)
        self._is_away = is_away
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def _nanoseconds(at: float | None) -> int | None:
    return None if at is None else int(at * 1e9)


def tracer_of(config: TracingConfig, instance: str, version: str) -> OpenTelemetryTracer:
    """Sends to `config.endpoint`. `instance` names this process among the others of the service. The exporter reads
    OTEL_EXPORTER_OTLP_HEADERS and its like itself, the resource OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES."""
    # It tells each failure at each try: a collector that is away would fill the log. `_Told` does it once.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    assert config.endpoint is not None
    exporter = _Told(OTLPSpanExporter(endpoint=config.endpoint, timeout=config.timeout), config.endpoint)
    processor = BatchSpanProcessor(
        exporter, max_queue_size=config.queue_size, max_export_batch_size=min(_BATCH_SPANS, config.queue_size)
    )
    own = {"service.name": config.service_name, "service.instance.id": instance, "service.version": version}
    # What the environment says wins.
    resource = Resource.create(own).merge(OTELResourceDetector().detect())
    return OpenTelemetryTracer(
        processor, resource, sample_ratio=config.sample_ratio, follow_clients=config.follow_clients
    )
