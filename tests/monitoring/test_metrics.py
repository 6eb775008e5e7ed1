"""Every metric once, under our prefix, and right after it was summed over replicas that come and go."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator

import pytest
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from phi_cluster.monitoring.metrics import (
    SESSION_BYTES_BUCKETS,
    FamilySnapshot,
    NodeView,
    RequestMetrics,
    merge_snapshots,
    node_metrics,
    without_gauges,
)

# What dashboards and users rely on.
PROMISED = {
    "phi_kv_cache_bytes",
    "phi_kv_cache_usage_perc",
    "phi_session_kv_cache_bytes",
    "phi_sessions",
    "phi_session_activations_total",
    "phi_session_recycles_total",
    "phi_session_forks_total",
    "phi_session_hibernations_total",
    "phi_session_restores_total",
    "phi_hibernated_bytes",
    "phi_num_requests_running",
    "phi_num_requests_waiting",
    "phi_time_to_first_token_seconds",
    "phi_inter_token_latency_seconds",
    "phi_e2e_request_latency_seconds",
    "phi_prompt_tokens_total",
    "phi_cached_prompt_tokens_total",
    "phi_generation_tokens_total",
    "phi_request_success_total",
    "phi_recoveries_total",
    "phi_standby_engines",
}


class Exporter:
    """What the controller does with snapshots: through prometheus_client to text, and parsed again."""

    def __init__(self, *metrics: Iterable[Metric]):
        self._metrics = [metric for some in metrics for metric in some]

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics

    def text(self) -> str:
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry).decode()

    def families(self) -> list[Metric]:
        return list(text_string_to_metric_families(self.text()))

    def value(self, name: str, **labels: str) -> float:
        found = [
            sample.value
            for family in self.families()
            for sample in family.samples
            if sample.name == name and sample.labels == labels
        ]
        assert len(found) == 1, (name, labels, found)
        return found[0]


def merged(*snapshots: list[FamilySnapshot]) -> Exporter:
    return Exporter(merge_snapshots(snapshots))


def served(*requests: tuple[str, int, int, int], open_requests: int = 0) -> RequestMetrics:
    """A replica that has served these: outcome, prompt, cached and generated tokens."""
    metrics = RequestMetrics()
    for outcome, prompt, cached, generated in requests:
        metrics.on_start("chat")
        metrics.on_first_token("chat", 0.02)
        metrics.on_token("chat", 2, 0.06)
        metrics.on_finish("chat", outcome, 1.5, prompt, cached, generated)
    for _ in range(open_requests):
        metrics.on_start("completions")
    return metrics


NODES = [
    NodeView(
        node="one",
        kv_bytes_by_state={"active": 300, "held": 100},
        sessions_by_state={"active": 2, "held": 1, "stored": 7},
        session_bytes=[100, 2**16, 2**40],
        budget_bytes=1000,
        reserved_bytes=500,
        private_bytes_by_kind={"engine": 5, "keeper": 6},
    ),
    NodeView(node="two", kv_bytes_by_state={"active": 80}, budget_bytes=100, reserved_bytes=50, session_bytes=[80]),
]


def everything() -> Exporter:
    return Exporter(
        merge_snapshots([served(("stop", 5, 3, 2)).snapshot()]), node_metrics(NODES, 4, {"idle": 2, "leak": 1}, 270)
    )


def test_every_metric_is_declared_once_under_our_prefix() -> None:
    names = [family.name for family in everything().collect()]
    assert len(names) == len(set(names))
    for metric in everything().collect():
        assert metric.name.startswith("phi_")
        assert metric.documentation.endswith(".")
        assert metric.documentation[0].isupper()


def test_all_promised_metrics_are_there() -> None:
    metrics = served(("stop", 5, 3, 2))
    metrics.on_engine(1, {"engine": {"death": 1}}, 1, {})
    exporter = Exporter(merge_snapshots([metrics.snapshot()]), node_metrics(NODES, 4, {"idle": 2}, 270))
    families = {family.name for family in exporter.families()}
    samples = {sample.name for family in exporter.families() for sample in family.samples}
    assert families | samples >= PROMISED


def test_labels_are_few_and_never_name_a_session() -> None:
    allowed = {"node", "state", "kind", "reason", "finish_reason", "component", "le"}
    found = set()
    for family in everything().families():
        for sample in family.samples:
            found |= set(sample.labels)
    assert found <= allowed


def test_what_requests_count() -> None:
    metrics = served(("stop", 10, 4, 3), ("length", 20, 0, 7), ("abort", 0, 0, 0), open_requests=3)
    metrics.on_engine(2, {}, 0, {})
    exporter = merged(metrics.snapshot())
    assert exporter.value("phi_request_success_total", finish_reason="stop") == 1
    assert exporter.value("phi_request_success_total", finish_reason="length") == 1
    assert exporter.value("phi_request_success_total", finish_reason="abort") == 1
    assert exporter.value("phi_prompt_tokens_total") == 30
    assert exporter.value("phi_cached_prompt_tokens_total") == 4
    assert exporter.value("phi_generation_tokens_total") == 10
    assert exporter.value("phi_num_requests_running") == 2
    assert exporter.value("phi_num_requests_waiting") == 1
    assert exporter.value("phi_time_to_first_token_seconds_count") == 3
    assert exporter.value("phi_time_to_first_token_seconds_sum") == pytest.approx(0.06)
    assert exporter.value("phi_inter_token_latency_seconds_sum") == pytest.approx(0.18)
    assert exporter.value("phi_e2e_request_latency_seconds_sum") == 4.5
    # The engine may run more than is open here for a moment: nothing is negative.
    metrics.on_engine(9, {}, 0, {})
    assert merged(metrics.snapshot()).value("phi_num_requests_waiting") == 0


def test_replacements_are_counted_once() -> None:
    metrics = RequestMetrics()
    for deaths, hangs in ((0, 0), (1, 0), (1, 0), (3, 1), (3, 1)):
        metrics.on_engine(0, {"engine": {"death": deaths, "hang": hangs}, "standby_engine": {}}, 0, {})
    exporter = merged(metrics.snapshot())
    assert exporter.value("phi_recoveries_total", component="engine", reason="death") == 3
    assert exporter.value("phi_recoveries_total", component="engine", reason="hang") == 1


def test_snapshots_travel_and_do_not_change_what_is_counted() -> None:
    metrics = served(("stop", 10, 4, 3))
    snapshot = metrics.snapshot()
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot == metrics.snapshot()
    assert "_created" not in str(snapshot)


def test_two_replicas_in_a_process_do_not_share_anything() -> None:
    one, other = served(("stop", 10, 4, 3)), RequestMetrics()
    assert merged(one.snapshot()).value("phi_prompt_tokens_total") == 10
    assert merged(other.snapshot()).value("phi_prompt_tokens_total") == 0


def test_replicas_are_summed() -> None:
    one = served(("stop", 10, 4, 3), ("error", 1, 0, 0), open_requests=2)
    other = served(("stop", 30, 0, 5), open_requests=1)
    one.on_engine(1, {"engine": {"death": 2}}, 1, {})
    other.on_engine(1, {"engine": {"death": 1}}, 2, {})
    exporter = merged(one.snapshot(), other.snapshot())
    assert exporter.value("phi_request_success_total", finish_reason="stop") == 2
    assert exporter.value("phi_request_success_total", finish_reason="error") == 1
    assert exporter.value("phi_prompt_tokens_total") == 41
    assert exporter.value("phi_num_requests_running") == 2
    assert exporter.value("phi_num_requests_waiting") == 1
    assert exporter.value("phi_recoveries_total", component="engine", reason="death") == 3
    assert exporter.value("phi_standby_engines") == 3


def test_histograms_are_summed_bucket_by_bucket() -> None:
    one, other = RequestMetrics(), RequestMetrics()
    for seconds in (0.001, 0.02, 500.0):
        one.on_first_token("chat", seconds)
    other.on_first_token("chat", 0.02)
    exporter = merged(one.snapshot(), other.snapshot())
    name = "phi_time_to_first_token_seconds"
    assert exporter.value(f"{name}_bucket", le="0.005") == 1
    assert exporter.value(f"{name}_bucket", le="0.025") == 3
    assert exporter.value(f"{name}_bucket", le="120.0") == 3
    assert exporter.value(f"{name}_bucket", le="+Inf") == exporter.value(f"{name}_count") == 4
    assert exporter.value(f"{name}_sum") == pytest.approx(500.041)


def test_a_replica_that_is_gone_keeps_its_counters_and_loses_its_gauges() -> None:
    gone, living = served(("stop", 10, 4, 3), open_requests=5), served(("stop", 1, 0, 1), open_requests=1)
    gone.on_engine(2, {"engine": {"death": 1}}, 1, {})
    living.on_engine(1, {"engine": {"death": 0}}, 1, {})
    exporter = merged(without_gauges(gone.snapshot()), living.snapshot())
    assert exporter.value("phi_prompt_tokens_total") == 11
    assert exporter.value("phi_request_success_total", finish_reason="stop") == 2
    assert exporter.value("phi_time_to_first_token_seconds_count") == 2
    assert exporter.value("phi_recoveries_total", component="engine", reason="death") == 1
    assert exporter.value("phi_standby_engines") == 1
    assert exporter.value("phi_num_requests_running") == 1
    assert exporter.value("phi_num_requests_waiting") == 0


def test_what_is_gone_can_be_folded_together() -> None:
    """The sum of sums is the sum: whoever remembers replicas that are gone needs one snapshot, not all."""
    snapshots = [without_gauges(served(("stop", i, 0, 1)).snapshot()) for i in range(5)]
    folded = [
        (m.name, m.type, m.documentation, [(s.name, s.labels, s.value) for s in m.samples])
        for m in merge_snapshots(snapshots[:4])
    ]
    assert merged(folded, snapshots[4]).text() == merged(*snapshots).text()


def test_nothing_is_exported_of_no_replicas() -> None:
    assert list(merge_snapshots([])) == []


def test_nodes_and_their_memory() -> None:
    exporter = Exporter(node_metrics(NODES, 4, {"idle": 2, "leak": 1}, 270, {"forks": 3}))
    assert exporter.value("phi_session_forks_total") == 3
    assert exporter.value("phi_kv_cache_bytes", node="one", state="active") == 300
    assert exporter.value("phi_kv_cache_bytes", node="two", state="active") == 80
    assert exporter.value("phi_sessions", node="one", state="stored") == 7
    # What is leased or what is in use, whichever is more.
    assert exporter.value("phi_kv_cache_usage_perc", node="one") == 0.5
    assert exporter.value("phi_kv_cache_usage_perc", node="two") == 0.8
    assert exporter.value("phi_kv_cache_budget_bytes", node="two") == 100
    assert exporter.value("phi_process_private_bytes", node="one", kind="keeper") == 6
    assert exporter.value("phi_session_recycles_total", reason="idle") == 2
    assert exporter.value("phi_session_activations_total") == 4
    assert exporter.value("phi_weights_bytes") == 270


def test_sessions_are_counted_by_their_size_over_all_nodes() -> None:
    exporter = Exporter(node_metrics(NODES, 0, {}, 0))
    name = "phi_session_kv_cache_bytes"
    assert exporter.value(f"{name}_bucket", le=str(float(2**16))) == 3
    assert exporter.value(f"{name}_bucket", le=str(float(SESSION_BYTES_BUCKETS[-1]))) == 3
    assert exporter.value(f"{name}_bucket", le="+Inf") == exporter.value(f"{name}_count") == 4
    assert exporter.value(f"{name}_sum") == 100 + 2**16 + 2**40 + 80


def test_a_cluster_without_sessions_or_budget() -> None:
    exporter = Exporter(node_metrics([NodeView("one")], 0, {}, 0), node_metrics([], 0, {}, 0))
    assert exporter.value("phi_kv_cache_usage_perc", node="one") == 0
    assert "phi_session_kv_cache_bytes" in Exporter(node_metrics([], 0, {}, 0)).text()


def test_what_engines_count() -> None:
    metrics = RequestMetrics()
    for accepted in (2, 2, 5):
        metrics.on_totals({"num_preemptions": 1, "num_draft_tokens": 8, "num_accepted_tokens": accepted})
    exporter = merged(metrics.snapshot())
    assert exporter.value("phi_num_preemptions_total") == 1
    assert exporter.value("phi_spec_decode_num_draft_tokens_total") == 8
    assert exporter.value("phi_spec_decode_num_accepted_tokens_total") == 5


def test_every_token_of_a_step_is_counted() -> None:
    metrics = RequestMetrics()
    metrics.on_token("chat", 3, 0.06)
    metrics.on_token("chat", 1, 0.05)
    exporter = merged(metrics.snapshot())
    assert exporter.value("phi_inter_token_latency_seconds_count") == 4
    assert exporter.value("phi_inter_token_latency_seconds_sum") == pytest.approx(0.11)


def test_renewed_engines_are_counted_by_why() -> None:
    metrics = RequestMetrics()
    for recycles in ({}, {"max_age": 1}, {"max_age": 1, "leak": 2}):
        metrics.on_engine(0, {}, 0, recycles)
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    counted = {s.labels["reason"]: s.value for s in samples if s.name == "phi_engine_recycles_total"}
    assert counted == {"max_age": 1, "leak": 2}
