"""Every metric, declared once: name, unit, help, labels.

Owns: the declarations, the replica's request metrics (they travel to the controller as snapshots and are summed
there) and the view of sessions and KV memory that the controller exports. Names are vLLM's with our prefix where the
thing is the same. Knows nothing of Ray, HTTP or where numbers come from. Never a session id in a label.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
SESSION_BYTES_BUCKETS = (2**16, 2**18, 2**20, 2**22, 2**24, 2**26, 2**28, 2**30, 2**32)

# (name, type, help, samples); a sample is (name, labels, value).
FamilySnapshot: TypeAlias = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]


class RequestMetrics:
    """What a replica counts. Implements turn_api.RequestObserver; all times in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._success = Counter(
            "phi_request_success",
            "Requests that ended, by how (stop, length, abort, error).",
            ["finish_reason"],
            registry=self.registry,
        )
        self._running = Gauge("phi_num_requests_running", "Sequences running in an engine.", registry=self.registry)
        self._waiting = Gauge(
            "phi_num_requests_waiting", "Requests not running in an engine yet.", registry=self.registry
        )
        self._time_to_first_token = Histogram(
            "phi_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._inter_token = Histogram(
            "phi_inter_token_latency_seconds",
            "Between two tokens of a reply.",
            buckets=_TOKEN_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._end_to_end = Histogram(
            "phi_e2e_request_latency_seconds",
            "From the request to the end of its reply.",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._prompt_tokens = Counter(
            "phi_prompt_tokens", "Tokens of prompts, cached ones included.", registry=self.registry
        )
        self._cached_tokens = Counter(
            "phi_cached_prompt_tokens",
            "Tokens of prompts that the session's own cache saved.",
            registry=self.registry,
        )
        self._generation_tokens = Counter("phi_generation_tokens", "Generated tokens.", registry=self.registry)
        self._recoveries = Counter(
            "phi_recoveries",
            "Components that were lost and replaced, by what was wrong (death, hang, fault).",
            ["component", "reason"],
            registry=self.registry,
        )
        self._engine_recycles = Counter(
            "phi_engine_recycles", "Engines renewed by policy or on request.", ["reason"], registry=self.registry
        )
        self._standbys = Gauge(
            "phi_standby_engines", "Engines that are up and wait to take over.", registry=self.registry
        )
        self._engine_totals = {
            name: Counter(f"phi_{metric}", text, registry=self.registry)
            for name, metric, text in (
                ("num_preemptions", "num_preemptions", "Sequences whose memory was taken from them for others."),
                ("num_draft_tokens", "spec_decode_num_draft_tokens", "Guesses that were computed."),
                ("num_accepted_tokens", "spec_decode_num_accepted_tokens", "Guesses that were right."),
            )
        }
        self._open = 0
        self._engine_running = 0
        self._totals: dict[tuple[str, str], int] = {}

    def on_start(self, endpoint: str) -> None:
        self._open += 1

    def on_first_token(self, endpoint: str, seconds: float) -> None:
        self._time_to_first_token.observe(seconds)

    def on_token(self, endpoint: str, num_tokens: int, seconds: float) -> None:
        # Each token counts, also where a step brought several.
        for _ in range(num_tokens):
            self._inter_token.observe(seconds / num_tokens)

    def on_finish(
        self,
        endpoint: str,
        outcome: str,
        seconds: float,
        num_prompt_tokens: int,
        num_cached_tokens: int,
        num_completion_tokens: int,
    ) -> None:
        self._open -= 1
        self._success.labels(outcome).inc()
        self._end_to_end.observe(seconds)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._cached_tokens.inc(num_cached_tokens)
        self._generation_tokens.inc(num_completion_tokens)

    def on_engine(
        self,
        num_running: int,
        recoveries: Mapping[str, Mapping[str, int]],
        num_standbys: int,
        recycles: Mapping[str, int],
    ) -> None:
        """The engine's state now: running sequences, how often each component was lost so far, by how, how many
        engines stand by, and how often the engine was renewed, by why."""
        self._engine_running = num_running
        self._standbys.set(num_standbys)
        for component, counts in recoveries.items():
            for reason, count in counts.items():
                self._raise_to(self._recoveries.labels(component, reason), (component, reason), count)
        for reason, count in recycles.items():
            self._raise_to(self._engine_recycles.labels(reason), ("recycled", reason), count)

    def on_totals(self, totals: Mapping[str, int]) -> None:
        """What this replica's engines have counted so far, by the names in messages.EngineTotals."""
        for name, total in totals.items():
            self._raise_to(self._engine_totals[name], ("engine", name), total)

    def _raise_to(self, counter: Counter, name: tuple[str, str], total: int) -> None:
        """A counter whose total is counted elsewhere."""
        before = self._totals.get(name, 0)
        counter.inc(max(total - before, 0))
        self._totals[name] = max(total, before)

    def snapshot(self) -> list[FamilySnapshot]:
        """All families with their samples, picklable."""
        self._running.set(self._engine_running)
        self._waiting.set(max(self._open - self._engine_running, 0))
        return snapshot_of(self.registry.collect())


def snapshot_of(families: Iterable[Metric]) -> list[FamilySnapshot]:
    """Families with their samples, picklable."""
    return [
        (
            family.name,
            family.type,
            family.documentation,
            [(s.name, s.labels, s.value) for s in family.samples if not s.name.endswith("_created")],
        )
        for family in families
    ]


def merge_snapshots(snapshots: Iterable[list[FamilySnapshot]]) -> Iterator[Metric]:
    """Sums samples of the same name and labels over replicas."""
    families: dict[str, tuple[str, str, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    for snapshot in snapshots:
        for name, kind, documentation, samples in snapshot:
            sums = families.setdefault(name, (kind, documentation, {}))[2]
            for sample_name, labels, value in samples:
                key = (sample_name, tuple(sorted(labels.items())))
                sums[key] = sums.get(key, 0.0) + value
    for name, (kind, documentation, sums) in families.items():
        metric = Metric(name, documentation, kind)
        for (sample_name, pairs), total in sums.items():
            metric.add_sample(sample_name, dict(pairs), total)
        yield metric


def without_gauges(snapshot: list[FamilySnapshot]) -> list[FamilySnapshot]:
    """What remains of a replica that is gone: its counters and histograms."""
    return [family for family in snapshot if family[1] != "gauge"]


@dataclass
class NodeView:
    """A node's sessions and KV memory at one moment, all bytes exact. `states` are session states."""

    node: str
    kv_bytes_by_state: dict[str, int] = field(default_factory=dict)
    sessions_by_state: dict[str, int] = field(default_factory=dict)
    session_bytes: list[int] = field(default_factory=list)
    budget_bytes: int = 0
    reserved_bytes: int = 0
    hibernated_bytes: int = 0
    private_bytes_by_kind: dict[str, int] = field(default_factory=dict)


# What keepers count, by the name in their reports: family and help.
KEEPER_COUNTERS = {
    "forks": ("phi_session_forks", "Sessions made of others."),
    "deletions": ("phi_session_retention_deletions", "Sessions deleted because nobody used them for long."),
    "hibernations": ("phi_session_hibernations", "Caches of idle sessions written to the disk."),
    "hibernated_bytes": ("phi_session_hibernations_bytes", "Bytes written for them."),
    "restores": ("phi_session_restores", "Hibernated caches read back into memory."),
    "restored_bytes": ("phi_session_restores_bytes", "Bytes read for them."),
    "hibernation_failures": (
        "phi_session_hibernation_failures",
        "Caches that could not be written, or were not what was written: computed anew.",
    ),
}


def node_metrics(
    nodes: list[NodeView],
    activations: int,
    recycles: dict[str, int],
    weights_nbytes: int,
    counts: Mapping[str, int] | None = None,
) -> Iterator[Metric]:
    """The controller's own families. `counts`: of KEEPER_COUNTERS, over all keepers."""
    kv_bytes = GaugeMetricFamily(
        "phi_kv_cache_bytes", "Memory of all KV segments, in bytes (exact).", labels=["node", "state"]
    )
    usage = GaugeMetricFamily(
        "phi_kv_cache_usage_perc", "Share of the KV budget that is in use or leased (1 is all).", labels=["node"]
    )
    budget = GaugeMetricFamily("phi_kv_cache_budget_bytes", "KV budget of the node, in bytes.", labels=["node"])
    hibernated = GaugeMetricFamily(
        "phi_hibernated_bytes", "Disk that hibernated caches take, in bytes.", labels=["node"]
    )
    sessions = GaugeMetricFamily("phi_sessions", "Sessions by state.", labels=["node", "state"])
    private = GaugeMetricFamily(
        "phi_process_private_bytes", "Private memory (RssAnon + swap) by process kind.", labels=["node", "kind"]
    )
    for node in nodes:
        for state, nbytes in sorted(node.kv_bytes_by_state.items()):
            kv_bytes.add_metric([node.node, state], nbytes)
        for state, count in sorted(node.sessions_by_state.items()):
            sessions.add_metric([node.node, state], count)
        for kind, nbytes in sorted(node.private_bytes_by_kind.items()):
            private.add_metric([node.node, kind], nbytes)
        used = max(node.reserved_bytes, sum(node.kv_bytes_by_state.values()))
        usage.add_metric([node.node], used / node.budget_bytes if node.budget_bytes else 0.0)
        budget.add_metric([node.node], node.budget_bytes)
        hibernated.add_metric([node.node], node.hibernated_bytes)
    recycled = CounterMetricFamily(
        "phi_session_recycles", "Session actors renewed or given back, by reason.", labels=["reason"]
    )
    for reason, count in sorted(recycles.items()):
        recycled.add_metric([reason], count)
    yield from (kv_bytes, usage, budget, hibernated, sessions, private, recycled)
    yield _bytes_histogram([nbytes for node in nodes for nbytes in node.session_bytes])
    for name, (family, documentation) in KEEPER_COUNTERS.items():
        yield CounterMetricFamily(family, documentation, value=(counts or {}).get(name, 0))
    yield CounterMetricFamily("phi_session_activations", "Session actors that took a session over.", value=activations)
    yield GaugeMetricFamily("phi_weights_bytes", "Weights in the object store, in bytes a node.", value=weights_nbytes)


def _bytes_histogram(values: list[int]) -> HistogramMetricFamily:
    buckets = [(str(float(bound)), float(sum(v <= bound for v in values))) for bound in SESSION_BYTES_BUCKETS]
    buckets.append(("+Inf", float(len(values))))
    family = HistogramMetricFamily("phi_session_kv_cache_bytes", "KV bytes of each session, over sessions now.")
    family.add_metric([], buckets=buckets, sum_value=float(sum(values)))
    return family
