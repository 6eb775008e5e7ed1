"""When a replica takes the head's part for lost."""

from __future__ import annotations

from phi_cluster.cluster.head_start import HeadWatch


def test_it_is_started_again_when_it_has_been_away_for_long() -> None:
    now = [50.0]
    watch = HeadWatch(lambda: now[0])
    assert not watch.should_start()
    now[0] += 19
    assert not watch.should_start()
    now[0] += 1
    assert watch.should_start()
    # The start takes its time.
    now[0] += 19
    assert not watch.should_start()
    now[0] += 1
    assert watch.should_start()


def test_a_restart_by_ray_is_waited_for() -> None:
    now = [50.0]
    watch = HeadWatch(lambda: now[0])
    for _ in range(10):
        assert not watch.should_start()
        now[0] += 15
        watch.seen()
