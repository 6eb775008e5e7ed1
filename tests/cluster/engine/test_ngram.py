"""NgramIndex against the plain definition: the latest earlier occurrence of the longest n-gram."""

from __future__ import annotations

import random

import pytest

from phi_cluster.cluster.engine.ngram import NgramIndex


def plain(token_ids: list[int], min_match: int, max_match: int, num_tokens: int) -> list[int]:
    """The definition, searched for from the end."""
    for n in range(max_match, min_match - 1, -1):
        for end in range(len(token_ids) - 1, n - 1, -1):
            if token_ids[end - n : end] == token_ids[len(token_ids) - n :]:
                guess = list(token_ids)
                for _ in range(num_tokens):
                    guess.append(guess[end + len(guess) - len(token_ids)])
                return guess[len(token_ids) :]
    return []


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([], []),
        ([1], []),
        ([1, 2], []),
        ([1, 2, 3, 4], []),
        ([1, 2, 3, 9, 1, 2], [3, 9, 1]),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),  # the latest
        ([7, 1, 2, 3, 5, 1, 2, 4, 7, 1, 2], [3, 5, 1]),  # the longest before the latest
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], [9, 1, 2]),
        ([5, 5, 5], [5, 5, 5]),  # what followed is the end itself: round and round
        ([8, 1, 2, 3, 1, 2, 3], [1, 2, 3]),
        ([9, 9], []),  # an n-gram is not its own earlier occurrence
    ],
)
def test_examples(token_ids: list[int], expected: list[int]) -> None:
    assert NgramIndex(2, 4).propose(token_ids, 3) == expected
    assert plain(token_ids, 2, 4, 3) == expected


@pytest.mark.parametrize("seed", range(10))
def test_growing_piece_by_piece_equals_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    min_match = rng.randint(1, 3)
    max_match = rng.randint(min_match, 5)
    index = NgramIndex(min_match, max_match)
    token_ids: list[int] = []
    found = 0
    for _ in range(60):
        token_ids += [rng.randrange(4) for _ in range(rng.randint(0, 4))]
        num_tokens = rng.randint(0, 6)
        guess = index.propose(token_ids, num_tokens)
        assert guess == plain(token_ids, min_match, max_match, num_tokens)
        found += len(guess)
    assert found > 50


def test_a_long_conversation_is_taken_in_a_piece_at_a_time() -> None:
    token_ids = [n % 1000 for n in range(5000)]
    index = NgramIndex(2, 4)
    guesses = []
    while not (guess := index.propose(token_ids, 2)):
        guesses.append(guess)
        # It goes on growing meanwhile.
        token_ids.append(len(token_ids) % 1000)
    assert 3 <= len(guesses) <= 5
    assert guess == [len(token_ids) % 1000, len(token_ids) % 1000 + 1]
