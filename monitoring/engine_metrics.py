"""What a replica counts of its engines, and the view of each replica's engine that the controller exports.

Owns: these families, named as vLLM's with our prefix where they are the same. Knows nothing of processes, sockets or
of who decides what. All times in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from phi_cluster.monitoring.recovery_metrics import RecoveryMetrics
from phi_cluster.monitoring.request_metrics import LATENCY_BUCKETS
from phi_cluster.monitoring.snapshots import RaisedCounter

_STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_STEP_TOKENS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
_LOSSES = ("death", "hang", "fault")


class EngineMetrics:
    """Implements engine_client.EngineObserver. `recycle_reasons`: why an engine may be renewed."""

    def __init__(self, registry: CollectorRegistry, recycle_reasons: Iterable[str] = ()) -> None:
        self._recoveries = RecoveryMetrics(registry, {"engine": _LOSSES, "standby_engine": _LOSSES})
        recycles = Counter(
            "phi_engine_recycles", "Engines renewed by policy or on request.", ["reason"], registry=registry
        )
        self._recycles = RaisedCounter(recycles)
        for reason in recycle_reasons:
            recycles.labels(reason)
        self._standbys = Gauge("phi_standby_engines", "Engines that are up and wait to take over.", registry=registry)
        self._totals = {
            name: RaisedCounter(Counter(f"phi_{metric}", text, registry=registry))
            for name, metric, text in (
                ("num_preemptions", "num_preemptions", "Sequences whose memory was taken from them for others."),
                ("num_draft_tokens", "spec_decode_num_draft_tokens", "Guesses that were computed."),
                ("num_accepted_tokens", "spec_decode_num_accepted_tokens", "Guesses that were right."),
            )
        }
        self._queue = Histogram(
            "phi_request_queue_time_seconds",
            "From a sequence's coming to the engine to its first step.",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._step = Histogram("phi_step_seconds", "Time of a step.", buckets=_STEP_BUCKETS, registry=registry)
        self._batch = Histogram(
            "phi_step_batch_size", "Sequences computed in a step.", buckets=_BATCH_BUCKETS, registry=registry
        )
        self._tokens = Histogram(
            "phi_iteration_tokens_total",
            "Tokens computed in a step, of prompts and replies.",
            buckets=_STEP_TOKENS_BUCKETS,
            registry=registry,
        )

    def on_step(self, num_seqs: int, num_tokens: int, seconds: float) -> None:
        self._step.observe(seconds)
        self._batch.observe(num_seqs)
        self._tokens.observe(num_tokens)

    def on_scheduled(self, queue_seconds: float) -> None:
        self._queue.observe(queue_seconds)

    def on_recovered(self, seconds: float) -> None:
        self._recoveries.recovered("engine", seconds)

    def on_engines(
        self, recoveries: Mapping[str, Mapping[str, int]], num_standbys: int, recycles: Mapping[str, int]
    ) -> None:
        """How often each component was lost so far, by how, how many engines stand by, and how often the engine was
        renewed so far, by why."""
        self._standbys.set(num_standbys)
        for component, counts in recoveries.items():
            self._recoveries.have_lost(component, counts)
        for reason, count in recycles.items():
            self._recycles.to(count, reason)

    def on_totals(self, totals: Mapping[str, int]) -> None:
        """What this replica's engines have counted so far, by the names in messages.EngineTotals."""
        for name, total in totals.items():
            self._totals[name].to(total)


@dataclass(frozen=True)
class EngineView:
    """The engine of a replica at one moment; `replica` is a small number that a later replica may have again. Private
    memory in bytes, `baseline_nbytes` what the process took in its first minute; `mapped_nbytes` of the node's weights
    are in its page tables, `copied_nbytes` of them not shared."""

    node: str
    replica: str
    age_seconds: float
    last_step_seconds: float
    queue_seconds: float
    private_nbytes: int
    baseline_nbytes: int
    mapped_nbytes: int = 0
    copied_nbytes: int = 0


def engine_metrics(engines: Iterable[EngineView]) -> Iterator[Metric]:
    """Families of engines that serve now."""
    labels = ["node", "replica"]
    gauges = {
        "age_seconds": GaugeMetricFamily("phi_engine_age_seconds", "For how long it has served.", labels=labels),
        "last_step_seconds": GaugeMetricFamily(
            "phi_engine_last_step_age_seconds",
            "Time since its last step; it steps every few seconds also when idle.",
            labels=labels,
        ),
        "queue_seconds": GaugeMetricFamily(
            "phi_engine_queue_age_seconds",
            "For how long the oldest sequence that has not been computed yet has waited in it.",
            labels=labels,
        ),
        "private_nbytes": GaugeMetricFamily("phi_engine_private_bytes", "Its private memory.", labels=labels),
        "baseline_nbytes": GaugeMetricFamily(
            "phi_engine_private_baseline_bytes", "The most of it in its first minute.", labels=labels
        ),
        "mapped_nbytes": GaugeMetricFamily(
            "phi_engine_weights_mapped_bytes",
            "Pages of the node's shared weights that are in its page tables (smaps, looked at each half minute).",
            labels=labels,
        ),
        "copied_nbytes": GaugeMetricFamily(
            "phi_engine_weights_copied_bytes", "Those of them that it does not share: copies.", labels=labels
        ),
    }
    for engine in engines:
        for name, gauge in gauges.items():
            gauge.add_metric([engine.node, engine.replica], getattr(engine, name))
    yield from gauges.values()
