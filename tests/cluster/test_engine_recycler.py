"""When engines are renewed: the policy, and one at a time."""

import pytest

from phi_cluster.cluster.engine_recycler import EnginePolicy, EngineRecycles, EngineReport, decide
from phi_cluster.cluster.session.recycler import RecycleReason

POLICY = EnginePolicy(max_age=100.0, max_steps=1000, max_private_growth=50)


def engine(pid=1, age=0.0, steps=0, private=10, baseline=10):
    return EngineReport(pid, age, steps, private, baseline)


@pytest.mark.parametrize(
    ("report", "requested", "reason"),
    [
        (engine(), frozenset(), None),
        (engine(age=99.9, steps=999, private=59), frozenset(), None),
        (engine(age=100.0), frozenset(), RecycleReason.MAX_AGE),
        (engine(steps=1000), frozenset(), RecycleReason.MAX_STEPS),
        (engine(private=60), frozenset(), RecycleReason.LEAK),
        (engine(private=60, age=500.0), frozenset(), RecycleReason.LEAK),
        (engine(), frozenset({1}), RecycleReason.REQUESTED),
        (engine(), frozenset({2}), None),
    ],
)
def test_why_an_engine_is_renewed(report, requested, reason):
    found = decide([("a", report)], POLICY, requested)
    assert (found and found[1]) == reason


def test_without_limits_nothing_is_renewed():
    assert decide([("a", engine(age=1e9, steps=10**9, private=10**12))], EnginePolicy()) is None


def test_the_most_pressing_first():
    engines = [
        ("a", engine(1, age=150.0)),
        ("b", engine(2, steps=5000)),
        ("c", engine(3)),
        ("d", engine(4, private=99)),
    ]
    requested = frozenset({3})
    order = []
    while engines:
        name, _ = decide(engines, POLICY, requested)
        order.append(name)
        engines = [one for one in engines if one[0] != name]
    assert order == ["d", "c", "b", "a"]


def test_one_at_a_time():
    recycles = EngineRecycles(POLICY)
    old = {"a": engine(1, age=200.0), "b": engine(2, age=150.0)}
    assert recycles.take("b", old["b"], 0.0) == RecycleReason.MAX_AGE
    # While that is under way, the other one waits, and nobody is told twice.
    for now in (0.5, 1.0, 4.0):
        assert recycles.take("a", old["a"], now) is None
        assert recycles.take("b", old["b"], now) is None
    assert recycles.take("b", engine(3), 4.5) is None
    assert recycles.take("a", old["a"], 5.0) == RecycleReason.MAX_AGE


def test_an_order_that_came_to_nothing_is_given_again():
    recycles = EngineRecycles(POLICY)
    orders = [recycles.take("a", engine(age=200.0), float(now)) for now in range(100)]
    assert orders.count(RecycleReason.MAX_AGE) == 2


def test_a_replica_that_is_gone_keeps_nobody_waiting():
    recycles = EngineRecycles(POLICY)
    assert recycles.take("a", engine(1, age=200.0), 0.0) == RecycleReason.MAX_AGE
    assert recycles.take("b", engine(2, age=150.0), 1.0) is None
    assert recycles.take("b", engine(2, age=150.0), 6.0) == RecycleReason.MAX_AGE


def test_requests_are_for_the_engines_of_now():
    recycles = EngineRecycles(EnginePolicy())
    for pid, name in enumerate("ab"):
        assert recycles.take(name, engine(pid), 0.0) is None
    assert recycles.request_all(0.5) == 2
    assert recycles.take("a", engine(0), 1.0) == RecycleReason.REQUESTED
    assert recycles.take("a", engine(7), 2.0) is None
    assert recycles.take("b", engine(1), 2.0) == RecycleReason.REQUESTED
    assert recycles.take("b", engine(8), 3.0) is None
    assert recycles.take("b", None, 4.0) is None
    assert recycles.request_all(4.0) == 1
