"""Sessions and their memory, over nodes; keys by name; processes by kind."""

from __future__ import annotations

import pytest

from phi_cluster.monitoring.key_metrics import MAX_KEYS, KeyView, key_metrics
from phi_cluster.monitoring.process_metrics import build_info, process_metrics
from phi_cluster.monitoring.session_metrics import (
    SESSION_BYTES_BUCKETS,
    SESSION_TOKENS_BUCKETS,
    Distribution,
    NodeView,
    SessionMetrics,
    keeper_counters,
    node_metrics,
)
from phi_cluster.monitoring.snapshots import merge_snapshots

NODES = [
    NodeView(
        node="one",
        kv_bytes_by_state={"active": 300, "held": 100},
        sessions_by_state={"active": 2, "held": 1, "stored": 7},
        session_bytes=Distribution.of([100, 2**16, 2**40], SESSION_BYTES_BUCKETS),
        session_tokens=Distribution.of([5, 70, 70], SESSION_TOKENS_BUCKETS),
        budget_bytes=1000,
        reserved_bytes=500,
        journal_bytes=4096,
        report_age_seconds=0.5,
    ),
    NodeView(
        node="two",
        kv_bytes_by_state={"active": 80},
        budget_bytes=100,
        reserved_bytes=50,
        session_bytes=Distribution.of([80], SESSION_BYTES_BUCKETS),
    ),
]


def test_nodes_and_their_memory(exported):
    out = exported(node_metrics(NODES))
    assert out.value("phi_kv_cache_bytes", node="one", state="active") == 300
    assert out.value("phi_kv_cache_bytes", node="two", state="active") == 80
    assert out.value("phi_sessions", node="one", state="stored") == 7
    # What is leased or what is in use, whichever is more.
    assert out.values("phi_kv_cache_usage_perc") == {("one",): 0.5, ("two",): 0.8}
    assert out.value("phi_kv_cache_budget_bytes", node="two") == 100
    assert out.value("phi_kv_cache_leased_bytes", node="two") == 50
    assert out.value("phi_journal_bytes", node="one") == 4096
    assert out.value("phi_node_report_age_seconds", node="one") == 0.5
    assert out.value("phi_nodes") == 2


def test_sessions_by_their_size_over_all_nodes(exported):
    out = exported(node_metrics(NODES))
    name = "phi_session_kv_cache_bytes"
    assert out.value(f"{name}_bucket", le=str(float(2**16))) == 3
    assert out.value(f"{name}_bucket", le=str(float(SESSION_BYTES_BUCKETS[-1]))) == 3
    assert out.value(f"{name}_bucket", le="+Inf") == out.value(f"{name}_count") == 4
    assert out.value(f"{name}_sum") == 100 + 2**16 + 2**40 + 80
    assert out.value("phi_session_tokens_bucket", le="16.0") == 1
    assert out.value("phi_session_tokens_bucket", le="256.0") == out.value("phi_session_tokens_count") == 3


def test_a_cluster_without_sessions_budget_or_nodes(exported):
    assert exported(node_metrics([NodeView("one")])).value("phi_kv_cache_usage_perc", node="one") == 0
    assert exported(node_metrics([])).value("phi_session_kv_cache_bytes_count") == 0


def test_what_keepers_count(exported):
    out = exported(keeper_counters(4, {"idle": 2, "leak": 0}, {"forks": 3, "restored_bytes": 9}))
    assert out.value("phi_session_activations_total") == 4
    assert out.values("phi_session_recycles_total") == {("idle",): 2, ("leak",): 0}
    assert out.value("phi_session_forks_total") == 3
    assert out.value("phi_session_restores_bytes_total") == 9
    assert out.value("phi_session_hibernations_total") == 0


def test_what_keepers_measure(exported):
    metrics = SessionMetrics(["idle"], ["moved", "failed"])
    metrics.on_move("moved")
    metrics.on_arrived(1000, 0.5)
    metrics.on_deactivated("memory_pressure")
    metrics.on_hibernated(0.2)
    metrics.on_restored(0.01)
    metrics.on_restored(0.02)
    metrics.recoveries.lost("session_actor", "hang")
    metrics.recoveries.recovered("session_actor", 0.05)
    out = exported(merge_snapshots([metrics.snapshot()]))
    assert out.values("phi_session_deactivations_total") == {("idle",): 0, ("memory_pressure",): 1}
    assert out.values("phi_session_moves_total") == {("moved",): 1, ("failed",): 0}
    assert out.value("phi_session_move_bytes_total") == 1000
    assert out.value("phi_session_move_seconds_sum") == 0.5
    assert out.value("phi_session_hibernation_seconds_sum") == 0.2
    assert out.value("phi_session_restore_seconds_count") == 2
    assert out.value("phi_recoveries_total", component="session_actor", reason="hang") == 1
    assert out.value("phi_recoveries_total", component="session_actor", reason="death") == 0
    assert out.value("phi_recovery_seconds_sum", component="session_actor") == 0.05


def test_keys_are_summed_over_nodes_by_name(exported):
    views = [
        KeyView("bob", 1, 0, {"prompt": 5}),
        KeyView("alice", 2, 1, {"prompt": 7, "cached": 3}, kv_bytes=100),
        KeyView("alice", 3, 1, {"prompt": 1, "generation": 4}, kv_bytes=20),
    ]
    out = exported(key_metrics(views))
    assert out.value("phi_key_requests_total", key="alice") == 5
    assert out.value("phi_key_refused_requests_total", key="alice") == 2
    assert out.value("phi_key_tokens_total", key="alice", kind="prompt") == 8
    assert out.value("phi_key_tokens_total", key="alice", kind="generation") == 4
    assert out.value("phi_key_kv_cache_bytes", key="alice") == 120
    assert out.value("phi_key_requests_total", key="bob") == 1


@pytest.mark.parametrize("count", [MAX_KEYS, MAX_KEYS + 50])
def test_keys_are_at_most_a_hundred_names_and_the_others(exported, count):
    views = [KeyView(f"key{number:03}", 1 + number, 0, {}, since=float(number)) for number in range(count)]
    out = exported(key_metrics(reversed(views))).values("phi_key_requests_total")
    assert len(out) == min(count, MAX_KEYS + 1)
    assert sum(out.values()) == sum(view.requests for view in views)
    # Those that were there first keep their names, whatever the later ones use: a counter never becomes another's.
    assert out[("key000",)] == 1


def test_processes_by_kind(exported):
    each = [("n", "engine", 0), ("n", "engine", 200), ("n", "engine", 100), ("n", "standby_engine", 0)]
    out = exported(process_metrics(each, 270, 10.0, 20.0), build_info({"version": "1", "isa": "AVX2"}))
    assert out.value("phi_process_private_bytes", node="n", kind="engine") == 300
    assert out.value("phi_processes", node="n", kind="engine") == 2
    assert out.value("phi_process_private_bytes", node="n", kind="standby_engine") == 0
    assert out.value("phi_weights_bytes") == 270
    assert (out.value("phi_server_start_time_seconds"), out.value("phi_controller_start_time_seconds")) == (10, 20)
    assert out.value("phi_build_info", version="1", isa="AVX2") == 1
