"""What replicas are told of each other: nobody silent, nothing where there is one node, bounded, and as it is now."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from phi_cluster.cluster.peers import PeerBook, PeerNews, PeerTable, ReplicaOrders
from phi_cluster.cluster.placement import Costs
from phi_cluster.cluster.replica_report import ReplicaReport


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def book(clock):
    return PeerBook(clock)


def report(name, node, num_open=0, address=None):
    return ReplicaReport(
        replica_id=name,
        node_id=node,
        pid=1,
        age_seconds=1.0,
        snapshot=[],
        private_nbytes=0,
        standby_engines=(),
        engine=None,
        last_step_seconds=0.0,
        queue_seconds=0.0,
        address=f"10.0.0.1:{name}" if address is None else address,
        num_open_turns=num_open,
        max_running_turns=8,
    )


def keeper(node, leased, budget, *sessions, speeds=(0.0, 0.0)):
    """`sessions`: (bytes, whether in a turn); `speeds`: of moves and of computing."""
    told = [SimpleNamespace(stats=SimpleNamespace(kv_cache_bytes=size, in_turn=turn)) for size, turn in sessions]
    return SimpleNamespace(
        node_id=node,
        reserved_nbytes=leased,
        budget_nbytes=budget,
        sessions=told,
        move_bytes_per_second=speeds[0],
        compute_tokens_per_second=speeds[1],
    )


def test_what_leaving_a_node_costs_is_what_the_slowest_one_has_measured(book, clock):
    table = PeerTable("a", lambda: 0, clock)
    book.take_replica(report("1", "a"))
    book.take_replica(report("2", "b"))
    assumed = Costs(1000, move_bytes_per_second=5.0, compute_tokens_per_second=6.0)

    def told():
        table.take(ReplicaOrders(None, "a", book.news()), 0)
        return table.costs(assumed)

    assert told() == assumed
    book.take_keeper(keeper("a", 0, 0, speeds=(0.0, 70.0)))
    book.take_keeper(keeper("b", 0, 0, speeds=(3e6, 90.0)))
    assert told() == replace(assumed, move_bytes_per_second=3e6, compute_tokens_per_second=70.0)
    book.forget_node("b")
    book.take_replica(report("3", "c"))
    assert told() == replace(assumed, compute_tokens_per_second=70.0)


def test_one_node_is_told_nothing(book):
    book.take_replica(report("1", "a"))
    book.take_replica(report("2", "a"))
    assert not book.has_several_nodes
    assert book.news() == PeerNews()


def test_nodes_are_the_sums_of_their_replicas(book):
    book.take_replica(report("1", "a", 3))
    book.take_replica(report("2", "a", 2))
    book.take_replica(report("3", "b"))
    # It listens nowhere (yet).
    book.take_replica(report("4", "b", address=""))
    book.take_keeper(keeper("b", 100, 400, (30, False), (50, True)))
    a, b = book.news().nodes
    assert (a.node_id, a.num_open, a.capacity, a.kv_budget) == ("a", 5, 16, 0)
    # What idles gives way.
    assert (b.node_id, b.num_open, b.capacity, b.kv_nbytes, b.kv_budget) == ("b", 0, 8, 70, 400)
    assert [one.replica_id for one in book.news().replicas] == ["2", "1", "3"]
    book.drain(["b"])
    assert [one.is_draining for one in book.news().nodes] == [False, True]
    book.drain([])
    assert not any(one.is_draining for one in book.news().nodes)


def test_who_is_silent_or_dead_is_not_told_of(book, clock):
    book.take_replica(report("1", "a"))
    book.take_replica(report("2", "b"))
    book.take_replica(report("3", "c"))
    clock.now += 4
    book.take_replica(report("1", "a"))
    book.take_replica(report("2", "b"))
    clock.now += 2
    assert [one.node_id for one in book.news().nodes] == ["a", "b"]
    book.forget_node("b")
    assert book.news() == PeerNews()


def test_what_is_told_is_bounded(book):
    for number in range(3000):
        book.take_replica(report(str(number), f"node{number % 300}", number))
    news = book.news()
    assert len(news.nodes) == 256
    assert len(news.replicas) == 4 * 256


@pytest.fixture
def table(book, clock):
    table = PeerTable("a", lambda: table.turns, clock)
    table.turns = 3
    book.take_replica(report("1", "a", 3))
    book.take_replica(report("2", "b", 4))
    book.take_replica(report("3", "b", 1))
    table.take(ReplicaOrders(None, "a", book.news()), 3)
    return table


def test_before_anything_is_told_there_are_no_peers(clock):
    table = PeerTable("a", lambda: 0, clock)
    assert not table.has_peers
    assert table.others == {}
    assert table.replica_on("b") is None
    assert table.head_node_id is None


def test_own_turns_count_as_they_are_now_and_others_with_what_was_sent(table):
    table.turns = 6
    assert table.own.num_open == 6
    peer = table.replica_on("b")
    assert peer.replica_id == "3"
    table.sent(peer, 5)
    assert table.replica_on("b").replica_id == "2"
    assert table.others["b"].num_open == 10
    assert set(table.others) == {"b"}


def test_a_node_that_is_not_told_of_yet_knows_itself(book, clock):
    book.take_replica(report("2", "b"))
    book.take_replica(report("3", "c"))
    table = PeerTable("a", lambda: 3, clock, capacity=8)
    table.take(ReplicaOrders(None, "b", book.news()), 0)
    assert (table.own.node_id, table.own.num_open, table.own.capacity) == ("a", 3, 8)
    assert set(table.others) == set(table.node_ids) == {"b", "c"}


def test_whoever_could_not_be_reached_is_left_alone_for_a_moment(table, clock):
    table.suspect(table.replica_on("b"))
    assert table.replica_on("b").replica_id == "2"
    table.suspect(table.replica_on("b"))
    assert table.others == {}
    assert table.replica_on("b") is None
    clock.now += 5
    assert table.replica_on("b").replica_id == "3"


def test_what_was_told_long_ago_is_forgotten(table, clock):
    clock.now += 11
    assert not table.has_peers
    assert table.others == {}
    assert table.replica_on("b") is None
