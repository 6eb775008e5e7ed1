"""The processes themselves: what they are of, their private memory, and the weights they share.

Owns: these families. Knows nothing of how memory is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric


def build_info(labels: Mapping[str, str]) -> Iterator[Metric]:
    """What is served by what: versions, instruction set, formats, model."""
    family = GaugeMetricFamily("phi_build_info", "What is served by what; always 1.", labels=sorted(labels))
    family.add_metric([labels[name] for name in sorted(labels)], 1)
    yield family


def process_metrics(
    private_nbytes: Iterable[tuple[str, str, int]],
    weights_nbytes: int,
    server_started: float,
    controller_started: float,
) -> Iterator[Metric]:
    """`private_nbytes`: node, kind and private memory of each process (bytes). Starts in seconds since 1970; counters
    begin with the server's, the controller's own end does not take them back."""
    private = GaugeMetricFamily(
        "phi_process_private_bytes", "Private memory (RssAnon + swap) by process kind.", labels=["node", "kind"]
    )
    counts = GaugeMetricFamily("phi_processes", "Processes by kind.", labels=["node", "kind"])
    sums: dict[tuple[str, str], list[int]] = {}
    for node, kind, nbytes in private_nbytes:
        sums.setdefault((node, kind), []).append(nbytes)
    for (node, kind), each in sorted(sums.items()):
        private.add_metric([node, kind], sum(each))
        # A process of which nothing is private is gone, or of a kind that has none just now.
        counts.add_metric([node, kind], sum(nbytes > 0 for nbytes in each))
    yield from (private, counts)
    yield GaugeMetricFamily("phi_weights_bytes", "Weights in the object store, in bytes a node.", value=weights_nbytes)
    yield GaugeMetricFamily(
        "phi_server_start_time_seconds", "When the server started (since 1970).", value=server_started
    )
    yield GaugeMetricFamily(
        "phi_controller_start_time_seconds", "When its controller started (since 1970).", value=controller_started
    )
