"""What a replica counts of its requests, engines and commits, and the views of engines that serve."""

from __future__ import annotations

import pytest

from phi_cluster.monitoring.engine_metrics import EngineView, engine_metrics
from phi_cluster.monitoring.replica_metrics import ReplicaMetrics
from phi_cluster.monitoring.snapshots import merge_snapshots


def served(*requests, open_requests: int = 0) -> ReplicaMetrics:
    """A replica that has served these: outcome, prompt, cached and generated tokens."""
    metrics = ReplicaMetrics(["leak", "max_age"])
    for outcome, prompt, cached, generated in requests:
        metrics.requests.on_start("chat")
        metrics.requests.on_first_token("chat", 0.02)
        metrics.requests.on_token("chat", 2, 0.06)
        metrics.requests.on_finish("chat", outcome, 1.5, prompt, cached, generated)
    for _ in range(open_requests):
        metrics.requests.on_start("completions")
    return metrics


@pytest.fixture
def merged(exported):
    return lambda *snapshots: exported(merge_snapshots(snapshots))


def test_what_requests_count(merged):
    metrics = served(("stop", 10, 4, 3), ("length", 20, 0, 7), ("abort", 0, 0, 0), open_requests=3)
    out = merged(metrics.snapshot(num_running=2))
    assert out.values("phi_request_success_total") == {("stop",): 1, ("length",): 1, ("abort",): 1, ("error",): 0}
    assert out.value("phi_prompt_tokens_total") == 30
    assert out.value("phi_cached_prompt_tokens_total") == 4
    assert out.value("phi_generation_tokens_total") == 10
    assert out.value("phi_num_requests_running") == 2
    assert out.value("phi_num_requests_waiting") == 1
    assert out.value("phi_time_to_first_token_seconds_sum") == pytest.approx(0.06)
    # Both tokens of an event count.
    assert out.value("phi_inter_token_latency_seconds_count") == 6
    assert out.value("phi_inter_token_latency_seconds_sum") == pytest.approx(0.18)
    assert out.value("phi_e2e_request_latency_seconds_sum") == 4.5
    # One that never started has no size.
    assert out.value("phi_request_prompt_tokens_count") == out.value("phi_request_generation_tokens_count") == 2
    assert out.value("phi_request_prompt_tokens_sum") == 30
    # The engine may run more than is open here for a moment: nothing is negative.
    assert merged(metrics.snapshot(num_running=9)).value("phi_num_requests_waiting") == 0


def test_errors_by_status_and_code_and_never_too_many(merged):
    metrics = served()
    metrics.requests.on_error(429, "overloaded")
    metrics.requests.on_error(400, None)
    metrics.requests.on_error(500, None)
    out = merged(metrics.snapshot(0))
    assert out.value("phi_request_errors_total", status="429", code="overloaded") == 1
    assert out.value("phi_request_errors_total", status="400", code="invalid_request") == 1
    assert out.value("phi_request_errors_total", status="500", code="internal_error") == 1
    for number in range(200):
        metrics.requests.on_error(400, f"made_up_{number}")
    out = merged(metrics.snapshot(0))
    assert len(out.values("phi_request_errors_total")) < 70
    assert sum(out.values("phi_request_errors_total").values()) == 203
    assert out.value("phi_request_errors_total", status="400", code="other") > 100


def test_two_replicas_in_a_process_share_nothing(merged):
    one, other = served(("stop", 10, 4, 3)), served()
    assert merged(one.snapshot(0)).value("phi_prompt_tokens_total") == 10
    assert merged(other.snapshot(0)).value("phi_prompt_tokens_total") == 0


def test_steps_and_waiting_in_the_engine(merged):
    metrics = served()
    for num_seqs, num_tokens, seconds in ((1, 200, 0.3), (8, 8, 0.03)):
        metrics.engines.on_step(num_seqs, num_tokens, seconds)
    metrics.engines.on_scheduled(0.2)
    out = merged(metrics.snapshot(0))
    assert out.value("phi_step_seconds_count") == 2
    assert out.value("phi_step_seconds_sum") == pytest.approx(0.33)
    assert out.value("phi_step_batch_size_sum") == 9
    assert out.value("phi_iteration_tokens_total_sum") == 208
    assert out.value("phi_iteration_tokens_total_bucket", le="8.0") == 1
    assert out.value("phi_request_queue_time_seconds_sum") == 0.2


def test_losses_are_there_before_the_first_and_counted_once(merged):
    metrics = served()
    assert merged(metrics.snapshot(0)).value("phi_recoveries_total", component="engine", reason="hang") == 0
    for deaths, hangs in ((0, 0), (1, 0), (1, 0), (3, 1), (3, 1)):
        metrics.engines.on_engines({"engine": {"death": deaths, "hang": hangs}, "standby_engine": {}}, 1, {})
    metrics.engines.on_recovered(0.15)
    out = merged(metrics.snapshot(0))
    assert out.value("phi_recoveries_total", component="engine", reason="death") == 3
    assert out.value("phi_recoveries_total", component="engine", reason="hang") == 1
    assert out.value("phi_recoveries_total", component="standby_engine", reason="death") == 0
    assert out.value("phi_recovery_seconds_sum", component="engine") == 0.15
    assert out.value("phi_standby_engines") == 1


def test_renewed_engines_by_why(merged):
    metrics = served()
    for recycles in ({}, {"max_age": 1}, {"max_age": 1, "leak": 2}):
        metrics.engines.on_engines({}, 0, recycles)
    assert merged(metrics.snapshot(0)).values("phi_engine_recycles_total") == {("leak",): 2, ("max_age",): 1}


def test_what_engines_count(merged):
    metrics = served()
    for accepted in (2, 2, 5):
        metrics.engines.on_totals({"num_preemptions": 1, "num_draft_tokens": 8, "num_accepted_tokens": accepted})
    out = merged(metrics.snapshot(0))
    assert out.value("phi_num_preemptions_total") == 1
    assert out.value("phi_spec_decode_num_draft_tokens_total") == 8
    assert out.value("phi_spec_decode_num_accepted_tokens_total") == 5


def test_journals(merged):
    metrics = served()
    metrics.journals.on_begin(0.0004)
    metrics.journals.on_commit(0.0007, 300)
    metrics.journals.on_commit(0.3, 5000)
    out = merged(metrics.snapshot(0))
    assert out.value("phi_journal_commit_seconds_bucket", le="0.001") == 1
    assert out.value("phi_journal_commit_seconds_count") == 2
    assert out.value("phi_journal_commit_bytes_sum") == 5300
    assert out.value("phi_journal_begin_seconds_bucket", le="0.0005") == 1


def test_engines_that_serve_by_node_and_replica(exported):
    views = [EngineView("n", "0", 60.0, 0.5, 0.0, 300, 200, 190, 4), EngineView("n", "1", 5.0, 2.0, 1.5, 250, 250)]
    out = exported(engine_metrics(views))
    assert out.values("phi_engine_age_seconds") == {("n", "0"): 60, ("n", "1"): 5}
    assert out.value("phi_engine_last_step_age_seconds", node="n", replica="1") == 2
    assert out.value("phi_engine_queue_age_seconds", node="n", replica="1") == 1.5
    assert out.value("phi_engine_private_bytes", node="n", replica="0") == 300
    assert out.value("phi_engine_private_baseline_bytes", node="n", replica="0") == 200
    assert out.values("phi_engine_weights_mapped_bytes") == {("n", "0"): 190, ("n", "1"): 0}
    assert out.value("phi_engine_weights_copied_bytes", node="n", replica="0") == 4
    assert exported(engine_metrics([])).values("phi_engine_age_seconds") == {}
