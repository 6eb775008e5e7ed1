"""Sessions and their memory: what a keeper counts, and the view of each node that the controller exports.

Owns: these families. Knows nothing of where the numbers come from. Never a session's id in a label; all bytes exact.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from phi_cluster.monitoring.recovery_metrics import RecoveryMetrics
from phi_cluster.monitoring.snapshots import FamilySnapshot, snapshot_of

SESSION_BYTES_BUCKETS = (2**16, 2**18, 2**20, 2**22, 2**24, 2**26, 2**28, 2**30, 2**32)
SESSION_TOKENS_BUCKETS = (16, 64, 256, 1024, 4096, 16384, 65536, 131072)
_DISK_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_COMMIT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_COMMIT_BYTES_BUCKETS = (2**8, 2**10, 2**12, 2**14, 2**16, 2**18, 2**20)


class SessionMetrics:
    """What a keeper measures. `deactivation_reasons`: why a session may be given back; `move_results`: what may become
    of a session that is to move to, or away from, its node."""

    def __init__(self, deactivation_reasons: Iterable[str] = (), move_results: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self.recoveries = RecoveryMetrics(self.registry, {"session_actor": ("death", "hang")})
        self._deactivations = Counter(
            "phi_session_deactivations",
            "Session actors given back to the keeper, by reason (they are recycles too).",
            ["reason"],
            registry=self.registry,
        )
        for reason in deactivation_reasons:
            self._deactivations.labels(reason)
        self._moves = Counter(
            "phi_session_moves",
            "Sessions that were to move here from another node, and those that a node that is given up left behind.",
            ["result"],
            registry=self.registry,
        )
        for result in move_results:
            self._moves.labels(result)
        self._move_bytes = Counter(
            "phi_session_move_bytes", "Keys, values and ids that came here from other nodes.", registry=self.registry
        )
        self._move = Histogram(
            "phi_session_move_seconds",
            "Time in which a session moved here.",
            buckets=_DISK_BUCKETS,
            registry=self.registry,
        )
        self._hibernation = Histogram(
            "phi_session_hibernation_seconds",
            "Time in which a cache was written to the disk.",
            buckets=_DISK_BUCKETS,
            registry=self.registry,
        )
        self._restore = Histogram(
            "phi_session_restore_seconds",
            "Time in which a hibernated cache was read back.",
            buckets=_DISK_BUCKETS,
            registry=self.registry,
        )

    def on_deactivated(self, reason: str) -> None:
        self._deactivations.labels(reason).inc()

    def on_hibernated(self, seconds: float) -> None:
        self._hibernation.observe(seconds)

    def on_restored(self, seconds: float) -> None:
        self._restore.observe(seconds)

    def on_move(self, result: str) -> None:
        self._moves.labels(result).inc()

    def on_arrived(self, nbytes: int, seconds: float) -> None:
        """So much came with a session that moved here, in this time."""
        self._move_bytes.inc(nbytes)
        self._move.observe(seconds)

    def snapshot(self) -> list[FamilySnapshot]:
        return snapshot_of(self.registry.collect())


class JournalMetrics:
    """What a replica sees of the journals (implements session.directory's JournalObserver)."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._begin = Histogram(
            "phi_journal_begin_seconds",
            "Time in which a turn's epoch was taken durably and the stored ids were laid into its memory.",
            buckets=_COMMIT_BUCKETS,
            registry=registry,
        )
        self._seconds = Histogram(
            "phi_journal_commit_seconds",
            "Time in which a turn was recorded durably.",
            buckets=_COMMIT_BUCKETS,
            registry=registry,
        )
        self._bytes = Histogram(
            "phi_journal_commit_bytes",
            "Text and token ids of a recorded turn.",
            buckets=_COMMIT_BYTES_BUCKETS,
            registry=registry,
        )

    def on_begin(self, seconds: float) -> None:
        self._begin.observe(seconds)

    def on_commit(self, seconds: float, nbytes: int) -> None:
        self._seconds.observe(seconds)
        self._bytes.observe(nbytes)


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


def keeper_counters(activations: int, recycles: Mapping[str, int], counts: Mapping[str, int]) -> Iterator[Metric]:
    """A keeper's counters since it started; `counts`: of KEEPER_COUNTERS."""
    recycled = CounterMetricFamily(
        "phi_session_recycles", "Session actors renewed or given back, by reason.", labels=["reason"]
    )
    for reason, count in sorted(recycles.items()):
        recycled.add_metric([reason], count)
    yield recycled
    for name, (family, documentation) in KEEPER_COUNTERS.items():
        yield CounterMetricFamily(family, documentation, value=counts.get(name, 0))
    yield CounterMetricFamily("phi_session_activations", "Session actors that took a session over.", value=activations)


@dataclass(frozen=True)
class Distribution:
    """How many of some values lie at or below each bound, and their sum."""

    bounds: Sequence[int]
    counts: tuple[int, ...]
    total: int

    @classmethod
    def of(cls, values: Iterable[int], bounds: Sequence[int]) -> Distribution:
        counts, total = [0] * (len(bounds) + 1), 0
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        return cls(bounds, tuple(counts), total)


@dataclass
class NodeView:
    """A node's sessions and KV memory at one moment. `states` are session states; `report_age_seconds`: how long ago
    its keeper said so."""

    node: str
    kv_bytes_by_state: dict[str, int] = field(default_factory=dict)
    sessions_by_state: dict[str, int] = field(default_factory=dict)
    session_bytes: Distribution = field(default_factory=lambda: Distribution.of((), SESSION_BYTES_BUCKETS))
    session_tokens: Distribution = field(default_factory=lambda: Distribution.of((), SESSION_TOKENS_BUCKETS))
    budget_bytes: int = 0
    reserved_bytes: int = 0
    hibernated_bytes: int = 0
    journal_bytes: int = 0
    warm_actors: int = 0
    report_age_seconds: float = 0.0


def node_metrics(nodes: Sequence[NodeView]) -> Iterator[Metric]:
    """Families of all nodes that there are now."""
    kv_bytes = GaugeMetricFamily(
        "phi_kv_cache_bytes", "Memory of all KV segments, in bytes (exact).", labels=["node", "state"]
    )
    sessions = GaugeMetricFamily("phi_sessions", "Sessions by state.", labels=["node", "state"])
    usage = GaugeMetricFamily(
        "phi_kv_cache_usage_perc", "Share of the KV budget that is in use or leased (1 is all).", labels=["node"]
    )
    plain = {
        "budget_bytes": ("phi_kv_cache_budget_bytes", "KV budget of the node, in bytes."),
        "reserved_bytes": ("phi_kv_cache_leased_bytes", "KV memory that is leased to sessions, in bytes."),
        "hibernated_bytes": ("phi_hibernated_bytes", "Disk that hibernated caches take, in bytes."),
        "journal_bytes": ("phi_journal_bytes", "Disk that journals take, in bytes (looked at now and then)."),
        "warm_actors": ("phi_warm_session_actors", "Session actors that are up and have no session yet."),
        "report_age_seconds": ("phi_node_report_age_seconds", "Time since the node's keeper last reported."),
    }
    gauges = {name: GaugeMetricFamily(metric, text, labels=["node"]) for name, (metric, text) in plain.items()}
    for node in nodes:
        for state, nbytes in sorted(node.kv_bytes_by_state.items()):
            kv_bytes.add_metric([node.node, state], nbytes)
        for state, count in sorted(node.sessions_by_state.items()):
            sessions.add_metric([node.node, state], count)
        used = max(node.reserved_bytes, sum(node.kv_bytes_by_state.values()))
        usage.add_metric([node.node], used / node.budget_bytes if node.budget_bytes else 0.0)
        for name, gauge in gauges.items():
            gauge.add_metric([node.node], getattr(node, name))
    yield from (kv_bytes, sessions, usage, *gauges.values())
    yield GaugeMetricFamily("phi_nodes", "Nodes whose keeper has reported and that are alive.", value=len(nodes))
    yield _histogram(
        "phi_session_kv_cache_bytes",
        "KV bytes of each session, over sessions in memory now.",
        SESSION_BYTES_BUCKETS,
        [node.session_bytes for node in nodes],
    )
    yield _histogram(
        "phi_session_tokens",
        "Tokens of each session, over sessions in memory now.",
        SESSION_TOKENS_BUCKETS,
        [node.session_tokens for node in nodes],
    )


def _histogram(
    name: str, documentation: str, bounds: Sequence[int], distributions: Sequence[Distribution]
) -> HistogramMetricFamily:
    buckets: list[tuple[str, float]] = []
    so_far = 0
    for place, bound in enumerate([*map(float, bounds), float("inf")]):
        so_far += sum(one.counts[place] for one in distributions)
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(so_far)))
    family = HistogramMetricFamily(name, documentation)
    family.add_metric([], buckets=buckets, sum_value=float(sum(one.total for one in distributions)))
    return family
