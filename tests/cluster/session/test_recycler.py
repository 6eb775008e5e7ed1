"""The policy, with numbers."""

import dataclasses

import pytest

from phi_cluster.cluster.session.recycler import (
    RecycleOrder,
    RecyclePolicy,
    RecycleReason,
    SessionSnapshot,
    decide,
)

NOW = 1000.0
FRESH = SessionSnapshot("fresh", activated_at=NOW, last_used=NOW, turns=0)
POLICY = RecyclePolicy(max_age=100, max_turns=10, max_private_growth=1000, idle_timeout=50)


def make(digest="s", **changes):
    return dataclasses.replace(FRESH, digest=digest, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"activated_at": NOW - 99}, None),
        ({"activated_at": NOW - 100}, RecycleReason.MAX_AGE),
        ({"turns": 9}, None),
        ({"turns": 10}, RecycleReason.MAX_TURNS),
        ({"private_nbytes": 5999, "private_baseline": 5000}, None),
        ({"private_nbytes": 6000, "private_baseline": 5000}, RecycleReason.LEAK),
        ({"last_used": NOW - 49}, None),
        ({"last_used": NOW - 50}, RecycleReason.IDLE),
        ({"last_used": NOW - 50, "in_turn": True}, None),
        ({"activated_at": NOW - 100, "in_turn": True}, RecycleReason.MAX_AGE),
        ({"last_used": NOW - 50, "activated_at": NOW - 200, "turns": 20}, RecycleReason.IDLE),
        ({"last_used": NOW - 50, "private_nbytes": 1000}, RecycleReason.LEAK),
        ({"activated_at": NOW - 100, "turns": 99}, RecycleReason.MAX_AGE),
        ({"activated_at": NOW - 100, "turns": 99, "private_nbytes": None}, None),
    ],
)
def test_each_limit_is_reached_where_it_says(changes, reason):
    expected = [] if reason is None else [RecycleOrder("s", reason)]
    assert decide([make(**changes)], POLICY, NOW, 10) == expected


def test_no_limits_recycle_nobody():
    worst = make(activated_at=0, last_used=0, turns=10**9, private_nbytes=10**12)
    assert decide([worst], RecyclePolicy(), NOW, 10) == []


def test_a_round_takes_the_most_pressing():
    snapshots = [
        make("turns", turns=10),
        make("old", activated_at=NOW - 110),
        make("older", activated_at=NOW - 150),
        make("oldest-but-busy", activated_at=NOW - 999, in_turn=True),
        make("idle", last_used=NOW - 60),
        make("leaky", private_nbytes=1001),
        make("fine"),
    ]
    order = [order.digest for order in decide(snapshots, POLICY, NOW, 10)]
    assert order == ["leaky", "idle", "older", "old", "turns", "oldest-but-busy"]
    assert [o.digest for o in decide(reversed(snapshots), POLICY, NOW, 2)] == ["leaky", "idle"]
    assert decide(snapshots, POLICY, NOW, 0) == []
    assert decide(snapshots, POLICY, NOW, -1) == []


def test_everybody_gets_a_turn_in_bounded_rounds():
    snapshots = {f"s{i}": make(f"s{i}", activated_at=NOW - 100 - i) for i in range(10)}
    renewed = []
    for _ in range(4):
        for order in decide(snapshots.values(), POLICY, NOW, 3):
            renewed.append(order.digest)
            snapshots[order.digest] = make(order.digest)
    assert sorted(renewed) == sorted(snapshots)
    assert renewed[0] == "s9"


@pytest.mark.parametrize("field", ["max_age", "max_turns", "max_private_growth", "idle_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_limits_that_would_recycle_without_end_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        RecyclePolicy(**{field: value})


def test_reasons_are_metric_labels():
    assert {reason.name.lower() for reason in RecycleReason} == {reason.value for reason in RecycleReason}
    assert [reason for reason in RecycleReason if reason.deactivates] == [
        RecycleReason.IDLE,
        RecycleReason.SHUTDOWN,
    ]
