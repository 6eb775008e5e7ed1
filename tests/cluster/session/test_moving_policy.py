"""When a session is worth moving, and where those of a node that is given up go."""

from __future__ import annotations

import pytest

from phi_cluster.cluster.session.moving_policy import Movable, MoveSpeed, is_worth_moving, plan_evacuation


def test_it_moves_where_that_is_sooner():
    # Phi-3-mini's shape, 393,216 bytes a token: over 1 Gbit/s a thousand tokens are four seconds, computed at 60
    # tokens a second they are seventeen.
    assert is_worth_moving(1000, 393_216_000, 100e6, 60.0)
    assert not is_worth_moving(1000, 393_216_000, 20e6, 60.0)
    assert not is_worth_moving(1000, 393_216_000, 100e6, 300.0)
    # Asking takes its time whatever the size.
    assert not is_worth_moving(5, 5 * 393_216, 1e9, 300.0)


def test_the_speed_follows_what_is_measured():
    speed = MoveSpeed()
    before = speed.bytes_per_second
    for nbytes, seconds in ((1000, 0.001), (10**9, 0.0)):
        speed.moved(nbytes, seconds)
    assert speed.bytes_per_second == before
    for _ in range(30):
        speed.moved(10**9, 1.0)
    assert speed.bytes_per_second == pytest.approx(1e9, rel=0.01)


def plan(sessions, rooms, max_idle=None):
    return list(plan_evacuation(sessions, rooms, max_idle).items())


def test_each_goes_where_most_room_is_left():
    sessions = [Movable("a", 60, 1.0), Movable("b", 30, 2.0), Movable("c", 30, 3.0)]
    assert plan(sessions, {"x": 100, "y": 80}) == [("a", "x"), ("b", "y"), ("c", "y")]


def test_who_was_used_last_comes_first_and_unnamed_ones_last():
    sessions = [Movable("old", 60, 9.0), Movable("unnamed", 60, 0.0, ephemeral=True), Movable("new", 60, 1.0)]
    assert plan(sessions, {"x": 130}) == [("new", "x"), ("old", "x"), ("unnamed", None)]


def test_what_nobody_has_room_for_stays_and_smaller_ones_go():
    assert plan([Movable("large", 200, 1.0), Movable("small", 50, 2.0)], {"x": 100}) == [
        ("large", None),
        ("small", "x"),
    ]
    assert plan([Movable("any", 1, 1.0)], {}) == [("any", None)]


def test_who_has_idled_for_long_is_left_to_its_journal():
    sessions = [Movable("stale", 10, 61.0), Movable("fresh", 10, 60.0)]
    assert plan(sessions, {"x": 100}, 60.0) == [("fresh", "x"), ("stale", None)]


def test_the_same_is_planned_whatever_the_order():
    sessions = [Movable(name, 10, 1.0) for name in "dbca"]
    assert plan(sessions, {"x": 30, "y": 30}) == plan(sorted(sessions, key=lambda one: one.digest), {"y": 30, "x": 30})
