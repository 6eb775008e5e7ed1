"""Where a turn is run: a table of cases, and what holds for all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi_cluster.cluster.placement import (
    AskedTurn,
    Costs,
    Forward,
    Here,
    Move,
    NodeLoad,
    place,
    place_unnamed,
    rendezvous,
)

# 400 KB a token: moving 1,000 of them takes 4.1 s, computing them 2 s.
COSTS = Costs(400_000, 100e6, 0.1, 500.0, 10.0, 0.25, 2.0)
QUICK = replace(COSTS, move_bytes_per_second=1e9)


def node(name, num_open=0, **other):
    return NodeLoad(name, num_open, 8, **other)


IDLE, BUSY, FULL, OVER = 0, 4, 8, 24

CASES = {
    "a new session stays where it came": (None, BUSY, {"b": IDLE}, COSTS, Here()),
    "unless there is no room": (None, FULL, {"b": BUSY, "c": IDLE}, COSTS, Forward("c")),
    "if it is really better elsewhere": (None, FULL, {"b": FULL - 1}, COSTS, Here()),
    "its memory is here": ("a", BUSY, {"b": IDLE}, COSTS, Here()),
    "its memory is there": ("b", IDLE, {"b": BUSY}, COSTS, Forward("b")),
    "its node is gone": ("z", IDLE, {"b": IDLE}, COSTS, Here()),
    "its node is gone, and here is no room": ("z", FULL, {"b": IDLE}, COSTS, Forward("b")),
    "a full node is waited for, if that is quicker": ("b", IDLE, {"b": FULL}, COSTS, Forward("b")),
    "one that is overrun is left: computed here": ("b", IDLE, {"b": OVER}, COSTS, Here()),
    "or fetched, over a quick link": ("b", IDLE, {"b": OVER}, QUICK, Move("b")),
    "all are overrun": ("b", OVER, {"b": OVER}, QUICK, Forward("b")),
    "here is overrun: another computes": ("a", OVER, {"b": IDLE}, COSTS, Forward("b")),
    "or fetches": ("a", OVER, {"b": IDLE}, QUICK, Forward("b", "a")),
    "a third one has the room": ("b", OVER, {"b": OVER, "c": IDLE}, QUICK, Forward("c", "b")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_named_session(case):
    seat, own, others, costs, expected = CASES[case]
    peers = {name: node(name, num_open) for name, num_open in others.items()}
    assert place(AskedTurn(seat, 1000), node("a", own), peers, costs) == expected


def test_a_node_that_drains_is_left_and_not_chosen():
    draining = node("b", is_draining=True)
    assert place(AskedTurn("b", 1000), node("a"), {"b": draining}, QUICK) == Move("b")
    assert place(AskedTurn("b", 1000), node("a"), {"b": draining}, COSTS) == Here()
    assert place(AskedTurn("b", 1000), node("a"), {"b": draining}, replace(QUICK, move_bytes_per_second=0)) == Here()
    assert place(AskedTurn(None), node("a", FULL), {"b": draining}, COSTS) == Here()
    own = node("a", is_draining=True)
    assert place(AskedTurn("a", 1000), own, {"b": node("b", BUSY)}, QUICK) == Forward("b", "a")
    assert place(AskedTurn(None), own, {"b": node("b", FULL)}, QUICK) == Forward("b")
    # There is nowhere else to go.
    assert place(AskedTurn("a", 1000), own, {"b": draining}, QUICK) == Here()
    assert place_unnamed(b"name", own, {"b": draining}) == Here()


def test_memory_for_turns_counts_as_their_number_does():
    full = node("b", kv_nbytes=120, kv_budget=40)
    assert full.pressure == 3.0
    assert place(AskedTurn("b", 1000), node("a"), {"b": full}, COSTS) == Here()
    assert place(AskedTurn("b", 1000), node("a"), {"b": replace(full, kv_budget=0)}, COSTS) == Forward("b")


def test_a_short_prompt_has_little_to_lose():
    """The client edited its history away: what the seat has is worth no more than the prompt is long."""
    crowded = {"b": node("b", 10)}
    assert place(AskedTurn("b", 4000), node("a"), crowded, COSTS) == Forward("b")
    assert place(AskedTurn("b", 4000, num_prompt=50), node("a"), crowded, COSTS) == Here()


names = st.sampled_from("abcdef")
loads = st.builds(
    NodeLoad,
    names,
    st.integers(0, 100),
    st.integers(1, 32),
    st.integers(0, 200),
    st.sampled_from([0, 100]),
    st.booleans(),
)
clusters = st.lists(loads, min_size=1, max_size=6, unique_by=lambda one: one.node_id)
costs = st.builds(
    Costs,
    st.integers(1, 10**6),
    st.sampled_from([0.0, 1e6, 1e8, 1e10]),
    st.floats(0, 1),
    st.floats(1, 1e5),
    st.floats(0, 60),
    st.floats(0.01, 2),
    st.floats(0, 10),
)
asked = st.builds(AskedTurn, st.none() | names, st.integers(0, 10**5), st.none() | st.integers(1, 10**5))


def split(cluster):
    own, *others = cluster
    return own, {one.node_id: one for one in others}


def target(placement, own):
    return placement.node_id if isinstance(placement, Forward) else own.node_id


@given(asked, clusters, costs)
def test_only_nodes_that_live_and_stay_are_chosen(turn, cluster, costs):
    own, peers = split(cluster)
    placement = place(turn, own, peers, costs)
    alive = {one.node_id for one in cluster}
    chosen = target(placement, own)
    assert chosen in alive
    staying = {one.node_id for one in cluster if not one.is_draining}
    if staying:
        assert chosen in staying
    if isinstance(placement, Forward):
        assert placement.node_id != own.node_id
    source = getattr(placement, "source_node_id", getattr(placement, "move_from", None))
    if source is not None:
        assert source == turn.seat
        assert source in alive
        assert source != chosen
        assert costs.move_bytes_per_second


@given(asked, clusters, costs)
def test_a_session_that_left_does_not_come_back(turn, cluster, costs):
    """Nor go further: under the same loads the place that was chosen is kept, whichever node is asked, unless it
    drains."""
    own, peers = split(cluster)
    chosen = target(place(turn, own, peers, costs), own)
    nodes = {one.node_id: one for one in cluster}
    if nodes[chosen].is_draining:
        return
    moved = replace(turn, seat=chosen)
    if turn.seat is None or turn.seat not in nodes:
        # It was placed where nothing was known of it; what follows must hold from its second turn on.
        chosen = target(place(moved, own, peers, costs), own)
        moved = replace(turn, seat=chosen)
    for asking in cluster:
        others = {name: one for name, one in nodes.items() if name != asking.node_id}
        again = target(place(moved, asking, others, costs), asking)
        # From an overrun node different askers may go to different ones, each emptier by the margin; never back.
        assert again != turn.seat or turn.seat == chosen
        if again != chosen:
            assert nodes[again].pressure <= nodes[chosen].pressure - costs.margin


@given(asked, loads, costs)
def test_a_node_that_is_alone_does_it_all(turn, own, costs):
    assert place(turn, own, {}, costs) == Here()
    assert place_unnamed(b"name", own, {}) == Here()


@given(st.binary(max_size=40), clusters)
def test_an_unnamed_conversation_comes_to_the_same_node_from_everywhere(name, cluster):
    nodes = {one.node_id: one for one in cluster}
    chosen = set()
    for own in cluster:
        others = {key: one for key, one in nodes.items() if key != own.node_id}
        chosen.add(target(place_unnamed(name, own, others), own))
    if not all(one.is_draining for one in cluster):
        assert len(chosen) == 1
        assert not nodes[chosen.pop()].is_draining


@given(st.binary(max_size=40), st.lists(names, unique=True, min_size=1))
def test_who_comes_or_goes_disturbs_nobody_else(name, alive):
    order = rendezvous(name, alive)
    assert sorted(order) == sorted(alive)
    for gone in alive:
        assert rendezvous(name, [one for one in alive if one != gone]) == [one for one in order if one != gone]


def test_unnamed_conversations_spread_evenly():
    cluster = [f"node{number}" for number in range(4)]
    first = [rendezvous(str(number).encode(), cluster)[0] for number in range(4000)]
    counts = [first.count(one) for one in cluster]
    assert min(counts) > 900
    assert max(counts) < 1100


def test_a_crowded_node_is_passed_over():
    order = rendezvous(b"name", "abc")
    peers = {name: node(name, FULL if name == order[0] else IDLE) for name in order[1:] + order[:1] if name != order[2]}
    own = node(order[2])
    assert place_unnamed(b"name", own, peers) == Forward(order[1])
    crowded = {name: replace(one, num_open=FULL) for name, one in peers.items()}
    assert place_unnamed(b"name", replace(own, num_open=FULL), crowded) == Forward(order[0])
