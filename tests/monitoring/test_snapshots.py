"""Processes come and go; the sums over them never go back, whoever keeps them."""

from __future__ import annotations

import pickle

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from phi_cluster.monitoring.snapshots import RaisedCounter, SnapshotSums, merge_snapshots, snapshot_of, without_gauges


def counted(number: int, gauge: int = 0, seconds: float = 0.02):
    """A process's snapshot."""
    registry = CollectorRegistry()
    counter = Counter("things", "Things.", ["kind"], registry=registry)
    counter.labels("big").inc(number)
    Gauge("level", "Level.", registry=registry).set(gauge)
    Histogram("time", "Time.", buckets=(0.01, 0.1), registry=registry).observe(seconds)
    return snapshot_of(registry.collect())


def test_snapshots_travel_without_the_moments_of_creation():
    snapshot = counted(3)
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot
    assert "_created" not in str(snapshot)


def test_samples_of_the_same_labels_are_summed_bucket_by_bucket(exported):
    out = exported(merge_snapshots([counted(3, 1, 0.001), counted(4, 2, 0.05), counted(0, 0, 5.0)]))
    assert out.value("things_total", kind="big") == 7
    assert out.value("level") == 3
    assert out.value("time_bucket", le="0.01") == 1
    assert out.value("time_bucket", le="0.1") == 2
    assert out.value("time_bucket", le="+Inf") == out.value("time_count") == 3
    assert out.value("time_sum") == pytest.approx(5.051)


def test_nothing_is_made_of_nothing():
    assert list(merge_snapshots([])) == []


def shown(sums: SnapshotSums, now: float, exported):
    return exported(merge_snapshots(sums.snapshots(now)))


def test_who_is_silent_keeps_its_counters_and_loses_its_gauges(exported):
    sums = SnapshotSums(silence=5)
    sums.take("a", counted(3, gauge=8), now=0)
    sums.take("b", counted(1, gauge=1), now=10)
    out = shown(sums, 10, exported)
    assert (out.value("things_total", kind="big"), out.value("level")) == (4, 1)
    # It was only slow.
    sums.take("a", counted(5, gauge=8), now=11)
    out = shown(sums, 11, exported)
    assert (out.value("things_total", kind="big"), out.value("level")) == (6, 9)


def test_who_is_retired_is_counted_once_and_for_ever(exported):
    sums = SnapshotSums(silence=5)
    for number in range(4):
        sums.take(f"node/{number}", counted(number + 1, gauge=1), now=0)
    before = shown(sums, 0, exported).value("things_total", kind="big")
    for name in sums.living("node/")[:3]:
        sums.retire(name)
        sums.retire(name)
        assert shown(sums, 0, exported).value("things_total", kind="big") == before == 10
    assert sums.living("node/") == ["node/3"]
    assert "node/3" in sums
    assert "node/0" not in sums
    # The dead are one sum, however many there were.
    assert len(sums.snapshots(0)) == 2


def test_a_successor_goes_on_with_the_sums(exported):
    first = SnapshotSums(silence=5)
    first.take("dead", counted(3), now=0)
    first.retire("dead")
    first.take("living", counted(4, gauge=7), now=0)
    second = SnapshotSums(silence=5)
    second.unpack(first.pack(me=counted(100)), now=1000)
    out = shown(second, 1000, exported)
    assert out.value("things_total", kind="big") == 107
    assert out.values("level") == {}
    # Who lives reports again, under the same name: nothing counts twice.
    second.take("living", counted(6, gauge=7), now=1001)
    out = shown(second, 1001, exported)
    assert (out.value("things_total", kind="big"), out.value("level")) == (109, 7)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x92\x01\x02", b"\x92\x91\x01\x80"])
def test_what_is_no_sum_is_refused_and_changes_nothing_that_is_shown(data):
    with pytest.raises(ValueError, match="no sums"):
        SnapshotSums(silence=5).unpack(data, now=0)


def test_without_gauges():
    assert {name for name, *_ in without_gauges(counted(1))} == {"things", "time"}


def test_a_total_that_is_counted_elsewhere_never_goes_back(exported):
    registry = CollectorRegistry()
    plain = RaisedCounter(Counter("plain", "Plain.", registry=registry))
    labelled = RaisedCounter(Counter("labelled", "Labelled.", ["kind"], registry=registry))
    for total in (2, 5, 3, 5):
        plain.to(total)
    labelled.to(1, "a")
    labelled.to(4, "b")
    out = exported(registry.collect())
    assert out.value("plain_total") == 5
    assert out.values("labelled_total") == {("a",): 1, ("b",): 4}
