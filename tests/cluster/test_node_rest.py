"""When a node without replicas gives back what holds it."""

from __future__ import annotations

import pytest

from phi_cluster.cluster.node_rest import NodeRests


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_node_rests_when_it_has_had_no_replica_for_long(clock: Clock) -> None:
    rests = NodeRests(60.0, clock)
    assert not rests.should_rest("a", 0)
    clock.now += 59
    assert not rests.should_rest("a", 0)
    clock.now += 1
    assert rests.should_rest("a", 0)
    # Until that was done: it may fail.
    assert rests.should_rest("a", 0)
    rests.rest("a")
    assert rests.rests("a")
    assert not rests.rests("b")


def test_a_replica_in_between_begins_the_time_anew(clock: Clock) -> None:
    rests = NodeRests(60.0, clock)
    rests.should_rest("a", 0)
    clock.now += 59
    assert not rests.should_rest("a", 1)
    clock.now += 59
    assert not rests.should_rest("a", 0)
    clock.now += 60
    assert rests.should_rest("a", 0)


def test_it_wakes_with_a_replica_and_may_rest_again_only_after_its_time(clock: Clock) -> None:
    rests = NodeRests(60.0, clock)
    rests.should_rest("a", 0)
    clock.now += 60
    rests.rest("a")
    rests.wake("a")
    assert not rests.rests("a")
    # The replica has not reported yet.
    assert not rests.should_rest("a", 0)
    clock.now += 59
    assert not rests.should_rest("a", 0)


def test_machines_that_are_nobodys_to_take_never_rest(clock: Clock) -> None:
    rests = NodeRests(None, clock)
    rests.should_rest("a", 0)
    clock.now += 10**6
    assert not rests.should_rest("a", 0)


def test_a_dead_node_is_forgotten(clock: Clock) -> None:
    rests = NodeRests(60.0, clock)
    rests.rest("a")
    rests.forget("a")
    rests.forget("never there")
    assert not rests.rests("a")
