"""The account of KV memory."""

import random

import pytest

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.ledger import Ledger
from phi_cluster.cluster.session.session import SessionStats


def test_leases_are_totals_and_never_exceed_the_capacity():
    ledger = Ledger(100)
    assert ledger.reserve("a", 60)
    assert not ledger.reserve("b", 41)
    assert ledger.usage == 60
    assert ledger.reserve("b", 40)
    assert (ledger.usage, ledger.available) == (100, 0)
    assert ledger.reserve("a", 60)
    assert ledger.reserve("a", 10)
    assert ledger.lease("a") == 60


def test_a_lease_grows_by_the_difference():
    ledger = Ledger(100)
    ledger.reserve("a", 60)
    assert ledger.missing("a", 100) == 0
    assert ledger.missing("a", 130) == 30
    assert not ledger.reserve("a", 101)
    assert ledger.lease("a") == 60
    assert ledger.reserve("a", 100)


def test_settling_enters_what_is_there():
    ledger = Ledger(100)
    ledger.reserve("a", 90)
    ledger.settle("a", 30)
    assert (ledger.usage, ledger.available, ledger.missing("b", 71)) == (30, 70, 1)
    ledger.settle("b", 200)
    assert (ledger.usage, ledger.available) == (230, 0)
    assert ledger.missing("c", 1) == 131
    # Who needs no more than it has need not wait for others.
    assert ledger.reserve("b", 150)
    assert ledger.missing("b", 200) == 0


def test_release_gives_all_back_once():
    ledger = Ledger(100)
    ledger.reserve("a", 70)
    assert ledger.release("a") == 70
    assert ledger.release("a") == 0
    assert ledger.usage == 0


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="capacity"):
        Ledger(-1)
    with pytest.raises(ValueError, match="nbytes"):
        Ledger(1).settle("a", -1)


def test_the_usage_is_the_sum_of_the_leases_whatever_happens():
    rng = random.Random(3)
    ledger = Ledger(1000)
    for _ in range(2000):
        digest = rng.choice("abcdef")
        nbytes = rng.randint(0, 400)
        fits = ledger.missing(digest, nbytes) == 0
        action = rng.choice(["reserve", "settle", "release"])
        if action == "reserve":
            before = ledger.usage
            assert ledger.reserve(digest, nbytes) == fits
            assert ledger.usage <= max(1000, before)
        elif action == "settle":
            ledger.settle(digest, min(nbytes, ledger.lease(digest)))
        else:
            ledger.release(digest)
        assert ledger.usage == sum(map(ledger.lease, "abcdef")) <= 1000


def stats(name, nbytes, idle, *, ephemeral=False, in_turn=False, num_waiting=0):
    key = SessionKey("t", name, ephemeral)
    return SessionStats(key, "active", in_turn, num_waiting, 1, 1, nbytes, 1, 9.0, idle, 1, 0, 1, 9.0)


CANDIDATES = [
    stats("named-new", 10, 1.0),
    stats("named-old", 10, 99.0),
    stats("unnamed-new", 10, 2.0, ephemeral=True),
    stats("unnamed-old", 10, 50.0, ephemeral=True),
    stats("busy", 500, 0.0, in_turn=True),
    stats("wanted", 500, 70.0, num_waiting=1),
    stats("empty", 0, 1000.0, ephemeral=True),
]


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (0, []),
        (1, ["unnamed-old"]),
        (10, ["unnamed-old"]),
        (11, ["unnamed-old", "unnamed-new"]),
        (21, ["unnamed-old", "unnamed-new", "named-old"]),
        (40, ["unnamed-old", "unnamed-new", "named-old", "named-new"]),
        (41, []),
    ],
)
def test_unnamed_then_longest_idle_go_first_and_none_in_vain(nbytes, expected):
    names = {candidate.key.digest: candidate.key.session_id for candidate in CANDIDATES}
    assert [names[digest] for digest in Ledger.pick_victims(nbytes, CANDIDATES)] == expected
