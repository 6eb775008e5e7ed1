"""How many replicas a load wants, as numbers and as Serve asks."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi_cluster.cluster.replica_scaling import LoadScaling, ReplicaLoad, ScalingPolicy, scaling_metrics

POLICY = ScalingPolicy(target_turns=8, max_wait=2)


@pytest.mark.parametrize(
    ("loads", "target", "expected"),
    [
        ([], 0, 0),
        ([(0, 0)], 1, 0),
        ([(0.5, 0)], 1, 1),
        ([(8, 0)], 1, 1),
        ([(9, 0)], 1, 2),
        ([(40, 0)], 1, 5),
        ([(3, 2.5)], 1, 2),
        ([(3, 2)], 1, 1),
        # The second one is asked for, but does not serve yet.
        ([(3, 2.5)], 2, 2),
        ([(3, 2.5)], 3, 2),
        ([(5, 2.5), (1, 0)], 2, 3),
        # 13 turns fit on two, but barely on two: three stay until there are 12.
        ([(5, 0), (4, 0), (4, 0)], 3, 3),
        ([(4, 0), (4, 0), (4, 0)], 3, 2),
        ([(0, 0), (0, 0), (0, 0)], 3, 0),
    ],
)
def test_what_is_wanted(loads: list[tuple[float, float]], target: int, expected: int) -> None:
    assert POLICY.num_replicas([ReplicaLoad(*load) for load in loads], target) == expected


def test_what_nobody_has_yet_wants_a_replica_too() -> None:
    assert POLICY.num_replicas([], 0, num_queued=1) == 1
    assert POLICY.num_replicas([], 1, num_queued=9) == 2
    assert POLICY.num_replicas([ReplicaLoad(8, 0)], 1, num_queued=1) == 2


def test_a_response_in_the_background_keeps_a_replica() -> None:
    assert POLICY.num_replicas([ReplicaLoad(0, 0, num_background=3), ReplicaLoad(0, 0)], 2) == 1
    assert POLICY.num_replicas([ReplicaLoad(0, 0, num_background=0)], 1) == 0


GB = 10**9
OF_NODES = ScalingPolicy(target_turns=8, max_wait=2, kv_target=0.8)


@pytest.mark.parametrize(
    ("needed", "target", "expected"),
    [
        # Each machine has 10 GB, of which 8 are to be needed at most.
        ([0], 1, 1),
        ([8], 1, 1),
        ([8.1], 1, 2),
        # One more at a time: what is there moves first.
        ([60], 1, 2),
        ([8, 8.1], 2, 3),
        # 8 GB fit on one, but barely: two stay until there are 6.4.
        ([4, 4], 2, 2),
        ([3, 3.4], 2, 1),
        ([3, 3.5], 2, 2),
    ],
)
def test_a_machine_more_brings_memory(needed: list[float], target: int, expected: int) -> None:
    loads = [ReplicaLoad(1, 0, kv_needed=one * GB, kv_budget=10 * GB) for one in needed]
    assert OF_NODES.num_replicas(loads, target) == expected
    # On one machine it brings none.
    assert POLICY.num_replicas(loads, target) == 1


def test_memory_of_which_nothing_is_known_wants_nothing() -> None:
    assert OF_NODES.num_replicas([ReplicaLoad(1, 0)], 1) == 1
    # A replica whose keeper has told nothing yet has as much as the others.
    assert OF_NODES.num_replicas([ReplicaLoad(1, 0, 0, 9 * GB, 10 * GB), ReplicaLoad(0, 0)], 2) == 2


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 20))
def test_a_steady_need_of_memory_comes_to_rest(gigabytes: int, target: int) -> None:
    """However it begins, and one more at a time: in the end the number stays, and no machine needs more than its
    share."""
    for _ in range(40):
        each = ReplicaLoad(0, 0, kv_needed=gigabytes * GB / max(target, 1), kv_budget=10 * GB)
        before, target = target, max(OF_NODES.num_replicas([each] * target, target), 1)
    assert before == target
    assert gigabytes <= 8 * target


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(1, 20))
def test_a_steady_load_comes_to_rest(num_open: int, target: int) -> None:
    """Turns that are spread anew over as many replicas as are wanted want that many again."""
    seen = []
    for _ in range(3):
        target = max(POLICY.num_replicas([ReplicaLoad(num_open / target, 0)] * target, target), 1)
        seen.append(target)
    assert seen[1] == seen[2]
    assert num_open <= 8 * seen[2]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 10)), max_size=6), st.integers(1, 8))
def test_more_to_do_never_wants_fewer(loads: list[tuple[int, float]], target: int) -> None:
    fewer = [ReplicaLoad(*load) for load in loads]
    more = [ReplicaLoad(load.open_turns + 1, load.oldest_wait) for load in fewer]
    assert POLICY.num_replicas(more, target) >= POLICY.num_replicas(fewer, target) >= 0


@dataclass
class Value:
    """Serve's TimeStampedValue."""

    value: float
    timestamp: float = 0.0


def context(loads: dict[str, tuple[float, float]], running: int, target: int, queued: float | None = 0) -> Any:
    """Serve's AutoscalingContext, as far as it is looked at; each series has an older value that was much higher."""
    return SimpleNamespace(
        raw_metrics={
            name: {replica: [Value(99.0), Value(load[i])] for replica, load in loads.items()}
            for i, name in enumerate(("open_turns", "oldest_wait"))
        },
        current_num_replicas=running,
        target_num_replicas=target,
        total_queued_requests=queued,
    )


def test_serve_asks_with_what_was_told_last() -> None:
    scaling = LoadScaling(target_turns=8, max_wait=2)
    assert scaling(context({"a": (17, 0)}, 1, 1)) == (3, {})
    assert scaling(context({"a": (1, 0), "b": (0, 0)}, 2, 2)) == (1, {})
    assert scaling(context({"a": (1, 3)}, 1, 1)) == (2, {})


def test_who_has_not_told_anything_is_not_taken_for_idle() -> None:
    scaling = LoadScaling(target_turns=8, max_wait=2)
    assert scaling(context({}, 2, 2)) == (2, {})
    assert scaling(context({"a": (1, 0)}, 2, 2)) == (2, {})
    assert scaling(context({"a": (30, 0)}, 2, 2)) == (4, {})
    # One is on its way.
    assert scaling(context({}, 0, 1)) == (1, {})
    nothing = context({}, 0, 1, queued=None)
    nothing.raw_metrics = None
    assert scaling(nothing) == (1, {})


def test_none_is_left_where_nothing_is_to_be_done_and_one_comes_with_a_request() -> None:
    scaling = LoadScaling(target_turns=8, max_wait=2)
    assert scaling(context({"a": (0, 0)}, 1, 1)) == (0, {})
    assert scaling(context({"a": (1, 0)}, 1, 1)) == (1, {})
    assert scaling(context({"a": (0, 0)}, 1, 1, queued=1)) == (1, {})
    assert scaling(context({}, 0, 0)) == (0, {})
    assert scaling(context({}, 0, 0, queued=1)) == (1, {})


def test_serve_can_carry_it() -> None:
    """Serve pickles the class, calls it with keywords, and accepts no other values than numbers from replicas."""
    scaling = pickle.loads(pickle.dumps(LoadScaling))(target_turns=8, max_wait=2)
    assert scaling(context({"a": (9, 0)}, 1, 1)) == (2, {})

    class Turns:
        num_open = 3

        def oldest_wait(self) -> float:
            return 1.5

    told = scaling_metrics(Turns(), 2, (5, 10))
    assert told == {"open_turns": 3.0, "oldest_wait": 1.5, "num_background": 2.0, "kv_needed": 5, "kv_budget": 10}
