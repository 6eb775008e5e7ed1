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
        ([], 1, 1),
        ([(0, 0)], 1, 1),
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
        ([(0, 0), (0, 0), (0, 0)], 3, 1),
    ],
)
def test_what_is_wanted(loads: list[tuple[float, float]], target: int, expected: int) -> None:
    assert POLICY.num_replicas([ReplicaLoad(*load) for load in loads], target) == expected


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(1, 20))
def test_a_steady_load_comes_to_rest(num_open: int, target: int) -> None:
    """Turns that are spread anew over as many replicas as are wanted want that many again."""
    seen = []
    for _ in range(3):
        target = POLICY.num_replicas([ReplicaLoad(num_open / target, 0)] * target, target)
        seen.append(target)
    assert seen[1] == seen[2]
    assert num_open <= 8 * seen[2]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 10)), max_size=6), st.integers(1, 8))
def test_more_to_do_never_wants_fewer(loads: list[tuple[int, float]], target: int) -> None:
    fewer = [ReplicaLoad(*load) for load in loads]
    more = [ReplicaLoad(load.open_turns + 1, load.oldest_wait) for load in fewer]
    assert POLICY.num_replicas(more, target) >= POLICY.num_replicas(fewer, target) >= 1


@dataclass
class Value:
    """Serve's TimeStampedValue."""

    value: float
    timestamp: float = 0.0


def context(loads: dict[str, tuple[float, float]], running: int, target: int) -> Any:
    """Serve's AutoscalingContext, as far as it is looked at; each series has an older value that was much higher."""
    return SimpleNamespace(
        raw_metrics={
            name: {replica: [Value(99.0), Value(load[i])] for replica, load in loads.items()}
            for i, name in enumerate(("open_turns", "oldest_wait"))
        },
        current_num_replicas=running,
        target_num_replicas=target,
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
    assert scaling(SimpleNamespace(raw_metrics=None, current_num_replicas=0, target_num_replicas=1)) == (1, {})


def test_serve_can_carry_it() -> None:
    """Serve pickles the class, calls it with keywords, and accepts no other values than numbers from replicas."""
    scaling = pickle.loads(pickle.dumps(LoadScaling))(target_turns=8, max_wait=2)
    assert scaling(context({"a": (9, 0)}, 1, 1)) == (2, {})

    class Turns:
        num_open = 3

        def oldest_wait(self) -> float:
            return 1.5

    assert scaling_metrics(Turns()) == {"open_turns": 3.0, "oldest_wait": 1.5}
