"""Which of a conversation's oldest turns are left out, so that the rest fits into the context.

Owns: what a whole turn is, and finding the fewest to leave out. Knows nothing of templates and tokenizers: how many
tokens messages are is asked of a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def without_oldest(messages: Sequence[dict[str, Any]], num_turns: int) -> list[dict[str, Any]]:
    """The messages without the first `num_turns` turns. What stands before the first turn (instructions) stays."""
    starts = _starts(messages)
    if num_turns == 0 or not starts:
        return list(messages)
    return [*messages[: starts[0]], *messages[starts[num_turns] :]]


def num_removable(messages: Sequence[dict[str, Any]]) -> int:
    """How many turns may be left out: all but the last one."""
    return max(len(_starts(messages)) - 1, 0)


def fewest_to_remove(messages: Sequence[dict[str, Any]], fits: Callable[[list[dict[str, Any]]], bool]) -> int:
    """How many of the oldest turns must go until the rest `fits`; all that may, if nothing does. `fits` is asked a
    logarithmic number of times."""
    low, high = 0, num_removable(messages)
    while low < high:
        middle = (low + high) // 2
        if fits(without_oldest(messages, middle)):
            high = middle
        else:
            low = middle + 1
    return low


def _starts(messages: Sequence[dict[str, Any]]) -> list[int]:
    """Where turns begin: a message that is not the system's, the first one or a user's behind an answer."""
    starts: list[int] = []
    before = None
    for index, message in enumerate(messages):
        role = message["role"]
        if role != "system" and (not starts or (role == "user" and before in ("assistant", "tool"))):
            starts.append(index)
        if role != "system":
            before = role
    return starts
