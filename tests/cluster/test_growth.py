"""Who has grown too much is renewed; who merely is large, or has just begun, is not."""

from __future__ import annotations

from phi_cluster.cluster.growth import GrowthWatch


def test_growth_counts_from_what_a_process_took_when_it_had_settled() -> None:
    watch = GrowthWatch(100)
    # It fills its caches.
    assert [watch.exceeds("node", 1, nbytes, now) for nbytes, now in ((50, 0.0), (5000, 30.0), (9000, 60.0))] == [
        False
    ] * 3
    assert not watch.exceeds("node", 1, 9100, 61.0)
    assert watch.exceeds("node", 1, 9101, 62.0)
    # Until it has gone.
    assert watch.exceeds("node", 1, 9101, 63.0)
    assert not watch.exceeds("node", 2, 9101, 64.0)
    assert not watch.exceeds("node", 2, 9101, 124.0)
    assert not watch.exceeds("node", 2, 9201, 125.0)


def test_places_are_watched_apart() -> None:
    watch = GrowthWatch(100)
    for now in (0.0, 60.0):
        for place in ("one", "other"):
            assert not watch.exceeds(place, place, 1000, now)
    assert watch.exceeds("one", "one", 1101, 61.0)
    assert not watch.exceeds("other", "other", 1100, 61.0)


def test_without_a_limit_nobody_grows_too_much() -> None:
    watch = GrowthWatch(None)
    assert not any(watch.exceeds("node", 1, int(now) ** 9, now) for now in (0.0, 60.0, 1e6))
