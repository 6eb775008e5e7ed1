"""How fast the cluster has been lately: rates and percentiles of the last minutes, out of counters that only rise.

Owns: a sum of all counters every few seconds, and what lies between two of them. Knows nothing of who counts, and of
how it is shown. Percentiles are as exact as the histograms' buckets (interpolated within one, as Prometheus does it).
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from phi_cluster.monitoring.snapshots import FamilySnapshot

# By our name: the histogram that the metrics declare.
_HISTOGRAMS = {
    "ttft_seconds": "phi_time_to_first_token_seconds",
    "inter_token_seconds": "phi_inter_token_latency_seconds",
    "e2e_seconds": "phi_e2e_request_latency_seconds",
}
_COUNTERS = {
    "prompt_tokens": "phi_prompt_tokens_total",
    "cached_tokens": "phi_cached_prompt_tokens_total",
    "requests": "phi_request_success_total",
}
_OURS = {name: ours for ours, name in _COUNTERS.items()}
_OURS |= {f"{name}_bucket": ours for ours, name in _HISTOGRAMS.items()}
# Counted as they come, not at the end of a reply.
_GENERATED = ("phi_time_to_first_token_seconds_count", "phi_inter_token_latency_seconds_count")
_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass
class _Sums:
    """`buckets`: by our name and upper bound, how many were at most that."""

    at: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    buckets: dict[str, Counter[float]] = field(default_factory=lambda: {name: Counter() for name in _HISTOGRAMS})


class SpeedHistory:
    """`every` so many seconds a sum is kept, `keep` of them in all."""

    def __init__(self, every: float = 5.0, keep: int = 61):
        self._every = every
        self._sums: deque[_Sums] = deque(maxlen=keep)
        self._latest: _Sums | None = None

    def take(self, now: float, snapshots: Iterable[list[FamilySnapshot]]) -> None:
        """All counters at `now` (wall clock, seconds), of all that ever counted."""
        sums = _Sums(now)
        for snapshot in snapshots:
            for _, _, _, samples in snapshot:
                for name, labels, value in samples:
                    if name in _GENERATED:
                        sums.counts["generation_tokens"] += value  # type: ignore[assignment]
                    elif (ours := _OURS.get(name)) is not None:
                        if "le" in labels:
                            sums.buckets[ours][float(labels["le"])] += value  # type: ignore[assignment]
                        else:
                            sums.counts[ours] += value  # type: ignore[assignment]
        self._latest = sums
        if not self._sums or now - self._sums[-1].at >= self._every:
            self._sums.append(sums)

    def speeds(self, seconds: float) -> dict[str, Any]:
        """Rates a second and percentiles over about the last `seconds`; null where nothing happened."""
        if self._latest is None:
            return _between(_Sums(), _Sums())
        begin = next((one for one in self._sums if self._latest.at - one.at <= seconds), self._latest)
        return _between(begin, self._latest)

    def series(self) -> list[dict[str, Any]]:
        """The same from each kept sum to the next, oldest first; `time` is the end of it."""
        kept = list(self._sums)
        return [{"time": round(b.at, 3), **_between(a, b)} for a, b in itertools.pairwise(kept)]


def _between(begin: _Sums, end: _Sums) -> dict[str, Any]:
    seconds = end.at - begin.at
    # Counters of a replica that is not known any more may be missing in the later sum.
    grown = {name: max(end.counts[name] - begin.counts[name], 0) for name in ("generation_tokens", *_COUNTERS)}
    speeds: dict[str, Any] = {
        f"{name}_per_second": round(count / seconds, 3) if seconds > 0 else 0.0 for name, count in grown.items()
    }
    for name in _HISTOGRAMS:
        buckets = {le: max(end.buckets[name][le] - begin.buckets[name][le], 0) for le in sorted(end.buckets[name])}
        speeds[name] = {label: quantile(buckets, share) for label, share in _QUANTILES.items()}
    return speeds


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """Of counts by upper bound, ascending and cumulative; None if there are none. Beyond the last finite bound it is
    that bound."""
    total = max(buckets.values(), default=0)
    if total <= 0:
        return None
    wanted, below, bound_below = share * total, 0.0, 0.0
    for bound, count in buckets.items():
        if count >= wanted and count > below:
            if bound == float("inf"):
                return round(bound_below, 6)
            return round(bound_below + (bound - bound_below) * (wanted - below) / (count - below), 6)
        below, bound_below = count, bound if bound != float("inf") else bound_below
    return round(bound_below, 6)
