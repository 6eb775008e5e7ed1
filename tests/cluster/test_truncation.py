"""Leaving the oldest turns out: whole ones, the fewest, never the last, and no instructions."""

from __future__ import annotations

import pytest

from phi_cluster.cluster.truncation import fewest_to_remove, num_removable, without_oldest


def messages(text: str) -> list[dict[str, str]]:
    """`s1 u2 a3`: roles by their first letter, each with its word as content."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[word[0]], "content": word} for word in text.split()]


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("u1 a1 u2 a2 u3", ["u1 a1 u2 a2 u3", "u2 a2 u3", "u3"]),
        ("s0 u1 a1 u2", ["s0 u1 a1 u2", "s0 u2"]),
        # Messages of one kind in a row are one turn; so is a reply that answers nothing.
        ("u1 u2 a1 a2 u3", ["u1 u2 a1 a2 u3", "u3"]),
        ("a0 u1 a1", ["a0 u1 a1", "u1 a1"]),
        # The system's word within a turn goes with it.
        ("s0 u1 s1 a1 u2", ["s0 u1 s1 a1 u2", "s0 u2"]),
        ("s0", ["s0"]),
        ("u1", ["u1"]),
        ("", [""]),
    ],
)
def test_whole_turns_go(given, left):
    assert num_removable(messages(given)) == len(left) - 1
    assert [without_oldest(messages(given), count) for count in range(len(left))] == list(map(messages, left))


@pytest.mark.parametrize("room", range(1, 22))
def test_no_more_go_than_must(room):
    given = messages(" ".join(f"u{number} a{number}" for number in range(10)))
    asked: list[int] = []

    def fits(some: list[dict[str, str]]) -> bool:
        asked.append(len(some))
        return len(some) <= room

    left = without_oldest(given, fewest_to_remove(given, fits))
    assert len(left) == max(min(room, 20) // 2 * 2, 2)
    assert given[-len(left) :] == left
    assert len(asked) <= 5
