"""Rates and percentiles out of counters."""

import pytest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from phi_cluster.cluster.speed_history import SpeedHistory, quantile
from phi_cluster.monitoring.replica_metrics import ReplicaMetrics
from phi_cluster.monitoring.snapshots import snapshot_of

INF = float("inf")


def counted(requests: int, ttft: float, tokens: int = 10) -> ReplicaMetrics:
    metrics = ReplicaMetrics()
    for _ in range(requests):
        metrics.requests.on_start("chat")
        metrics.requests.on_first_token("chat", ttft)
        metrics.requests.on_token("chat", tokens - 1, 0.02 * (tokens - 1))
        metrics.requests.on_finish("chat", "stop", 1.0, 100, 60, tokens)
    return metrics


def test_what_lies_between_two_sums() -> None:
    history, metrics = SpeedHistory(every=5), counted(10, 9.0)
    history.take(100.0, [metrics.snapshot(0)])
    for _ in range(20):
        metrics.requests.on_start("chat")
        metrics.requests.on_first_token("chat", 0.04)
        metrics.requests.on_token("chat", 9, 0.18)
        metrics.requests.on_finish("chat", "stop", 1.0, 100, 60, 10)
    history.take(110.0, [metrics.snapshot(0)])
    speeds = history.speeds(60.0)
    assert speeds["generation_tokens_per_second"] == 20.0
    assert speeds["prompt_tokens_per_second"] == 200.0
    assert speeds["cached_tokens_per_second"] == 120.0
    assert speeds["requests_per_second"] == 2.0
    # The slow ones came before.
    assert 0.025 < speeds["ttft_seconds"]["p50"] <= speeds["ttft_seconds"]["p99"] <= 0.05
    assert 0.01 < speeds["inter_token_seconds"]["p50"] <= 0.02
    [only] = history.series()
    assert only["time"] == 110.0
    assert only["ttft_seconds"] == speeds["ttft_seconds"]


def test_replicas_are_summed_and_old_sums_go() -> None:
    history = SpeedHistory(every=5, keep=3)
    metrics = [counted(1, 0.1), counted(2, 0.1)]
    for second in range(0, 40, 1):
        history.take(1000.0 + second, [one.snapshot(0) for one in metrics])
    assert [one["time"] for one in history.series()] == [1030.0, 1035.0]
    assert history.speeds(60.0)["requests_per_second"] == 0.0


def test_nothing_is_nothing() -> None:
    history = SpeedHistory()
    assert history.speeds(60.0)["ttft_seconds"] == {"p50": None, "p95": None, "p99": None}
    assert history.series() == []
    history.take(1.0, [])
    assert history.speeds(60.0)["generation_tokens_per_second"] == 0.0


def test_a_counter_that_went_back_is_no_speed() -> None:
    history = SpeedHistory()
    history.take(1.0, [counted(10, 0.1).snapshot(0)])
    history.take(11.0, [counted(3, 0.1).snapshot(0)])
    assert history.speeds(60.0)["requests_per_second"] == 0.0
    assert history.speeds(60.0)["ttft_seconds"]["p50"] is None


def test_labels_do_not_matter() -> None:
    family = CounterMetricFamily("phi_request_success", "", labels=["finish_reason", "endpoint"])
    family.add_metric(["stop", "chat"], 4)
    family.add_metric(["length", "chat"], 6)
    times = HistogramMetricFamily("phi_time_to_first_token_seconds", "", labels=["endpoint"])
    for endpoint in ("chat", "responses"):
        times.add_metric([endpoint], [("0.1", 1), ("+Inf", 2)], sum_value=1.0)
    history = SpeedHistory()
    history.take(1.0, [])
    history.take(2.0, [snapshot_of([family, times])])
    assert history.speeds(60.0)["requests_per_second"] == 10.0
    assert history.speeds(60.0)["ttft_seconds"]["p50"] == 0.1


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ({1.0: 10, INF: 10}, 0.5, 0.5),
        ({1.0: 0, 2.0: 10, INF: 10}, 0.5, 1.5),
        ({1.0: 5, 2.0: 10, INF: 10}, 0.5, 1.0),
        ({1.0: 5, 2.0: 5, INF: 10}, 0.9, 2.0),
        ({INF: 3}, 0.5, 0.0),
        ({1.0: 0, INF: 0}, 0.5, None),
        ({}, 0.5, None),
    ],
)
def test_quantiles(buckets: dict[float, float], share: float, expected: float | None) -> None:
    assert quantile(buckets, share) == expected
