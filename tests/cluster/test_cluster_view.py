"""What the controller exports: one declaration each, the latest of everybody, and counters that never go back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from phi_cluster.cluster.cluster_view import ClusterView
from phi_cluster.cluster.engine_recycler import EngineReport
from phi_cluster.cluster.messages import ProcessId, SessionKey
from phi_cluster.cluster.replica_report import ReplicaReport
from phi_cluster.cluster.session.accounts import UsageTotals
from phi_cluster.cluster.session.reports import KeeperReport, SessionReport
from phi_cluster.cluster.session.session import SessionStats
from phi_cluster.monitoring.replica_metrics import ReplicaMetrics
from phi_cluster.monitoring.session_metrics import SessionMetrics

# What dashboards, rules and users rely on.
PROMISED = """
phi_build_info phi_cached_prompt_tokens_total phi_controller_start_time_seconds phi_e2e_request_latency_seconds
phi_engine_age_seconds phi_engine_last_step_age_seconds phi_engine_private_baseline_bytes phi_engine_private_bytes
phi_engine_queue_age_seconds phi_engine_recycles_total phi_generation_tokens_total phi_hibernated_bytes
phi_inter_token_latency_seconds phi_iteration_tokens_total phi_journal_begin_seconds phi_journal_bytes
phi_journal_commit_bytes
phi_journal_commit_seconds phi_kv_cache_budget_bytes phi_kv_cache_bytes phi_kv_cache_leased_bytes
phi_kv_cache_usage_perc phi_node_report_age_seconds phi_nodes phi_num_preemptions_total phi_num_requests_running
phi_num_requests_waiting phi_process_private_bytes phi_processes phi_prompt_tokens_total phi_recoveries_total
phi_recovery_seconds phi_request_errors_total phi_request_generation_tokens phi_request_prompt_tokens
phi_request_queue_time_seconds phi_request_success_total phi_server_start_time_seconds phi_session_activations_total
phi_session_deactivations_total phi_session_forks_total phi_session_hibernation_seconds phi_session_hibernations_total
phi_session_hibernations_bytes_total phi_session_hibernation_failures_total phi_session_kv_cache_bytes
phi_session_move_bytes_total phi_session_move_seconds phi_session_moves_total phi_forwarded_turns_total
phi_session_recycles_total phi_session_restore_seconds phi_session_restores_bytes_total phi_session_restores_total
phi_session_retention_deletions_total phi_session_tokens phi_sessions phi_spec_decode_num_accepted_tokens_total
phi_spec_decode_num_draft_tokens_total phi_standby_engines phi_step_batch_size phi_step_seconds
phi_time_to_first_token_seconds phi_warm_session_actors phi_weights_bytes phi_engine_weights_mapped_bytes
phi_engine_weights_copied_bytes
phi_key_requests_total phi_key_refused_requests_total phi_key_tokens_total phi_key_kv_cache_bytes
"""

LABELS = {
    *("node", "state", "kind", "reason", "finish_reason", "component", "replica", "status", "code", "key", "le"),
    *("version", "torch", "isa", "model", "outcome"),
}


class World:
    """A clock, and reports of processes that count."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.view = self.controller()

    def controller(self) -> ClusterView:
        build = {"version": "1", "torch": "2", "isa": "AVX2", "model": "phi"}
        return ClusterView(1, 270, build, clock=lambda: self.now, wall_clock=lambda: self.now + 1e9)

    def collect(self) -> Iterator[Metric]:
        yield from self.view.families()

    def text(self) -> str:
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry).decode()

    def samples(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples().get((name, frozenset(labels.items())))

    def replica(self, name: str, prompt: int, engine: int | None = 100) -> None:
        metrics = ReplicaMetrics(["leak"])
        metrics.requests.on_start("chat")
        metrics.requests.on_finish("chat", "stop", 1.0, prompt, 0, 1)
        report = None if engine is None else EngineReport(engine, 9.0, 5, 200, 150)
        self.view.take_replica(
            ReplicaReport(name, "n" * 40, 7, 10.0, metrics.snapshot(1), 50, ((8, 30),), report, 0.5, 0.25)
        )

    def keeper(self, pid: int, activations: int, *sessions: SessionReport, hung: bool = False, **more: object) -> None:
        snapshot = SessionMetrics(["idle"]).snapshot()
        counts = {"forks": activations}
        usage = [UsageTotals("alice", 1.0, activations, 0, 5, 1, 2)]
        report = KeeperReport(
            "n" * 40, ProcessId(pid, 7), 1000, 500, list(sessions), 4995, 3, 2**20, 1, activations, {"idle": 1}, 60,
            counts, 4096, snapshot, usage,
        )  # fmt: skip
        self.view.take_keeper(report, hung=hung)


def session(name: str, nbytes: int, actor: int | None = None, tenant: str = "alice", ephemeral: bool = False):
    key = SessionKey(tenant, name, ephemeral)
    stats = SessionStats(key, "active", False, 0, 20, 19, nbytes, 1, 9.0, 1.0, 1, 0, 1, 9.0)
    return SessionReport(stats, actor, 45 if actor else 0, 40)


@pytest.fixture
def world() -> World:
    world = World()
    world.keeper(50, 2, session("a", 300, 11), session("b", 100), session("c", 10, ephemeral=True, tenant="other"))
    world.replica("first", 10)
    return world


def test_every_metric_is_declared_once_under_our_prefix(world):
    families = list(world.collect())
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    for family in families:
        assert family.name.startswith("phi_")
        assert family.documentation.endswith(".")
        assert family.documentation[0].isupper()


def test_all_that_is_promised_is_there_and_nothing_else(world):
    shown = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in world.collect()
    }  # fmt: skip
    assert shown == set(PROMISED.split())


def test_labels_are_few_and_never_name_a_session(world):
    found = {label for _, labels in world.samples() for label, _ in labels}
    assert found == LABELS


def test_sessions_and_memory(world):
    node = "n" * 12
    assert world.value("phi_kv_cache_bytes", node=node, state="active") == 300
    assert world.value("phi_kv_cache_bytes", node=node, state="held") == 100
    assert world.value("phi_kv_cache_bytes", node=node, state="ephemeral") == 10
    assert world.value("phi_sessions", node=node, state="stored") == 4995
    assert world.value("phi_sessions", node=node, state="hibernated") == 3
    assert world.value("phi_session_kv_cache_bytes_sum") == 410
    assert world.value("phi_key_kv_cache_bytes", key="alice") == 400
    assert world.value("phi_process_private_bytes", node=node, kind="session_actor") == 45
    assert world.value("phi_processes", node=node, kind="session_actor") == 1
    assert world.value("phi_process_private_bytes", node=node, kind="engine") == 200
    assert world.value("phi_process_private_bytes", node=node, kind="standby_engine") == 30
    assert (world.value("phi_process_private_bytes", node=node, kind="controller") or 0) > 10**6
    assert world.value("phi_engine_queue_age_seconds", node=node, replica="0") == 0.25


def test_two_scrapers_see_the_same(world):
    def without_own_memory() -> list[str]:
        return [line for line in world.text().splitlines() if 'kind="controller"' not in line]

    assert without_own_memory() == without_own_memory()


def test_a_scrape_does_not_look_at_sessions(world):
    """5,000 sessions in memory are as many samples as one."""
    before = len(world.samples())
    world.keeper(50, 2, *(session(str(number), 1000, number + 1 if number < 64 else None) for number in range(5000)))
    assert len(world.samples()) == before
    assert world.value("phi_session_kv_cache_bytes_count") == 5000
    assert world.value("phi_session_kv_cache_bytes_sum") == 5_000_000


def test_dead_processes_series_go_and_their_counts_stay(world):
    node = "n" * 12
    world.now += 6
    assert world.value("phi_engine_age_seconds", node=node, replica="0") is None
    assert world.value("phi_num_requests_running") is None
    assert world.value("phi_process_private_bytes", node=node, kind="replica") == 0
    assert world.value("phi_prompt_tokens_total") == 10
    world.replica("second", 5)
    # Its place is free again, so there are no more names than there were replicas at once.
    assert world.value("phi_engine_age_seconds", node=node, replica="0") == 9
    assert world.value("phi_prompt_tokens_total") == 15
    assert world.value("phi_recoveries_total", component="replica", reason="death") == 1
    assert world.value("phi_recovery_seconds_sum", component="replica") == 6
    world.now += 1000
    world.view.forget_silent()
    assert world.value("phi_prompt_tokens_total") == 15
    world.view.forget_node("n" * 40)
    assert world.value("phi_nodes") == 0
    assert world.value("phi_kv_cache_bytes", node=node, state="active") is None
    assert world.value("phi_session_activations_total") == 2


def test_a_replaced_keeper(world):
    world.now += 3
    world.keeper(51, 1)
    assert world.value("phi_session_activations_total") == 3
    assert world.value("phi_session_forks_total") == 3
    assert world.value("phi_session_recycles_total", reason="idle") == 2
    assert world.value("phi_recoveries_total", component="keeper", reason="death") == 1
    assert world.value("phi_recovery_seconds_sum", component="keeper") == 3
    world.keeper(52, 1, hung=True)
    assert world.value("phi_recoveries_total", component="keeper", reason="hang") == 1
    # What it has forgotten of its last seconds does not count anew.
    world.keeper(52, 0)
    assert world.value("phi_key_requests_total", key="alice") == 2


def counters(samples):
    endings = ("_total", "_count", "_sum", "_bucket")
    gauges = ("phi_session_kv_cache_bytes", "phi_session_tokens", "phi_key")
    return {key: n for key, n in samples.items() if key[0].endswith(endings) and not key[0].startswith(gauges)}


def test_a_new_controller_takes_no_counter_back(world):
    world.keeper(51, 1)
    world.now += 6
    world.replica("second", 5)
    before, packed = counters(world.samples()), world.view.pack()
    assert counters(world.samples()) == before
    world.now += 2
    world.view = world.controller()
    world.view.succeed(packed)
    after = counters(world.samples())
    assert {key: (n, after.get(key)) for key, n in before.items() if after.get(key, -1) < n} == {}
    assert world.value("phi_recoveries_total", component="controller", reason="death") == 1
    assert world.value("phi_recovery_seconds_sum", component="controller") == 2
    assert world.value("phi_server_start_time_seconds") == 1000 + 1e9
    assert world.value("phi_controller_start_time_seconds") == 1008 + 1e9
    # Everybody reports again: nothing counts twice, and nobody is taken for a replacement.
    world.replica("second", 5)
    world.keeper(51, 1)
    again = counters(world.samples())
    assert {key: (n, again.get(key)) for key, n in after.items() if again.get(key) != n} == {}
    # And so does the next one.
    packed = world.view.pack()
    world.view = world.controller()
    world.view.succeed(packed)
    assert world.value("phi_recoveries_total", component="controller", reason="death") == 2
    assert world.value("phi_recoveries_total", component="replica", reason="death") == 1


@pytest.mark.parametrize("data", [b"", b"what?", b"\x94\x01\x02\x03\x04", b"\x94\xa1x\x02\x03\xc4\x00"])
def test_what_no_controller_has_left_is_refused(world, data):
    with pytest.raises(ValueError, match="cannot be read"):
        world.controller().succeed(data)


def test_open_requests(world):
    assert world.view.num_open_requests() == 1
    world.now += 6
    assert world.view.num_open_requests() == 0
