"""What the holders of API keys have used, by the names in the file of keys.

Owns: these families, and that they are not more than a hundred. Knows nothing of keys or limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

# A file of keys may be long, and remembers names that it holds no more.
MAX_KEYS = 100
_OTHERS = "(others)"


@dataclass(frozen=True)
class KeyView:
    """What the holder of API keys has used on a node. `key` is its name in the file of keys, never a key; `since` when
    it was first used (since 1970); `kv_bytes` the KV cache of its sessions now."""

    key: str
    requests: int
    refused: int
    tokens_by_kind: dict[str, int]
    since: float = 0.0
    kv_bytes: int = 0


def key_metrics(keys: Iterable[KeyView]) -> Iterator[Metric]:
    """Families by key, summed over nodes. The hundred that were first used earliest have a name of their own: not
    those that use most, because whoever came or went then would take counters back."""
    requests = CounterMetricFamily("phi_key_requests", "Turns that were let in, by the key's name.", labels=["key"])
    refused = CounterMetricFamily(
        "phi_key_refused_requests", "Turns refused by the key's own limits, by its name.", labels=["key"]
    )
    tokens = CounterMetricFamily(
        "phi_key_tokens", "Tokens by the key's name and kind (cached ones are prompt too).", labels=["key", "kind"]
    )
    kv_bytes = GaugeMetricFamily("phi_key_kv_cache_bytes", "KV cache of the key's sessions.", labels=["key"])
    views = sorted(keys, key=lambda view: (view.since, view.key))
    named = list(dict.fromkeys(view.key for view in views))[:MAX_KEYS]
    summed: dict[str, list[KeyView]] = {}
    for view in views:
        summed.setdefault(view.key if view.key in named else _OTHERS, []).append(view)
    for key, some in sorted(summed.items()):
        requests.add_metric([key], sum(view.requests for view in some))
        refused.add_metric([key], sum(view.refused for view in some))
        kv_bytes.add_metric([key], sum(view.kv_bytes for view in some))
        for kind in sorted({kind for view in some for kind in view.tokens_by_kind}):
            tokens.add_metric([key, kind], sum(view.tokens_by_kind.get(kind, 0) for view in some))
    yield from (requests, refused, tokens, kv_bytes)
