"""Who may ask: nobody without the token, nobody twice, and nobody who asks another one or later."""

from __future__ import annotations

import pytest

from phi_cluster.cluster.peer_proof import ClusterKey, Guard, digest_of


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def key(clock):
    return ClusterKey("token", "1.0", clock)


@pytest.fixture
def guard(clock):
    return Guard(ClusterKey("token", "1.0", clock), "me", clock)


def test_a_peer_is_let_in_once(key, guard):
    value, expected = key.prove("me", "/path", b"body")
    proven = guard.admit("/path", value)
    assert proven.digest == digest_of(b"body")
    assert guard.answer(proven) == expected
    assert guard.admit("/path", value) is None


def test_the_same_request_may_be_made_again(key, guard):
    assert guard.admit("/path", key.prove("me", "/path", b"body")[0])
    assert guard.admit("/path", key.prove("me", "/path", b"body")[0])


@pytest.mark.parametrize("value", [None, "", "a b c d", "1000000 n d m", "é é é é", " ".join("abcde"), "x" * 100_000])
def test_strangers_are_not(guard, value):
    assert guard.admit("/path", value) is None


def test_another_token_version_receiver_or_path_is_a_strangers(key, guard, clock):
    for other in (ClusterKey("other", "1.0", clock), ClusterKey("token", "1.1", clock)):
        assert guard.admit("/path", other.prove("me", "/path", b"")[0]) is None
    assert guard.admit("/path", key.prove("you", "/path", b"")[0]) is None
    assert guard.admit("/other", key.prove("me", "/path", b"")[0]) is None


def test_no_part_of_a_proof_can_be_changed(key, guard):
    parts = key.prove("me", "/path", b"body")[0].split(" ")
    for index in range(4):
        forged = list(parts)
        forged[index] = forged[index][:-1] + ("0" if forged[index][-1] != "0" else "1")
        assert guard.admit("/path", " ".join(forged)) is None
    assert guard.admit("/path", " ".join(parts))


def test_an_old_proof_is_none_and_none_is_remembered_for_ever(key, guard, clock):
    values = [key.prove("me", "/path", b"")[0] for _ in range(10)]
    assert guard.admit("/path", values[0])
    clock.now += 59
    assert guard.admit("/path", values[1])
    clock.now += 2
    assert all(guard.admit("/path", value) is None for value in values)
    # Clocks differ, in both directions.
    clock.now -= 100
    assert guard.admit("/path", values[2])
    clock.now += 500
    assert guard.admit("/path", None) is None
    assert not guard._used


def test_answers_are_of_whoever_was_asked(key, clock):
    value, expected = key.prove("me", "/path", b"")
    nonce = value.split(" ")[1]
    assert key.answer("you", nonce) != expected
    assert ClusterKey("other", "1.0", clock).answer("me", nonce) != expected


def test_without_a_token_there_is_no_key():
    with pytest.raises(ValueError, match="token"):
        ClusterKey("", "1.0")
