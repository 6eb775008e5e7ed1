"""Spans as they reach a collector: real OTLP over HTTP, a client's trace gone on with, and a collector that is away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from phi_cluster.cluster.config import TracingConfig
from phi_cluster.cluster.open_telemetry import OpenTelemetryTracer, tracer_of
from phi_cluster.cluster.span import UNTRACED
from tests.cluster.collector import Collector

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SERVER, INTERNAL = 2, 1


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def tracer(collector: Collector) -> Callable[..., OpenTelemetryTracer]:
    def make(**fields: object) -> OpenTelemetryTracer:
        return tracer_of(TracingConfig.model_validate({"endpoint": collector.url, **fields}), "one", "0.1")

    return make


def test_a_trace_with_its_parts(collector: Collector, tracer: Callable[..., OpenTelemetryTracer]) -> None:
    made = tracer(service_name="mine")
    root = made.begin("chat m", f"00-{TRACE}-{PARENT}-01", {"gen_ai.operation.name": "chat", "n": 3})
    part = root.begin("queue", {"pid": 7}, at=100.0)
    part.event("preempted", {"again": True})
    part.end(at=100.25)
    root.note({"gen_ai.response.finish_reasons": ("stop",)})
    root.end("overloaded")
    made.close()
    queue, chat = collector.spans
    assert (chat.name, chat.kind, chat.trace, chat.parent) == ("chat m", SERVER, TRACE, PARENT)
    assert (queue.name, queue.kind, queue.trace, queue.parent) == ("queue", INTERNAL, TRACE, chat.id)
    assert (queue.began, queue.ended, queue.attributes) == (100.0, 100.25, {"pid": 7})
    assert queue.events == {"preempted": {"again": True}}
    told = {"gen_ai.operation.name": "chat", "n": 3, "gen_ai.response.finish_reasons": ["stop"]}
    assert chat.attributes == {**told, "error.type": "overloaded"}
    assert (chat.is_error, queue.is_error) == (True, False)
    assert {"service.name": "mine", "service.instance.id": "one", "service.version": "0.1"}.items() <= (
        chat.resource.items()
    )


def test_the_environment_says_more_of_the_resource(
    collector: Collector, tracer: Callable[..., OpenTelemetryTracer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.version=2")
    made = tracer()
    made.begin("a", None, {}).end()
    made.close()
    [span] = collector.spans
    assert span.resource["deployment.environment.name"] == "test"
    assert (span.resource["service.name"], span.resource["service.version"]) == ("phi-cluster", "2")


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "",
        "hello",
        f"00-{TRACE}-{PARENT}",
        f"00-{'0' * 32}-{PARENT}-01",
        f"ff-{TRACE}-{PARENT}-01",
        "00-" + "z" * 32 + f"-{PARENT}-01",
        "x" * 10_000,
    ],
)
def test_what_is_no_traceparent_begins_a_trace(
    collector: Collector, tracer: Callable[..., OpenTelemetryTracer], sent: str | None
) -> None:
    made = tracer()
    made.begin("a", sent, {}).end()
    made.close()
    [span] = collector.spans
    assert span.parent == ""
    assert span.trace not in (TRACE, "0" * 32)


def test_who_is_sampled(collector: Collector, tracer: Callable[..., OpenTelemetryTracer]) -> None:
    wanted, unwanted = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
    none, deaf = tracer(sample_ratio=0.0), tracer(sample_ratio=0.0, follow_clients=False)
    everything = tracer(sample_ratio=1.0, follow_clients=False)
    assert none.begin("a", None, {}) is UNTRACED
    assert none.begin("a", unwanted, {}) is UNTRACED
    assert deaf.begin("a", wanted, {}) is UNTRACED
    none.begin("b", wanted, {}).end()
    everything.begin("c", unwanted, {}).end()
    for one in (none, deaf, everything):
        one.close()
    assert sorted((span.name, span.trace) for span in collector.spans) == [("b", TRACE), ("c", TRACE)]


def test_a_collector_that_is_away_costs_the_spans_only(
    collector: Collector, tracer: Callable[..., OpenTelemetryTracer], caplog: pytest.LogCaptureFixture
) -> None:
    collector.answer = 400
    made = tracer(queue_size=4, timeout=0.2)
    for _ in range(50):
        made.begin("a", None, {}).end()
    until(lambda: collector.num_requests > 0)
    made.close()
    assert collector.spans == []
    told = [one.getMessage() for one in caplog.records if one.name.startswith("phi_cluster")]
    assert told == [f"tracing.endpoint: {collector.url} takes no spans; they are dropped until it does"]


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nobody_at_all(tracer: Callable[..., OpenTelemetryTracer], collector: Collector) -> None:
    made = tracer_of(TracingConfig(endpoint="http://127.0.0.1:9/v1/traces", timeout=0.1), "one", "0.1")
    made.begin("a", None, {}).end()
    made.close()
