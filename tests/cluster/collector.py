"""A collector of traces for tests: OTLP over HTTP, kept in memory.

Owns: the receiving end and the spans as protobuf has them. Knows nothing of who sends them.
"""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue


@dataclass(frozen=True)
class CollectedSpan:
    """Ids in hexadecimal digits, `parent` "" of one that has none; times in seconds since 1970."""

    name: str
    kind: int
    trace: str
    id: str
    parent: str
    began: float
    ended: float
    attributes: dict[str, Any]
    events: dict[str, dict[str, Any]]
    is_error: bool
    resource: dict[str, Any] = field(repr=False)


class Collector:
    """Listens on loopback from its construction to `close`. `answer`: the HTTP status that it gives."""

    def __init__(self) -> None:
        self.answer = 200
        self.num_requests = 0
        self.raw: list[bytes] = []
        self.spans: list[CollectedSpan] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.num_requests += 1
                if collector.answer == 200:
                    assert self.headers["content-type"] == "application/x-protobuf"
                    collector.take(body)
                reply = ExportTraceServiceResponse().SerializeToString()
                self.send_response(collector.answer)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def take(self, body: bytes) -> None:
        self.raw.append(body)
        self.spans += _read(body)

    def roots(self, name: str) -> list[CollectedSpan]:
        """Spans of that name that came, oldest first."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.began)

    def parts(self, span: CollectedSpan) -> dict[str, CollectedSpan]:
        """All that lies below a span, by name (of several the last one)."""
        found: dict[str, CollectedSpan] = {}
        for one in sorted(self.spans, key=lambda one: one.began):
            if one.parent == span.id:
                found |= {one.name: one, **self.parts(one)}
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _read(body: bytes) -> Iterator[CollectedSpan]:
    for resource_spans in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield CollectedSpan(
                    name=span.name,
                    kind=span.kind,
                    trace=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    began=span.start_time_unix_nano / 1e9,
                    ended=span.end_time_unix_nano / 1e9,
                    attributes=_attributes(span.attributes),
                    events={event.name: _attributes(event.attributes) for event in span.events},
                    is_error=span.status.code == 2,
                    resource=resource,
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    if value.HasField("array_value"):
        return [_value(one) for one in value.array_value.values]
    return getattr(value, value.WhichOneof("value") or "string_value")
